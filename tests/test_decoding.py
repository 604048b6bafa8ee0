"""Steps of one token in steady shapes say what calls of the model say, wherever the rows stand."""

import pytest
import torch
import torch.nn.functional as F
from conftest import MEMORIES, awake
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from infini_bench.decoding import SteadySteps, decoding
from infini_bench.models import build_model
from infini_bench.schema import MemoryConfig

UNSTEADY = {"full", "memorizing", "retrieval", "compressive", "rmt", "armt", "armt_max", "autocompressor"}
STEADY = [name for name in MEMORIES if name not in UNSTEADY]


def read(model, ragged, rows=2):
    """The state after prompts of 21 tokens, one of them with 3 of padding if ragged."""
    mask = None
    if ragged:
        mask = torch.ones(rows, 21, dtype=torch.bool, device=model.device)
        mask[1, :3] = False
    with torch.no_grad():
        return model.step(torch.randint(20, (rows, 21), device=model.device), mask=mask)[1]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", MEMORIES)
def test_steps_equal_calls_over_segment_borders(name, ragged, decoder):
    model = awake(build_model(decoder, MemoryConfig(segment=8, **MEMORIES[name]), vocab_size=20).eval())
    state = read(model, ragged)
    before = {name: x.clone() for name, x in state.tensors().items()}
    steps, calls = decoding(model, state), state
    assert isinstance(steps, SteadySteps) == (name in STEADY)
    for _ in range(19):  # two borders, and in ragged rows two more
        token = torch.randint(20, (2, 1))
        with torch.no_grad():
            wanted, calls = model.step(token, calls, keep="last")
        assert torch.allclose(steps.step(token), wanted[:, -1], atol=2e-5)
    assert steps.state.get_seq_length() == calls.get_seq_length() == 40
    if name in STEADY:
        state_after = calls.spread(8).tensors()
        assert state_after.keys() == steps.state.tensors().keys()
        for key, x in steps.state.tensors().items():
            assert torch.allclose(x, state_after[key], atol=2e-5), key
    assert all(torch.equal(x, before[name]) for name, x in state.tensors().items())


def test_a_step_inside_a_segment_writes_nothing_and_asks_the_device_nothing(decoder, monkeypatch):
    model = build_model(decoder, MemoryConfig(segment=8, **MEMORIES["infini_delta"]), vocab_size=20).eval()
    steps = decoding(model, read(model, ragged=True))
    assert steps.fills == [5, 2]
    own = [layer.state["M"] for layer in steps.state.layers]
    monkeypatch.setattr(torch.Tensor, "__int__", None)
    monkeypatch.setattr(torch.Tensor, "item", None)
    steps.step(torch.zeros(2, 1, dtype=torch.long))
    assert all(torch.equal(layer.state["M"], M) for layer, M in zip(steps.state.layers, own, strict=True))
    assert steps.fills == [6, 3]


def test_rows_that_complete_a_segment_are_a_call_of_their_own(decoder, monkeypatch):
    model = build_model(decoder, MemoryConfig(segment=8, **MEMORIES["infini_delta"]), vocab_size=20).eval()
    steps, fed = decoding(model, read(model, ragged=True)), []
    step = model.step
    monkeypatch.setattr(
        model, "step", lambda ids, *args, **how: fed.append(len(ids)) or step(ids, *args, **how)
    )
    for _ in range(6):  # the rows have 5 and 2 tokens of their segments
        steps.step(torch.zeros(2, 1, dtype=torch.long))
    assert fed == [1, 1] and steps.fills == [3, 0]
    even = decoding(model, read(model, ragged=False))
    for _ in range(3):
        even.step(torch.zeros(2, 1, dtype=torch.long))
    assert fed[2:] == [2, 2] and even.fills == [0, 0]  # the prompt itself, and both rows at once


def test_all_steps_inside_a_segment_share_one_graph(decoder, monkeypatch):
    graphs = []

    def collect(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend, compiler = aot_autograd(fw_compiler=collect), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compiler(function, **how, backend=backend))
    model = build_model(decoder, MemoryConfig(segment=8, **MEMORIES["infini_linear"]), vocab_size=20).eval()
    state = read(model, ragged=False)
    wanted = decoding(model, state)
    torch.compiler.reset()
    model.compile_layers()
    steps = decoding(model, state)
    for token in torch.randint(20, (2, 2, 1)):
        assert torch.allclose(steps.step(token), wanted.step(token), atol=1e-6)
    assert steps.fills == [7, 7] and len(graphs) == 1
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["full", "autocompressor", "infini_linear"])
def test_keys_that_grow_by_each_step_are_not_cudnns(name, decoder, monkeypatch):
    """It would plan for each of their numbers anew; where shapes stay it may compute."""
    torch.manual_seed(0)
    model = build_model(decoder, MemoryConfig(**MEMORIES[name], segment=8), 64)
    state = model.step(torch.zeros(1, 5, dtype=torch.long), None)[1]
    allowed, attend = [], F.scaled_dot_product_attention

    def spy(*given, **named):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*given, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    steps = decoding(model, state)
    steps.step(torch.zeros(1, 1, dtype=torch.long))
    assert allowed and set(allowed) == {isinstance(steps, SteadySteps)}
    assert torch.backends.cuda.cudnn_sdp_enabled()
