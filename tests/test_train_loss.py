from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import MEMORIES, awake
from torch._dynamo.backends.registry import lookup_backend
from torch.utils._python_dispatch import TorchDispatchMode

from infini_bench.decoder import MemoryLlamaModel
from infini_bench.layer import MemoryDecoderLayer
from infini_bench.models import build_model
from infini_bench.schema import MemoryConfig
from infini_bench.train.loss import SequenceLoss

TOKENS = 8 * 7 + 3  # an unfinished segment at the end


def batch(vocab: int = 13) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.randint(vocab, (2, TOKENS + 1))
    weights = torch.rand(2, TOKENS)
    return tokens, weights / weights.sum(), (torch.rand(2, TOKENS) < 0.3).float()


def run(model, segments: int | None) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor | None]]:
    model.zero_grad()
    loss, sums = SequenceLoss(model, segments)(*run.batch)
    loss.backward()
    return loss.detach(), sums, {n: p.grad for n, p in model.named_parameters()}


def assert_same(a, b):
    torch.testing.assert_close(a[0], b[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a[1], b[1], rtol=1e-5, atol=1e-5)
    for name, grad in a[2].items():
        assert (grad is None) == (b[2][name] is None), name
        if grad is not None:
            torch.testing.assert_close(grad, b[2][name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("segments", [1, 5])
def test_checkpointed_calls_have_the_loss_and_gradients_of_one_call(decoder, memory, segments):
    model = build_model(decoder, memory, 13)
    run.batch = batch()
    whole = run(model, None)
    assert_same(whole, run(model, segments))
    assert len(whole[2]) == sum(1 for _ in model.parameters())


@pytest.mark.parametrize(("depth", "segments"), [(1, 4), (2, 2), (3, 1), (3, 2)])
def test_the_gradient_depth_counts_segments_of_the_document_not_of_the_call(decoder, memory, depth, segments):
    model = build_model(decoder, replace(memory, gradient_depth=depth), 13)
    run.batch = batch()
    assert_same(run(model, None), run(model, segments))


def test_the_loss_is_the_weighted_sum(decoder, memory):
    model = build_model(decoder, memory, 13)
    tokens, weights, task_weights = batch()
    with torch.no_grad():
        loss, sums = SequenceLoss(model, 3)(tokens, weights, task_weights)
        nll, _ = model.losses(tokens[:, :-1], tokens[:, 1:])
    assert loss.item() == pytest.approx((nll * weights).sum().item(), rel=1e-5)
    expected = [loss, (nll * task_weights).sum(), task_weights.sum()]
    torch.testing.assert_close(sums, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_checkpointing_recomputes_one_call_at_a_time(decoder, memory):
    """What is saved for the backward pass grows with the calls' states, not with their activations."""
    model = build_model(decoder, memory, 13)
    run.batch = batch()

    def saved(segments: int | None) -> int:
        elements = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: elements.append(x.numel()) or x, lambda x: x):
            SequenceLoss(model, segments)(*run.batch)
        return sum(elements)

    if memory.kind not in ("sliding", "full"):  # their states are about as large as their activations
        assert saved(1) < saved(None) / 3


@pytest.mark.parametrize("segments", [None, 2])
def test_logits_are_computed_only_where_a_loss_is_asked_for(decoder, memory, segments):
    """Two answer tokens in the last call: same loss and gradients, and a head that sees two tokens."""
    model = build_model(decoder, memory, 13)
    tokens, weights, _ = batch()
    weights[:, :-1] = 0
    run.batch = tokens, weights, weights
    seen = []
    hook = model.lm_head.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    loss, sums, gradients = run(model, segments)
    hook.remove()
    assert sum(seen) == 2  # the last call is not recomputed
    model.zero_grad()
    nll, _ = model.losses(tokens[:, :-1], tokens[:, 1:])
    (expected := (nll * weights).sum() + model.take_auxiliary() / weights.numel()).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert sums[2].item() == pytest.approx(weights.sum().item())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_what_is_read_before_has_no_gradient_and_its_effect(decoder, memory):
    """A row's loss is that of its document's end; its gradients are those behind a detached state."""
    model = build_model(decoder, memory, 13).eval()  # no auxiliary loss
    documents = [torch.randint(13, (size + TOKENS + 1,)) for size in (16, 0)]
    _, weights, task_weights = batch()
    tokens = torch.stack([document[-TOKENS - 1 :] for document in documents])
    before = [document[: -TOKENS - 1] for document in documents]
    run.batch = (tokens, weights, task_weights, before)
    whole = run(model, None)
    assert_same(whole, run(model, 2))
    model.zero_grad()
    loss = torch.zeros(())
    for i, document in enumerate(documents):
        with torch.no_grad():
            state = model.step(before[i][None])[1] if len(before[i]) else None
        ids = document[-TOKENS - 1 :][None]
        loss = loss + (model.losses(ids[:, :-1], ids[:, 1:], state)[0] * weights[i]).sum()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert_same(whole, (loss.detach(), whole[1], gradients))
    if model.has_memory and memory.kind != "armt":  # whose untrained memory reads 0
        run.batch = (tokens, weights, task_weights)
        assert abs(run(model, None)[0] - whole[0]) > 1e-6


def test_reading_before_leaves_autocast_its_gradients(decoder):
    """Weights that autocast converted while there was no gradient must not be used where there is one."""
    model = build_model(decoder, MemoryConfig(segment=8), 13)
    tokens, weights, task_weights = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = SequenceLoss(model)(tokens, weights, task_weights, [torch.randint(13, (16,))] * 2)
    loss.backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert without == set()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler itself looks at it
@pytest.mark.parametrize(
    ("memory", "graphs", "segments"),
    [
        pytest.param(MemoryConfig("xl", 8), 1, None, id="transformer_xl"),
        # of the layer that looks up, and of the others; in calls, each has its own number of entries
        pytest.param(MemoryConfig("knn", 8, entries=20, neighbours=5), 2, None, id="memorizing"),
        pytest.param(MemoryConfig("knn", 8, entries=20, neighbours=5), 2 * 2, 4, id="memorizing in calls"),
        # of the first of four calls, of two whole ones, and of the last, which is shorter
        pytest.param(MemoryConfig(segment=8, update="delta"), 3, 2, id="infini_delta in calls"),
    ],
)
def test_compiled_layers_have_the_loss_and_gradients_and_share_their_graphs(
    decoder, memory, graphs, segments, monkeypatch
):
    model = build_model(decoder, memory, 13)
    run.batch = batch()
    plain, compiler, made = run(model, segments), torch.compile, []

    def count(graph, inputs):
        made.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    def compile(function, **given):  # the loss compiles, too
        backend = count if function is MemoryDecoderLayer.body else "aot_eager"
        return compiler(function, backend=backend, fullgraph=True, **given)

    monkeypatch.setattr(torch, "compile", compile)
    loss, sums = SequenceLoss(model, segments, compiled=True)(*run.batch)
    model.zero_grad()
    loss.backward()
    assert_same(plain, (loss.detach(), sums, {n: p.grad for n, p in model.named_parameters()}))
    assert len(made) == graphs


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_compiled_look_up_leaves_the_state_of_a_plain_one(decoder, monkeypatch):
    model = build_model(decoder, MemoryConfig("knn", 8, entries=20, neighbours=5), 13)
    calls, compiler = torch.randint(13, (2, 43)).split([19, 24], 1), torch.compile
    state, outs = None, []
    monkeypatch.setattr(torch, "compile", lambda body, **more: compiler(body, backend="aot_eager", **more))
    for compiled in (False, True):
        if compiled:
            torch.compiler.reset()
            model.compile_layers()
        state = None
        for ids in calls:
            out, state = model.step(ids, state)
            outs.append([out, *state.tensors().values()])
    for x, y in zip(outs[0] + outs[1], outs[2] + outs[3], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize(
    ("name", "depth", "segments", "graphs"),
    [
        ("rmt", None, None, 1),
        ("rmt", 2, 3, 1),
        ("armt", 2, 3, 3),  # a first segment reads nothing, and what was detached needs no gradient
    ],
)
def test_compiled_segments_are_one_graph_each_and_share_it(
    decoder, name, depth, segments, graphs, monkeypatch
):
    """All layers of a whole segment are one graph, however many segments, steps and lengths there are."""
    memory = MemoryConfig(segment=8, gradient_depth=depth, **MEMORIES[name])
    model = awake(build_model(replace(decoder, layers=2), memory, 13))
    tokens, weights, task_weights = batch()
    sizes = [TOKENS - 3, 32, TOKENS]  # of whole segments, of fewer, and with an unfinished one at the end
    batches = [(tokens[:, : n + 1], weights[:, :n], task_weights[:, :n]) for n in sizes]
    ids, targets = tokens[:, :-1], tokens[:, 1:]

    def states() -> list[torch.Tensor]:
        nll, after = model.losses(ids, targets)
        return [nll, *after.tensors().values()]

    plain, state = [], states()
    for run.batch in batches:
        plain.append(run(model, segments))
    compiler, made = torch.compile, []

    def count(graph, inputs):
        made.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    def compile(function, **given):
        backend = count if function is MemoryLlamaModel.whole else "eager"
        return compiler(function, backend=backend, fullgraph=True, **given)

    monkeypatch.setattr(torch, "compile", compile)
    loss = SequenceLoss(model, segments, compiled=True)
    for given, expected in zip(batches, plain, strict=True):
        model.zero_grad()
        value, sums = loss(*given)
        value.backward()
        assert_same(expected, (value.detach(), sums, {n: p.grad for n, p in model.named_parameters()}))
        assert len(made) == graphs
    for ours, theirs in zip(states(), state, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(made) == graphs


@pytest.mark.parametrize("name", ["rmt", "armt", "autocompressor"])
def test_only_whole_segments_in_training_are_one_graph(decoder, name, monkeypatch):
    """What is read, padded, unfinished or goes on from an open segment runs layer by layer."""
    model = build_model(decoder, MemoryConfig(segment=8, **MEMORIES[name]), 13)
    ids, own, widths = torch.randint(13, (2, 24)), model.model.whole, []

    def whole(x, *given):
        widths.append(x.shape[1])
        return own(x, *given)

    monkeypatch.setattr(model.model, "whole", whole)
    with torch.no_grad():
        _, state = model.step(ids)
        _, rest = model.step(ids[:, :3])
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[0, :2] = False
    model.step(ids, mask=mask)
    model.step(ids[:, :5], rest)
    assert widths == []
    model.step(ids[:, :13], rest)  # ends the open segment, then a whole one
    model.step(ids[:, :10], state)
    assert len(widths) == 2
    with model.memory_off():
        model.step(ids)
    assert len(widths) == 5


class Asked(TorchDispatchMode):
    """Counts operators whose result, or its shape, Python waits for, and tensors made of Python's numbers."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in ("aten::nonzero", "aten::_local_scalar_dense", "aten::lift_fresh"):
            self.found[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("segments", "times"), [(None, 1), (2, 4 + 3)])  # the last call is not recomputed
def test_a_step_waits_for_the_device_once_a_call_of_the_model(decoder, segments, times):
    model = build_model(decoder, MemoryConfig(segment=8, **MEMORIES["infini_linear"]), 13)
    with Asked() as asked:
        SequenceLoss(model, segments)(*batch())[0].backward()
    assert asked.found == {"aten::nonzero": times}
