"""Looking up older keys: retrieval over all of them, and the search of Memorizing's neighbours."""

import pytest
import torch
import torch.nn.functional as F
from memory_references import D, G, N, compare, feed, make, qkv, rope_table, slow

from infini_bench.errors import UserError
from infini_bench.memory import build_memory, knn
from infini_bench.memory.base import forms
from infini_bench.memory.blocks import cut
from infini_bench.schema import MemoryConfig

# --- retrieval over all older keys ----------------------------------------------------------------------


@pytest.mark.parametrize(("neighbours", "scores"), [(3, 40), (1000, 2**27), (1000, 1)])
def test_few_or_all_older_keys_are_retrieved_however_few_scores_fit_at_once(neighbours, scores, monkeypatch):
    monkeypatch.setattr("infini_bench.memory.retrieval.SCORES", scores)
    mem = make(kind="retrieval", neighbours=neighbours)
    compare(mem, 5 * 6 + 2, 1e-12)
    q, k, v = (x.detach() for x in qkv(5 * 6 + 2))
    with torch.no_grad():
        out, state, _ = feed(
            mem, q, k, v, [13, 1, 9, *[1] * 9]
        )  # a step of one token sums chosen values alone
        assert (out - slow(mem, q, k, v)).abs().max() < 1e-12
    assert torch.equal(state["mem_k"], k[:, :30]) and torch.equal(state["mem_v"], v[:, :30])


def test_the_best_of_many_older_keys_are_those_of_one_sort(monkeypatch):
    """Enough of them that the search goes two rounds."""
    mem = make(64, kind="retrieval", neighbours=2)
    q, k, v = (x.detach() for x in qkv(64 * 7))
    found = []
    with torch.no_grad():
        found.append(mem(q, k, v, rope_table(mem.span))[0])
        monkeypatch.setattr("infini_bench.memory.retrieval.largest", torch.topk)
        found.append(mem(q, k, v, rope_table(mem.span))[0])
    assert (found[0] - found[1]).abs().max() < 1e-12


def test_what_is_read_without_searching_sees_the_window_and_is_found_later():
    mem, xl = make(kind="retrieval", neighbours=2), make(kind="xl")
    q, k, v = (x.detach() for x in qkv(5 * 6 + 2))
    mem.searching = False
    with torch.no_grad():
        read, state = mem(*(x[:, :25] for x in (q, k, v)), rope_table(mem.span))
        window = xl(*(x[:, :25] for x in (q, k, v)), rope_table(xl.span))[0]
        mem.searching = True
        last = mem(*(x[:, 25:] for x in (q, k, v)), rope_table(mem.span), state)[0]
    assert (read - window).abs().max() < 1e-12
    assert (last - slow(mem, q, k, v)[:, 25:]).abs().max() < 1e-12  # of one layer, whose keys are as given


def test_retrieval_is_a_window_of_two_segments_while_nothing_is_older():
    mem, xl = make(kind="retrieval", neighbours=1), make(kind="xl")
    parts = [x.detach() for x in qkv(2 * 6)]
    out = mem(*parts, rope_table(mem.span))[0]
    assert (out - xl(*parts, rope_table(xl.span))[0]).abs().max() < 1e-12


# --- the search of neighbours ---------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_faiss_finds_the_entries_that_torch_finds(padded):
    pytest.importorskip("faiss")
    mask = torch.rand(2, 43) < 0.7 if padded else None
    q, k, v = qkv(43)
    found = []
    for index in ("torch", "faiss"):
        torch.manual_seed(1)
        mem = make(N, kind="knn", entries=17, neighbours=6, index=index)
        out, state = mem(q, k, v, rope_table(2 * N), None, mask)
        more, _ = mem(q[:, :9], k[:, :9], v[:, :9], rope_table(2 * N), state)
        assert forms(mem) == [f"neighbours by {index}"]
        grads = torch.autograd.grad(out.sum() + more.sum(), [q, k, v, *mem.parameters()])
        found.append([out if mask is None else out[mask], more, *grads])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() < 2e-6


@pytest.mark.parametrize("dead", [None, [0, 17], [20, 9]])
def test_both_searches_return_the_same_places(dead):
    pytest.importorskip("faiss")
    q, k, rows = torch.randn(2, 7, D), torch.randn(2, 20, D), None if dead is None else torch.tensor(dead)
    found = []
    for search in (knn.by_torch, knn.by_faiss):
        top, at = search(q, k, rows, 5)
        top, order = top.sort(-1, descending=True)
        found.append((top, at.gather(-1, order)))
    (ours, at), (theirs, there) = found
    assert ours.isfinite().sum() == sum(7 * min(20 - x, 5) for x in dead or [0, 0])
    assert torch.equal(ours.isinf(), theirs.isinf())
    assert torch.equal(at[ours.isfinite()], there[ours.isfinite()])
    assert (ours - theirs)[ours.isfinite()].abs().max() < 1e-6


@pytest.mark.parametrize(("entries", "n"), [(16 * 24, 3), (16 * 23, 3), (8 * 25, 2), (257, 1), (5, 5)])
def test_the_largest_scores_are_found_in_two_rounds_as_in_one(entries, n):
    scores = torch.randn(2, 9, entries)
    scores[0, 0] = scores[0, 0].sort().values  # the best are of different columns
    scores[0, 1, :: max(entries // 16, 1)] += 10  # all of one column
    scores[1, :, : entries - n] = -torch.inf  # as of dead entries
    top, place = knn.largest(scores, n)
    assert torch.equal(top, scores.gather(-1, place))
    assert torch.equal(top.sort(-1, descending=True).values, scores.topk(n).values)
    assert all(len(set(row)) == n for row in place.flatten(0, 1).tolist())
    by_head = scores.view(2, 3, 3, 1, entries)  # as retrieval has them: heads by themselves
    assert torch.equal(knn.largest(by_head, n)[0], top.view(2, 3, 3, 1, n))


@pytest.mark.parametrize("scores", [1, 200, 2**27])
@pytest.mark.parametrize("index", ["torch", "faiss"])
def test_a_look_up_is_dense_attention_cut_to_the_best_entries(index, scores, monkeypatch):
    """Outputs, gradients of queries and scale, by autograd through all scores; rows with dead entries."""
    if index == "faiss":
        pytest.importorskip("faiss")
    monkeypatch.setattr(knn, "SCORES", scores)
    monkeypatch.setattr(knn, "WEIGHTS", scores)
    segment, entries, n, before, stored = 64, 512, 5, 512, torch.tensor([512, 300])
    mem = make(segment, kind="knn", entries=entries, neighbours=n, index=index)
    q, k, v = qkv(2 * segment)
    k, v = k.detach(), v.detach()
    old = [torch.randn(2, before, G, D, dtype=torch.float64) for _ in range(2)]
    b = cut(q, k, v, None, 0, segment)
    carry = {"mem_k": old[0], "mem_v": old[1], "stored": stored}
    keys, values = (torch.cat([x, y], 1) for x, y in zip(old, (k, v), strict=True))
    read, known = mem.look_up(b, keys, values, carry)
    assert read.dtype == torch.float32 and known.all()

    unit = [F.normalize(x, dim=-1) for x in (b.q_BSQHD.unflatten(3, (G, -1)), keys)]
    dense = torch.einsum("bsqgrd,bpgd->bgrsqp", *unit)
    p, steps = torch.arange(keys.shape[1]), torch.arange(2)[:, None] * segment
    alive = (p < before + steps) & (p >= before + steps - entries) & (p >= (before - stored)[:, None, None])
    dense = dense.masked_fill(~alive[:, None, None, :, None], -torch.inf)
    scaled = mem.memory_scale.exp().view(1, G, -1, 1, 1, 1) * torch.einsum("bsqgrd,bpgd->bgrsqp", *unit)
    weights = scaled.masked_fill(dense < dense.topk(n).values[..., -1:], -torch.inf).softmax(-1)
    expected = torch.einsum("bgrsqp,bpgd->bsqgrd", weights, values).flatten(3, 4)
    assert (read - expected).abs().max() < 2e-6
    weight = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), [q, mem.memory_scale]) for x in (read, expected))
    for x, y in zip(ours, theirs, strict=True):
        assert (x - y).abs().max() < 2e-5 * y.abs().max()


@pytest.mark.parametrize("oldest", [None, [0, 15]])
def test_the_search_keeps_its_promises_to_the_compiler(oldest):
    q, k = torch.randn(2, 3, 8, D, requires_grad=True), torch.randn(2, 24, D)
    rows = None if oldest is None else torch.tensor(oldest)
    torch.library.opcheck(knn.nearest, (q, k, rows, [0, 8, 16], 12, 4, "torch"))


def test_what_a_look_up_keeps_for_the_backward_pass_is_no_copy_of_the_rows_it_chose():
    mem = build_memory(MemoryConfig(kind="knn", segment=64, entries=1024, index="torch"), 2, 2, 64)
    q, k, v = (torch.randn(1, 1024, 2, 64, requires_grad=True) for _ in range(3))

    def saved(enabled):
        mem.enabled, parts = enabled, {}
        keep = lambda x: parts.setdefault(x.untyped_storage().data_ptr(), x)  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            mem(q, k, v, rope_table(128, 64, dtype=torch.float32))
        return sum(x.untyped_storage().nbytes() for x in parts.values())

    chosen = 2 * 4 * 32 * 64 * 1024 * 2  # bytes of keys and values of every query and head
    assert saved(True) - saved(False) < 0.2 * chosen


def test_faiss_is_taken_where_it_can_be_and_named_once(monkeypatch, caplog):
    monkeypatch.setattr(knn, "FAISS", True)
    monkeypatch.setattr(knn, "told", set())
    with caplog.at_level("INFO"):
        assert [knn.searcher("auto", "cpu"), knn.searcher("auto", "cpu")] == ["faiss", "faiss"]
    assert len(caplog.records) == 1 and "found by faiss" in caplog.text
    assert knn.searcher("auto", "cuda") == knn.searcher("torch", "cpu") == "torch"
    with pytest.raises(UserError, match="on the CPU, not on cuda"):
        knn.searcher("faiss", "cuda")
    monkeypatch.setattr(knn, "FAISS", False)
    assert knn.searcher("auto", "cpu") == "torch"
    with pytest.raises(UserError, match="install faiss-cpu"):
        make(kind="knn", index="faiss")
