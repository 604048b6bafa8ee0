"""The Triton kernels against float64 written from Eq. 7-10: on a GPU if there is one, else in Triton's
interpreter (switched on by conftest.py)."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from functorch.compile import make_boxed_func
from launches import checked
from torch._dynamo.backends.common import aot_autograd

from infini_bench.errors import UserError
from infini_bench.layer import MemoryDecoderLayer
from infini_bench.memory import build_memory, reference
from infini_bench.memory.kernels import backend
from infini_bench.memory.kernels.backend import choose
from infini_bench.models import build_model
from infini_bench.schema import DecoderConfig, MemoryConfig

GPU = torch.cuda.is_available()
triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.bfloat16, torch.float16] if GPU else [torch.float32]
N, H, G, D = 20, 4, 2, 16  # N is no multiple of a kernel's block


@triton.jit
def count(x, n):
    for i in tl.range(0, n):
        tl.store(x + i, i)


@pytest.fixture(scope="module", autouse=True)
def runs():
    try:
        count[(1,)](torch.zeros(3, dtype=torch.int32, device=DEVICE), 3)
    except Exception as error:
        pytest.skip(f"triton {triton.__version__} runs no loop here (do it and NumPy disagree?): {error}")


@pytest.fixture(autouse=True)
def memory_is_checked(runs, monkeypatch):
    """In the interpreter: a GPU does so itself."""
    with nullcontext() if GPU else checked(monkeypatch):
        yield


@pytest.fixture(autouse=True)
def two_levels_from_five_segments(runs, monkeypatch):
    from infini_bench.memory.kernels import walk

    monkeypatch.setattr(walk, "ONE_LEVEL", 4)


def exact(q, k, v, local, beta, M, z, done, written, update, features):
    """Eq. 7-10, segment after segment, in the dtype of its arguments: outputs, M and z."""
    sigma, outs = reference.SIGMA[features], []
    for s in range(q.shape[1]):
        f = sigma(q[:, s]).unflatten(2, (z.shape[1], -1))  # (B, Q, G, R, F)
        far = torch.einsum("bqgrf,bgfd->bqgrd", f, M)
        far = far / torch.einsum("bqgrf,bgf->bqgr", f, z).clamp_min(1e-6)[..., None]
        gate = torch.sigmoid(beta)[:, None]
        outs.append(gate * far.flatten(2, 3) + (1 - gate) * local[:, s] if s + done else local[:, s])
        if s < written:
            key, value = sigma(k[:, s]), v[:, s]
            if update == "delta":
                norm = torch.einsum("bngf,bgf->bng", key, z)[..., None]
                value = value - torch.where(
                    norm > 1e-6, torch.einsum("bngf,bgfd->bngd", key, M) / norm.clamp_min(1e-6), 0.0
                )
            M = M + torch.einsum("bngf,bngd->bgfd", key, value)
            z = z + key.sum(1)
    return torch.stack(outs, 1), M, z


def inputs(dtype, segments=3, n=N, queries=None, size=D, done=0, heads=H, groups=G):
    shapes = [(2, segments, queries or n, heads, size), *[(2, segments, n, groups, size)] * 2]
    q, k, v = (torch.randn(s).to(dtype) for s in shapes)
    q[0, 0, 0, 0, 0] = k[0, 0, 0, 0, 0] = 0  # among millions of float16 numbers some are: one slope there
    M, z = torch.randn(2, groups, size, size) * 3 * bool(done), torch.rand(2, groups, size) * 30 * bool(done)
    return [x.to(DEVICE) for x in (q, k, v, torch.randn(shapes[0]).to(dtype), torch.randn(heads), M, z)]


def run(form, tensors, weights):
    """Outputs, M, z, and the gradients of one scalar of all three with respect to every input."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    results = form(*tensors)
    loss = sum((r.to(w.dtype) * w).sum() for r, w in zip(results, weights, strict=True))
    grads = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [*results, *(torch.zeros_like(x) if g is None else g for x, g in zip(tensors, grads, strict=True))]


def distance(x, y):
    return ((x.double() - y).norm() / y.norm().clamp_min(1e-12)).item()


NAMES = ["out", "M", "z", "dq", "dk", "dv", "dlocal", "dbeta", "dM", "dz"]
CASES = {
    "one segment, unfinished": {"segments": 1, "written": 0},
    "one segment": {"segments": 1, "written": 1, "done": 2},
    "few queries": {"segments": 1, "written": 1, "queries": 3, "done": 1},
    "last segment unfinished": {"written": 2},
    "from a state": {"done": 3, "written": 3},
    "two levels": {"segments": 7, "n": 3, "written": 6, "heads": 2, "groups": 1},
    "wide": {"segments": 2, "n": 37, "size": 32, "written": 2, "done": 1, "heads": 3, "groups": 3},
}
if GPU:
    CASES |= {
        "D64": {"segments": 40, "n": 512, "size": 64, "written": 39, "heads": 6, "groups": 2, "done": 1},
        "D128": {"segments": 9, "n": 2048, "size": 128, "written": 9},
        "D128 odd": {"segments": 5, "n": 1000, "size": 128, "written": 4, "heads": 3, "groups": 1},
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("update", ["linear", "delta"])
def test_no_further_from_float64_than_the_eager_form(update, dtype, case):
    kernels(update, "elu1", dtype, **CASES[case])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", ["relu2", "exp"])
def test_every_feature_map(features, dtype):
    kernels("delta", features, dtype, done=2, written=2)


def test_programs_that_share_a_segments_features_write_all_of_it(monkeypatch):
    """As at head size 128, which is slow in the interpreter."""
    from infini_bench.memory.kernels import tuning

    monkeypatch.setitem(tuning.SHAPES, "sums", {64: tuning.Shape(parts=2)})
    kernels("delta", "elu1", DTYPES[0], segments=2, n=37, size=32, written=2, done=1)


def test_keys_and_values_that_the_copy_engine_cannot_address_are_written_all_the_same():
    from infini_bench.memory.kernels import ops

    _, k, v, _, _, M, z = inputs(DTYPES[0], done=1)
    odd = [torch.cat([x[..., :1], x], -1)[..., 1:] for x in (k, v)]  # heads 17 numbers apart
    shifted = [torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in (k, v)]
    expected = ops.write(k, v, M, z, 3, "delta", "elu1")
    for pair in (odd, shifted, [x.mT.contiguous().mT for x in (k, v)]):
        for a, b in zip(ops.write(*pair, M, z, 3, "delta", "elu1"), expected, strict=True):
            assert torch.equal(a, b)


def infini_attention(
    q, k, v, local, gate, M, z, *, written, done, update, features="elu1", write_gate_GE=None
):
    """One call beside its local part: outputs, and M and z after segment ``written``."""
    from infini_bench.memory.kernels import ops

    M, z = ops.write(k, v, M, z, written, update, features, write_gate_GE)
    return ops.read(q, local, gate, M, z, done, features), M[:, written], z[:, written]


def kernels(update, features, dtype, written, done=0, **shape):
    """At most 1.5 times the eager error; its float32 results may miss by 2^-15 of their norm."""

    tensors = inputs(dtype, done=done, **shape)
    weights = [torch.randn_like(tensors[i], dtype=torch.float32) for i in (0, 5, 6)]
    how = {"update": update, "features": features}

    def fused(q, k, v, local, beta, M, z):
        return infini_attention(q, k, v, local, torch.sigmoid(beta), M, z, written=written, done=done, **how)

    def wide(cast):
        def form(*x):
            out, M, z = exact(*(t.to(cast) for t in x), done, written, update, features)
            return out.to(x[0].dtype), M, z

        return form

    ideal = run(wide(torch.float64), [x.double() for x in tensors], [w.double() for w in weights])
    eager, ours = run(wide(torch.float32), tensors, weights), run(fused, tensors, weights)
    for name, a, b, c in zip(NAMES, ours, eager, ideal, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert distance(a, c) <= 1.5 * distance(b, c) + (2e-6 if dtype == torch.float32 else 2**-15), name


def test_bfloat16_products_keep_what_both_halves_hold():
    """In the interpreter too, which cuts where a GPU rounds: within 2^-7 and 2^-14."""

    q, k, v, local, beta, M, z = inputs(torch.bfloat16, done=1)
    out, new_M, new_z = infini_attention(
        q, k, v, local, torch.sigmoid(beta), M, z, written=3, done=1, update="delta"
    )
    ideal = exact(*(x.double() for x in (q, k, v, local, beta, M, z)), 1, 3, "delta", "elu1")
    assert out.dtype == torch.bfloat16 and distance(out, ideal[0]) < 2**-7
    assert distance(new_M, ideal[1]) < 2**-14 and distance(new_z, ideal[2]) < 2**-14


def document(backend, update, tokens, **more):
    dtype, size = DTYPES[0], 64 if GPU else D
    cfg = MemoryConfig(segment=N, update=update, backend=backend, **more)
    mem = build_memory(cfg, H, G, size).to(DEVICE)
    with torch.no_grad():
        mem.memory_gate.copy_(torch.linspace(-1, 1, H))
    torch.manual_seed(1)
    heads = [(1, tokens, H, size), (1, tokens, G, size), (1, tokens, G, size)]
    q, k, v = (torch.randn(s).to(DEVICE, dtype).requires_grad_() for s in heads)
    angle = torch.arange(N)[:, None] * 10000.0 ** (-torch.arange(size // 2) / (size // 2))
    rope = [torch.cat([f(angle)] * 2, -1)[None].to(DEVICE, dtype) for f in (torch.cos, torch.sin)]
    return mem, (q, k, v), rope


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_a_document_cut_into_calls_equals_the_token_by_token_reference(update):
    mem, (q, k, v), rope = document("triton", update, 3 * N + 7)
    outs, state, at = [], None, 0
    for call in (N // 2, 1, 2 * N, 3 * N + 7):
        part = slice(at, min(at + call, q.shape[1]))
        out, state = mem(q[:, part], k[:, part], v[:, part], rope, state)
        outs.append(out)
        at = part.stop
    out = torch.cat(outs, 1)
    row = [x[0].double().cpu() for x in (q, k, v)]
    gate = {"memory_gate": mem.memory_gate.double().cpu()}
    local = reference.window(*row, N, "block")
    expected, M, z = (x[None] for x in reference.compressive(*row, mem.cfg, gate, local))
    near = 2e-2 if GPU else 2e-6
    assert distance(out.cpu(), expected) < near
    assert distance(state["M"].cpu(), M) < near and distance(state["z"].cpu(), z) < near
    weight = torch.randn_like(expected)
    wanted = [q, k, v, mem.memory_gate]
    ours = torch.autograd.grad((out * weight.to(out)).sum(), wanted)
    theirs = torch.autograd.grad((expected * weight).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        assert distance(a, b.double()) < 2 * near


def test_memory_switched_off_leaves_the_local_attention_and_still_writes():
    (on, qkv, rope), (off, _, _) = document("triton", "linear", 2 * N), document("triton", "linear", 1)
    off.enabled = False
    (a, kept), (b, written) = on(*qkv, rope), off(*qkv, rope)
    assert torch.equal(a[:, :N], b[:, :N]) and not torch.equal(a[:, N:], b[:, N:])
    assert torch.equal(kept["M"], written["M"]) and kept["M"].abs().sum() > 0


def test_the_operators_keep_their_promises_to_the_compiler():
    from infini_bench.memory.kernels import ops

    q, k, v, local, beta, M, z = inputs(DTYPES[0], done=1)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    x = [t.requires_grad_() for t in (k, v, M, z)]
    torch.library.opcheck(ops._write, (*x, 2, True, "elu1"), test_utils=tests)
    before, norms = (t.detach().requires_grad_() for t in ops.write(*x, 2, "delta", "elu1"))
    gate = torch.sigmoid(beta).detach().requires_grad_()
    x = (q.requires_grad_(), local.requires_grad_(), gate, before, norms, 1, "elu1")
    torch.library.opcheck(ops._read, x, test_utils=tests)


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_a_layer_with_kernels_compiles_to_one_graph(update, monkeypatch):
    asked = []

    def ask(*device):
        torch._dynamo.graph_break()  # as the driver's answer would be one, if it were traced
        asked.append(device)

    monkeypatch.setattr(backend, "_asked", ask)
    memory = MemoryConfig(segment=N, update=update, backend="triton")
    model = build_model(DecoderConfig(layers=2, dim=H * D, heads=H, kv_heads=G, ffn=8), memory, 50).to(DEVICE)
    x = torch.randn(1, 3 * N, H * D, device=DEVICE, dtype=DTYPES[0], requires_grad=True)
    rope = tuple(t.to(x) for t in model.model.rotary_emb(x, torch.arange(N, device=DEVICE)[None]))
    compiled = torch.compile(MemoryDecoderLayer.body, fullgraph=True, dynamic=False, backend="aot_eager")
    for layer in model.to(DTYPES[0]).model.layers:
        out, state = compiled(layer, x, rope, None, None)
        expected, same = layer.body(x, rope, None, None)
        assert torch.equal(out, expected) and torch.equal(state["M"], same["M"])
        (ours,), (theirs,) = (torch.autograd.grad(y.float().square().sum(), x) for y in (out, expected))
        assert distance(ours, theirs.double()) < 1e-5
    assert asked


def written(memory):
    """Operators, but for views, of a compiled layer that reads on from a state, whose results are as large as
    all keys: each is a pass over memory."""
    model = build_model(DecoderConfig(layers=1, dim=H * D, heads=H, kv_heads=G, ffn=8), memory, 50).to(DEVICE)
    layer, found = model.to(DTYPES[0]).model.layers[0], Counter()
    x = torch.randn(1, 3 * N, H * D, device=DEVICE, dtype=DTYPES[0])
    rope = tuple(t.to(x) for t in model.model.rotary_emb(x, torch.arange(N, device=DEVICE)[None]))

    def collect(graph, _):
        for node in graph.graph.nodes:
            results = node.meta["val"] if isinstance(node.meta.get("val"), tuple) else [node.meta.get("val")]
            large = any(isinstance(t, torch.Tensor) and t.numel() >= 3 * N * G * D for t in results)
            if node.op == "call_function" and large and not getattr(node.target, "is_view", True):
                found[str(node.target)] += 1
        return make_boxed_func(graph.forward)

    compiled = torch.compile(
        MemoryDecoderLayer.body, fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=collect)
    )
    with torch.no_grad():
        _, state = layer.body(x, rope, None, None)
        out, expected = compiled(layer, x, rope, state, None)[0], layer.body(x, rope, state, None)[0]
    assert torch.equal(out, expected)
    return found


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_a_compiled_layer_passes_over_memory_where_local_attention_does_and_in_two_operators(update):
    ours = written(MemoryConfig(segment=N, update=update, backend="triton"))
    ours.subtract(written(MemoryConfig(segment=N, kind="block")))
    operators = {"infini_bench.write.default": 1, "infini_bench.read.default": 1}
    assert {name: count for name, count in ours.items() if count} == operators


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"update": "delta_corrected"}, "no kernel for memory.update=delta_corrected"),
        ({"gradient_depth": 2}, "no kernel for memory.gradient_depth=2"),
        ({"features": "gelu"}, "no kernel for memory.features=gelu"),
        ({"write_gate": True}, "no kernel for memory.write_gate=True"),
        ({"normaliser": "none"}, "no kernel for memory.normaliser=none"),
        (
            {"update": "delta_token", "normaliser": "none", "write_gate": True, "write_floor": 0.1},
            "no kernel for memory.write_floor with memory.features=elu1",
        ),
        ({"update": "delta_token", "normaliser": "norm"}, "no kernel for memory.normaliser=norm"),
        ({"update": "delta_token", "normaliser": "none", "decay": 0.9}, "no kernel for memory.decay=0.9"),
    ],
)
def test_a_backend_that_cannot_run_is_an_error_only_where_it_was_asked_for(change, why):
    for asked in ("triton", "auto", "eager"):
        mem = build_memory(MemoryConfig(segment=N, backend=asked, **change), H, G, D).to(DEVICE)
        x = [t.flatten(1, 2) for t in inputs(DTYPES[0])[:3]]
        rope = [torch.ones(1, N, D, device=DEVICE, dtype=DTYPES[0])] * 2
        if asked == "triton":
            with pytest.raises(UserError, match=why):
                mem(*x, rope)
        else:
            assert mem(*x, rope)[0].isfinite().all()


def test_delta_token_in_float16_is_left_to_the_eager_form():
    cfg = MemoryConfig(segment=N, update="delta_token", normaliser="none", backend="triton")
    mem = build_memory(cfg, H, G, D).to(DEVICE)
    x = [torch.ones(2, N, heads, D, dtype=torch.float16, device=DEVICE) for heads in (H, G, G)]
    with pytest.raises(UserError, match="delta_token in float16"):
        mem(*x, [torch.ones(1, N, D, device=DEVICE, dtype=torch.float16)] * 2)


def test_padding_and_odd_head_sizes_and_float64_are_left_to_the_eager_form():
    def wants(size=D, dtype=DTYPES[0], mask=None, device=DEVICE, backend="triton"):
        mem = build_memory(MemoryConfig(segment=N, backend=backend), H, G, size).to(device)
        seen = []
        mem.segments = lambda b, *_: (seen.append(choose(mem.cfg, b, mem.unsupported)) or b.q_BSQHD, {})
        x = [torch.ones(2, N, heads, size, dtype=dtype, device=device) for heads in (H, G, G)]
        mem(*x, None, None, mask)
        return seen == ["triton"]

    assert wants()
    assert not wants(device="cpu", backend="auto") and not wants(backend="eager")
    padded = torch.ones(2, N, dtype=torch.bool, device=DEVICE)
    for wrong, why in (
        ({"size": 24}, "head size is 24"),
        ({"dtype": torch.float64}, "float64"),
        ({"mask": padded}, "padded"),
    ):
        with pytest.raises(UserError, match=why):
            wants(**wrong)
