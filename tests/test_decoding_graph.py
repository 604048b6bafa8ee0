"""A step inside a segment, recorded once and replayed: the steps that are not, to the last bit.

Without a GPU a `Tape` is the graph: as there, what is replayed knows tensors, and no Python.
"""

import pytest
import torch
from conftest import MEMORIES
from test_decoding import STEADY, read
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from infini_bench import decoding as module
from infini_bench.decoding import WARM, Graph, decoding
from infini_bench.models import build_model
from infini_bench.schema import MemoryConfig
from infini_bench.stream import generate

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU has graphs")


class Calls(TorchDispatchMode):
    """Every operator that is called, with its arguments and results; ``undo`` takes back what they wrote."""

    def __init__(self):
        super().__init__()
        self.made, self.written = [], []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op is not torch.ops.aten._local_scalar_dense.default  # it waits for the device
        if op._schema.is_mutable:
            self.written.append((args[0], args[0].clone()))
        out = op(*args, **(kwargs or {}))
        self.made.append((op, args, kwargs or {}, out))
        return out

    def undo(self):
        for x, before in reversed(self.written):
            x.copy_(before)


class Tape(Graph):
    """The operators of one call, called again on the tensors of then, their results where they were then."""

    def __init__(self):
        self.calls = self.captures = self.replays = 0

    def beside(self, function):
        return function()

    def capture(self, function):
        self.captures += 1
        with Calls() as self.tape:
            self.out = function()
        self.tape.undo()

    def replay(self):
        self.replays += 1
        with torch.autocast("cpu", enabled=False):  # whose casts were recorded
            for op, args, kwargs, out in self.tape.made:
                for then, now in zip(tree_leaves(out), tree_leaves(op(*args, **kwargs)), strict=True):
                    if isinstance(then, torch.Tensor) and then.data_ptr() != now.data_ptr():
                        then.copy_(now)


@pytest.fixture
def taped(monkeypatch):
    """Graphs on the CPU, too: Tapes."""
    monkeypatch.setattr(module, "graph_on", lambda device: Tape())


def model_of(name, decoder, segment=8):
    return build_model(decoder, MemoryConfig(segment=segment, **MEMORIES[name]), vocab_size=20).eval()


def plain(model, state):
    """Steps that are not captured."""
    steps = decoding(model, state)
    steps.graph = None
    return steps


def walk(steps, tokens):
    """Logits of all steps (steps, B, V), each kept over the later ones, and the state after them."""
    logits = torch.stack([steps.step(token) for token in tokens])
    return {"logits": logits, "seen": steps.state.get_seq_length(), **steps.state.tensors()}


@pytest.mark.parametrize(("rows", "ragged"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("name", STEADY)
def test_replayed_steps_are_the_steps_over_segment_borders(name, rows, ragged, decoder, taped):
    model, tokens = model_of(name, decoder), torch.randint(20, (22, rows, 1))
    state = read(model, ragged, rows)
    before = {name: x.clone() for name, x in state.tensors().items()}
    steps = decoding(model, state)
    found, wanted = walk(steps, tokens), walk(plain(model, state), tokens)
    assert found.keys() == wanted.keys() and found["seen"] == 43
    for key, x in found.items():
        assert torch.equal(torch.as_tensor(x), torch.as_tensor(wanted[key])), key
    inside = 22 if ragged else 19  # in no step all rows complete a segment, or in three
    assert (steps.graph.captures, steps.graph.replays) == (1, inside - WARM)
    assert all(torch.equal(x, before[name]) for name, x in state.tensors().items())


def test_replayed_steps_are_the_steps_under_autocast(decoder, taped):
    model, tokens = model_of("infini_delta", decoder), torch.randint(20, (22, 3, 1))
    with torch.autocast("cpu", torch.bfloat16):
        state = read(model, True, 3)
        found, wanted = walk(decoding(model, state), tokens), walk(plain(model, state), tokens)
    assert state.layers[0].state["k"].dtype == torch.bfloat16
    assert torch.equal(found["logits"], wanted["logits"])


def test_another_document_is_another_graph_and_leaves_the_first_alone(decoder, taped):
    model = model_of("infini_delta", decoder)
    states = read(model, True, 3), read(model, False, 1)
    tokens = [torch.randint(20, (20, rows, 1)) for rows in (3, 1)]
    wanted = [walk(plain(model, state), given) for state, given in zip(states, tokens, strict=True)]
    first, second = (decoding(model, state) for state in states)
    early = [first.step(token) for token in tokens[0][:9]]
    found = walk(second, tokens[1])
    late = walk(first, tokens[0][9:])
    assert torch.equal(torch.cat([torch.stack(early), late["logits"]]), wanted[0]["logits"])
    assert all(torch.equal(late[key], wanted[0][key]) for key in states[0].tensors() if key[-4:] != "seen")
    assert torch.equal(found["logits"], wanted[1]["logits"])


def test_the_state_of_steps_is_the_callers_own(decoder, taped):
    model = model_of("infini_linear", decoder)
    steps = decoding(model, read(model, False))
    tokens = torch.randint(20, (12, 2, 1))
    walk(steps, tokens[:8])
    state, wanted = steps.state, steps.state.tensors()
    wanted = {name: x.clone() for name, x in wanted.items()}
    after = walk(steps, tokens[8:])  # over a border
    assert all(torch.equal(x, wanted[name]) for name, x in state.tensors().items())
    assert torch.allclose(walk(plain(model, state), tokens[8:])["logits"], after["logits"], atol=1e-6)


def test_generated_tokens_are_the_same_replayed(decoder, monkeypatch):
    model = model_of("sink", decoder)
    state, logits = read(model, True), torch.randn(2, 20)
    wanted = generate(model, logits, state, 30)
    monkeypatch.setattr(module, "graph_on", lambda device: Tape())
    assert (generate(model, logits, state, 30) == wanted).all()


def test_a_cpu_has_no_graph(decoder):
    model = model_of("infini_linear", decoder)
    assert decoding(model, read(model, False)).graph is None


@gpu
@pytest.mark.filterwarnings("ignore")  # the compiler's advice
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("name", "how"),
    [*((name, "") for name in STEADY), ("infini_delta", "compiled"), ("infini_delta", "bf16")],
)
def test_a_gpus_graph_is_the_steps_over_segment_borders(name, how, rows, decoder):
    model, tokens = model_of(name, decoder).cuda(), torch.randint(20, (40, rows, 1), device="cuda")
    low = how == "bf16"
    with torch.autocast("cuda", torch.bfloat16, enabled=low):  # around all, as in evaluations
        documents = [read(model, False, rows), read(model, rows > 1, rows)]
        wanted = [walk(plain(model, state), tokens) for state in documents]
        if how == "compiled":
            torch.compiler.reset()
            model.compile_steps()
        kept = [decoding(model, state) for state in documents]
        found = [walk(steps, tokens) for steps in kept]
    assert all(steps.graph.calls > WARM for steps in kept)
    near = 2e-2 if low else 1e-4
    for one, other in zip(found, wanted, strict=True):
        for key, x in one.items():
            torch.testing.assert_close(x, other[key], rtol=near, atol=near)


@gpu
@pytest.mark.filterwarnings("ignore")
def test_a_replayed_step_is_a_copy_a_launch_of_a_graph_and_a_copy(decoder, monkeypatch):
    model, token = model_of("infini_delta", decoder, 64).cuda(), torch.zeros(3, 1, dtype=torch.long).cuda()
    steps, launched, replay = decoding(model, read(model, True, 3)), [], torch.cuda.CUDAGraph.replay
    for _ in range(WARM + 1):
        steps.step(token)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: launched.append(self) or replay(self))
    with Calls() as asked:
        steps.step(token)
    aten = torch.ops.aten
    own = [op for op, *_ in asked.made if op is not aten.fill_.Scalar]  # of torch's generator, at a launch
    assert own == [aten.copy_.default, aten.clone.default]
    assert launched == [steps.graph.graph]
