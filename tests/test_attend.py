"""Local attention, read and gate in one Triton kernel, against float64 written from Eq. 6-10; and the block
shapes that only some head sizes use, in the kernels that they share."""

from dataclasses import replace

import pytest
import torch
from test_kernels import DEVICE, DTYPES, GPU, H, N, distance, document, exact, inputs, run
from test_kernels import runs as runs

from infini_bench.memory.kernels import backend, tuning
from infini_bench.memory.kernels.tuning import Shape

pytestmark = pytest.mark.usefixtures("runs")
CASES = {
    "a tail, last segment unfinished": {"n": 37, "segments": 2, "written": 1, "heads": 2, "groups": 2},
    "whole blocks from a state": {"n": 32, "segments": 2, "done": 2, "written": 2, "heads": 2, "groups": 1},
}
if GPU:
    CASES |= {
        "D64": {"n": 512, "segments": 9, "size": 64, "written": 9},
        "D128": {"n": 2048, "segments": 3, "size": 128, "written": 3, "heads": 8, "groups": 8},
        "D128 odd": {"n": 1000, "segments": 3, "size": 128, "written": 2, "done": 1},
    }


@pytest.fixture(params=[False, True], ids=["pointers", "copy engine"])
def several_blocks(request, monkeypatch):
    """In the interpreter 16 queries and 16 keys a block, so that a short segment has several."""
    for kernel, shapes in tuning.SHAPES.items():
        change = {"tma": request.param} | ({} if GPU else {"rows": 32, "columns": 16, "parts": 2})
        monkeypatch.setitem(tuning.SHAPES, kernel, {k: replace(s, **change) for k, s in shapes.items()})


def attention(q, k, v):
    """Causal softmax attention inside each segment, of (B, S, N, H, D) and (B, S, N, G, D)."""
    k, v = (x.repeat_interleave(q.shape[3] // x.shape[3], 3) for x in (k, v))
    score = torch.einsum("bsqhd,bskhd->bshqk", q, k) / q.shape[-1] ** 0.5
    later = torch.ones_like(score[0, 0, 0], dtype=torch.bool).triu(1)
    return torch.einsum("bshqk,bskhd->bsqhd", score.masked_fill(later, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_further_from_float64_than_two_steps_in_the_same_dtype(dtype, case, several_blocks):
    """Outputs, M, z and all gradients: at most 1.5 times the eager error, float32 ones within 2^-15."""
    from infini_bench.memory.kernels import ops

    settings = dict(CASES[case])
    written, done = settings.pop("written"), settings.get("done", 0)
    raw, k, v, q, beta, M, z = inputs(dtype, **settings)
    tensors = [raw, k, v, q, torch.randn_like(k), beta, M, z]
    weights = [torch.randn_like(x, dtype=torch.float32) for x in (raw, M, z)]

    def one(raw, k, v, q, near_k, beta, M, z):
        before, norms = ops.write(k, v, M, z, written, "delta", "elu1")
        out = ops.attend(q, near_k, v, raw, torch.sigmoid(beta), before, norms, done, "elu1")
        return out, before[:, written], norms[:, written]

    def wide(cast):
        def form(raw, k, v, q, near_k, beta, M, z):
            local = attention(q, near_k, v) if cast == torch.float64 else attention(*(q, near_k, v)).to(dtype)
            wide = (x.to(cast) for x in (raw, k, v, local, beta, M, z))
            out, M, z = exact(*wide, done, written, "delta", "elu1")
            return out.to(raw.dtype), M, z

        return form

    ideal = run(wide(torch.float64), [x.double() for x in tensors], [w.double() for w in weights])
    eager, ours = run(wide(torch.float32), tensors, weights), run(one, tensors, weights)
    names = ["out", "M", "z", "draw", "dk", "dv", "dq", "dnear_k", "dbeta", "dM", "dz"]
    for name, a, b, c in zip(names, ours, eager, ideal, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert distance(a, c) <= 1.5 * distance(b, c) + (2e-6 if dtype == torch.float32 else 2**-15), name
    with torch.no_grad():  # writes less, so it is another program
        assert torch.equal(one(*tensors)[0], ours[0])


def test_what_it_keeps_for_the_backward_pass_is_what_attention_computes(several_blocks):
    from infini_bench.memory.kernels.attend import attend

    raw, k, v, q, beta, M, z = inputs(DTYPES[0], segments=1, n=40, done=1, heads=2, groups=1)
    before, norms = (torch.stack([x] * 4, 1) for x in (M, z))
    _, local, lse = attend(q, k, v, raw, torch.sigmoid(beta), before, norms, 1, "elu1", True)
    q, k, v = (x.double() for x in (q, k, v))
    near = 1e-2 if GPU else 1e-6
    assert distance(local, attention(q, k, v)) < near
    score = torch.einsum("bsqhd,bskhd->bshqk", q, k.repeat_interleave(2, 3)) / q.shape[-1] ** 0.5
    later = torch.ones(40, 40, dtype=torch.bool, device=DEVICE).triu(1)
    assert distance(lse, score.masked_fill(later, -torch.inf).logsumexp(-1)) < near


def test_copied_blocks_and_split_programs_write_the_same_memory():
    from infini_bench.memory.kernels import walk, write

    _, k, v, *_ = inputs(DTYPES[0], n=37)
    found = []
    for t in (Shape(32, low=1, stages=1), Shape(32, low=1, stages=1, tma=True, parts=2)):
        M = torch.zeros(2, 4, k.shape[3], 16, 16, device=DEVICE)
        z = M[..., 0].clone()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(tuning.SHAPES, "sums", {64: t})
            patch.setitem(tuning.SHAPES, "overlap", {64: t})
            write.sums(k, v, M, z, "elu1")
            walk.scan(z, out=z)
            found.append([M, z, write.overlap(k, z, "elu1")])
    for a, b in zip(*found, strict=True):
        assert distance(a, b.double()) < 1e-6


@pytest.mark.parametrize("twin", [False, True])
def test_low_halves_with_an_accumulator_of_their_own_lose_nothing(twin, monkeypatch):
    from infini_bench.memory.kernels import ops

    for kernel in ("sums", "overlap"):
        monkeypatch.setitem(tuning.SHAPES, kernel, {64: Shape(32, stages=1, twin=twin)})
    q, k, v, local, beta, M, z = inputs(torch.bfloat16, done=1)
    _, new_M, new_z = ops.infini_attention(
        q, k, v, local, torch.sigmoid(beta), M, z, written=3, done=1, update="delta"
    )
    ideal = exact(*(x.double() for x in (q, k, v, local, beta, M, z)), 1, 3, "delta", "elu1")
    assert distance(new_M, ideal[1]) < 2**-14 and distance(new_z, ideal[2]) < 2**-14


def test_the_operator_keeps_its_promises_to_the_compiler():
    from infini_bench.memory.kernels import ops

    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    raw, k, v, q, beta, M, z = inputs(DTYPES[0], segments=1, done=1, heads=2, groups=1)
    before, norms = (torch.stack([x] * 4, 1).requires_grad_() for x in (M, z))
    gate = torch.sigmoid(beta).requires_grad_()
    x = [t.requires_grad_() for t in (q, k, v, raw)]
    torch.library.opcheck(ops._attend, (*x, gate, before, norms, 1, "elu1", True), test_utils=tests)
    x, rest = [t.detach() for t in x], [t.detach() for t in (gate, before, norms)]
    torch.library.opcheck(ops._attend, (*x, *rest, 1, "elu1", False), test_utils=tests)
    _, local, lse = ops._attend(*x, *rest, 1, "elu1", True)
    torch.library.opcheck(ops._attend_backward, (q.detach(), *x[:3], local, lse), test_utils=tests)


@pytest.mark.parametrize(
    ("calls", "settings", "longest", "ones"),
    [
        ((3 * N,), {}, N, 1),
        ((3 * N,), {}, N - 1, 0),  # segments too long
        ((N,), {}, N, 0),  # the document's first segment reads nothing
        (
            (N + 3, 5, 2 * N),
            {},
            N,
            2,
        ),  # a short call that starts inside a segment has fewer queries than keys
        ((3 * N,), {"local": "xl"}, N, 0),
    ],
)
def test_when_one_kernel_computes_both(calls, settings, longest, ones, monkeypatch):
    from infini_bench.memory.kernels import ops

    monkeypatch.setattr(backend, "LONGEST", (longest, longest))
    seen, attend = [], ops.attend
    monkeypatch.setattr(ops, "attend", lambda *x: (seen.append(x), attend(*x))[1])
    mem, (q, k, v), rope = document("triton", "linear", sum(calls), **settings)
    state, at = None, 0
    with torch.no_grad():
        for call in calls:
            part, at = slice(at, at + call), at + call
            out, state = mem(q[:, part], k[:, part], v[:, part], rope, state)
    assert out.shape == (1, calls[-1], H, q.shape[-1]) and len(seen) == ones
