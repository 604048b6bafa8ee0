"""The Triton kernels of delta_token against float64, key by key: on a GPU if there is one, else in Triton's
interpreter."""

import pytest
import torch
from test_kernels import (
    DEVICE,
    GPU,
    N,
    distance,
    document,
    infini_attention,
    inputs,
    memory_is_checked,  # noqa: F401
    run,
    runs,  # noqa: F401
    two_levels_from_five_segments,  # noqa: F401
)

from infini_bench.memory import reference


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


DTYPE = torch.bfloat16 if GPU else torch.float32  # no kernel in float16: see backend.refusal
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
        "D64": {"segments": 26, "n": 130, "size": 64, "written": 25, "heads": 6, "groups": 2, "done": 1},
        "D128": {"segments": 2, "n": 2048, "size": 128, "written": 2},
        "D128 odd": {"segments": 3, "n": 500, "size": 128, "written": 2, "heads": 3, "groups": 1},
    }


@pytest.mark.parametrize("case", CASES)
def test_no_further_from_float64_than_the_eager_form(case):
    kernels("relu2", **CASES[case])


@pytest.mark.parametrize("features", ["elu1", "exp"])
def test_every_feature_map(features):
    kernels(features, done=2, written=3)


def test_blocks_of_columns_go_through_the_chunks_apart(monkeypatch):
    """As at head size 128, which is slow in the interpreter."""
    from infini_bench.memory.kernels import tuning

    for name in ("chunks", "tokens_backward"):
        monkeypatch.setitem(tuning.SHAPES, name, {64: tuning.Shape(32)})  # halved for float32
    kernels("relu2", segments=2, n=37, size=32, written=2, done=1, heads=1, groups=1)


def kernels(features, written, done=0, gated=True, **shape):
    """At most 1.5 times the eager error; its float32 results may miss by 2^-15 of their norm."""

    torch.manual_seed(0)
    *tensors, _ = inputs(DTYPE, done=done, **shape)
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
        return infini_attention(q, k, v, local, torch.sigmoid(beta), M, z, write_gate_GE=gate, **how)[:2]

    def wide(cast):
        def form(*x):
            out, M = exact(*(t.to(cast) for t in x), done, written, features)
            return out.to(x[0].dtype), M

        return form

    ideal = run(wide(torch.float64), [x.double() for x in tensors], [w.double() for w in weights])
    eager, ours = run(wide(torch.float32), tensors, weights), run(fused, tensors, weights)
    for name, a, b, c in zip(NAMES, ours, eager, ideal, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert distance(a, c) <= 1.5 * distance(b, c) + (2**-15 if GPU else 2e-6), name


def test_bfloat16_products_keep_what_both_halves_hold():
    """In the interpreter too, which cuts where a GPU rounds: through many chunks of repeated keys."""
    from infini_bench.memory.kernels import ops

    _, k, v, *_ = inputs(torch.bfloat16, segments=5, n=150)
    k[:, :, 75:] = k[:, :, :75]
    gate = torch.randn(k.shape[3], k.shape[4] + 1, device=DEVICE)
    M = torch.randn(2, k.shape[3], *[k.shape[4]] * 2, device=DEVICE)
    new, _ = ops.write(k, v, M, M[..., :0, 0], 5, "delta_token", "elu1", gate)
    beta = torch.zeros(k.shape[3], device=DEVICE)
    _, ideal = exact(*(x.double() for x in (k, k, v, v, beta, M, gate)), 0, 5, "elu1")
    assert distance(new[:, 5], ideal) < 2**-13


@pytest.mark.parametrize("gated", [True, False])
def test_a_document_cut_into_calls_equals_the_token_by_token_reference(gated):
    more = {"normaliser": "none", "features": "relu2", "write_gate": gated}
    mem, (q, k, v), rope = document("triton", "delta_token", 3 * N + 7, **more)
    wanted = {"memory_gate": mem.memory_gate}
    if gated:
        wanted["memory_write"] = mem.memory_write
        torch.nn.init.normal_(mem.memory_write, std=0.5)
    outs, state, at = [], None, 0
    for call in (N // 2, 1, 2 * N, 3 * N + 7):
        part = slice(at, min(at + call, q.shape[1]))
        out, state = mem(q[:, part], k[:, part], v[:, part], rope, state)
        outs.append(out)
        at = part.stop
    out = torch.cat(outs, 1)
    row = [x[0].double().cpu() for x in (q, k, v)]
    params = {name: x.double().cpu() for name, x in wanted.items()}
    local = reference.window(*row, N, "block")
    expected, M, _ = (x[None] for x in reference.compressive(*row, mem.cfg, params, local))
    near = 2e-2 if GPU else 2e-6
    assert distance(out.cpu(), expected) < near and distance(state["M"].cpu(), M) < near
    assert "z" not in state
    weight = torch.randn_like(expected)
    leaves = [q, k, v, *wanted.values()]
    ours = torch.autograd.grad((out * weight.to(out)).sum(), leaves)
    theirs = torch.autograd.grad((expected * weight).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        assert distance(a, b.double()) < 2 * near


def test_what_writing_costs_is_the_same_beside_the_kernels():
    """They compute strengths themselves; memory, price and both gradients are those of the eager form."""
    found = []
    for form in ("triton", "eager"):
        more = {"normaliser": "none", "features": "relu2", "write_gate": True, "write_cost": 0.3}
        mem, (q, k, v), rope = document(form, "delta_token", 3 * N + 7, **more)
        with torch.no_grad():
            mem.memory_write.copy_(torch.linspace(-1, 1, mem.memory_write.numel()).view_as(mem.memory_write))
        out, _ = mem(q, k, v, rope)
        paid = mem.auxiliary
        assert paid.dtype == torch.float32
        alone = torch.autograd.grad(paid, [k, mem.memory_write], retain_graph=True)
        loss = out.float().square().sum() + paid
        found.append([paid, *alone, *torch.autograd.grad(loss, [k, mem.memory_write])])
    for a, b in zip(*found, strict=True):
        assert distance(a, b.double()) < (2e-2 if GPU else 2e-6)


@pytest.mark.parametrize("trained", [False, True])
def test_keys_below_the_floor_write_nothing_beside_the_kernels_either(trained):
    found = []
    for form in ("triton", "eager"):
        more = {"normaliser": "none", "features": "relu2", "write_gate": True}
        more |= {"write_floor": 0.6, "floor_trained": trained}
        mem, (q, k, v), rope = document(form, "delta_token", 3 * N + 7, **more)
        with torch.no_grad():
            mem.memory_write.copy_(torch.linspace(-1, 1, mem.memory_write.numel()).view_as(mem.memory_write))
        soft = mem(q, k, v, rope)[1]["M"]
        out, state = mem.eval()(q, k, v, rope)
        assert (distance(state["M"], soft.double()) > 0.1) != trained
        slopes = torch.autograd.grad(state["M"].square().sum(), [k, v, mem.memory_write])
        found.append([out, state["M"], *slopes])
    for a, b in zip(*found, strict=True):
        assert distance(a, b.double()) < (2e-2 if GPU else 2e-6)


def test_keys_without_any_feature_and_keys_not_written_leave_the_memory_alone():
    """ReLU^2 of negative keys is zero; and a gate may be as good as shut: no gradient is NaN."""
    from infini_bench.memory.kernels import ops

    q, k, v, local, beta, M, _ = inputs(DTYPE, done=1)
    q[:, 1], k[:, 0] = -q[:, 1].abs(), -k[:, 0].abs()
    gate = torch.zeros(k.shape[3], k.shape[4] + 1, device=DEVICE)
    gate[1, -1] = -60.0
    leaves = [x.requires_grad_() for x in (q, k, v, local, M, gate)]
    before, z = ops.write(k, v, M, M[..., :0, 0], 2, "delta_token", "relu2", gate)
    out = ops.read(q, local, torch.sigmoid(beta), before, z, 1, "relu2")
    assert torch.equal(before[:, 1], before[:, 0])
    assert torch.equal(before[:, 2, 1], before[:, 0, 1]) and not torch.equal(before[:, 2], before[:, 0])
    for x in torch.autograd.grad((out.float() ** 2).sum() + (before**2).sum(), leaves):
        assert x.isfinite().all()


def test_the_operators_keep_their_promises_to_the_compiler():
    from infini_bench.memory.kernels import ops

    q, k, v, local, beta, M, _ = inputs(DTYPE, done=1)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    gate = torch.randn(k.shape[3], k.shape[4] + 1, device=DEVICE)
    x = [t.requires_grad_() for t in (k, v, gate, M)]
    torch.library.opcheck(ops._write_tokens, (*x, 2, "relu2"), test_utils=tests)
    before = ops.write(k, v, M, M[..., :0, 0], 2, "delta_token", "relu2", gate)[0].detach().requires_grad_()
    share = torch.sigmoid(beta).detach().requires_grad_()
    x = (q.requires_grad_(), local.requires_grad_(), share, before, before[..., :0, 0], 1, "relu2")
    torch.library.opcheck(ops._read, x, test_utils=tests)
