"""The Triton kernels of delta_token against float64, key by key: on a GPU if there is one, else in Triton's
interpreter."""

import pytest
import torch

from infini_bench.errors import UserError
from infini_bench.memory import build_memory, reference
from infini_bench.schema import MemoryConfig

pytest.importorskip("triton", reason="triton is not installed")

from test_kernels import (  # noqa: E402
    DEVICE,
    DTYPES,
    GPU,
    D,
    G,
    H,
    N,
    distance,
    inputs,
    run,
    runs,  # noqa: F401
    two_levels_from_five_segments,  # noqa: F401
)


def exact(q, k, v, local, beta, M, gate, done, written, features):
    """Segment after segment and key after key, in the dtype of its arguments: outputs and M."""
    sigma, outs = reference.SIGMA[features], []

    def unit(x):
        f = sigma(x)
        return f / f.norm(dim=-1, keepdim=True).clamp_min(1e-6)

    for s in range(q.shape[1]):
        f = unit(q[:, s]).unflatten(2, (k.shape[3], -1))  # (B, Q, G, R, F)
        far = torch.einsum("bqgrf,bgfd->bqgrd", f, M).flatten(2, 3)
        share = torch.sigmoid(beta)[:, None]
        outs.append(share * far + (1 - share) * local[:, s] if s + done else local[:, s])
        for t in range(k.shape[2] if s < written else 0):
            key, w = unit(k[:, s, t]), torch.ones_like(M[:, :, 0, :1])  # (B, G, F), (B, G, 1)
            if gate.shape[1]:
                w = torch.sigmoid((k[:, s, t] * gate[:, :-1]).sum(-1, keepdim=True) + gate[:, -1:])
            error = w * (v[:, s, t] - torch.einsum("bgf,bgfd->bgd", key, M))
            M = M + key[..., None] * error[..., None, :]
    return torch.stack(outs, 1), M


NAMES = ["out", "M", "dq", "dk", "dv", "dlocal", "dbeta", "dM", "dgate"]
CASES = {
    "one segment, unfinished": {"segments": 1, "written": 0},
    "few queries": {"segments": 1, "written": 1, "queries": 3, "done": 1},
    "last segment unfinished": {"written": 2},
    "no gate": {"done": 3, "written": 3, "gated": False},
    "two levels": {"segments": 7, "n": 3, "written": 6, "heads": 2, "groups": 1, "done": 1},
    "one chunk": {"segments": 2, "n": 64, "written": 2, "done": 1, "heads": 1, "groups": 1},
    "chunks": {"segments": 2, "n": 145, "size": 32, "written": 2, "done": 1, "heads": 3, "groups": 3},
}
if GPU:
    CASES |= {
        "D64": {"segments": 30, "n": 512, "size": 64, "written": 29, "heads": 6, "groups": 2, "done": 1},
        "D128": {"segments": 3, "n": 2048, "size": 128, "written": 3},
        "D128 odd": {"segments": 5, "n": 1000, "size": 128, "written": 4, "heads": 3, "groups": 1},
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_further_from_float64_than_the_eager_form(dtype, case):
    kernels("relu2", dtype, **CASES[case])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", ["elu1", "exp"])
def test_every_feature_map(features, dtype):
    kernels(features, dtype, done=2, written=3)


def test_blocks_of_columns_go_through_the_chunks_apart(monkeypatch):
    """As at head size 128, which is slow in the interpreter."""
    from infini_bench.memory.kernels import tuning

    for name in ("chunks", "tokens_backward"):
        monkeypatch.setitem(tuning.SHAPES, name, {64: tuning.Shape(32)})  # halved for float32
    kernels("relu2", DTYPES[0], segments=2, n=37, size=32, written=2, done=1, heads=1, groups=1)


def kernels(features, dtype, written, done=0, gated=True, repeat=False, **shape):
    """At most 1.5 times the eager error; its float32 results may miss by 2^-15 of their norm."""
    from infini_bench.memory.kernels import ops

    torch.manual_seed(0)
    *tensors, _ = inputs(dtype, done=done, **shape)
    groups, size = tensors[1].shape[3:]
    if done:
        tensors[5] = tensors[5] / 3
    gate = (
        torch.randn(groups, size + 1, device=DEVICE) / size**0.5 if gated else tensors[5].new_empty(groups, 0)
    )
    tensors.append(gate)
    weights = [torch.randn_like(tensors[i], dtype=torch.float32) for i in (0, 5)]

    def fused(q, k, v, local, beta, M, gate):
        z, gate = M.new_empty(*M.shape[:2], 0), gate if gated else None
        how = {"written": written, "done": done, "update": "delta_token", "features": features}
        return ops.infini_attention(q, k, v, local, torch.sigmoid(beta), M, z, write_gate_GE=gate, **how)[:2]

    def wide(cast):
        def form(*x):
            out, M = exact(*(t.to(cast) for t in x), done, written, features)
            return out.to(x[0].dtype), M

        return form

    ideal = run(wide(torch.float64), [x.double() for x in tensors], [w.double() for w in weights])
    eager, ours = run(wide(torch.float32), tensors, weights), run(fused, tensors, weights)
    for name, a, b, c in zip(NAMES, ours, eager, ideal, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert distance(a, c) <= 1.5 * distance(b, c) + (2e-6 if dtype == torch.float32 else 2**-15), name
