"""The kernels as differentiable operators, ``write`` and ``read``, opaque to ``torch.compile``.

Bytes (device memory, B1 T131072 bf16, one pass over q, k, v or o = 268 MB, 65 us at the 4.1 TB/s that a copy
reaches on an H200; X = one pass over all M, float32: 0.13 passes at H8 D128 N2048, 0.25 at H16 D64 N512).
delta_token's keys go through in chunks of 64: K and a state are float32's bytes, L = 128 / D passes are the
chunks' triangular systems, Y = D / 32 the states at all chunks.
    local attention alone (the floor)      q k v -> o                             4
    write, Linear                          k v -> U; U -> M                       2 + 3 X
    write, Delta                           + k -> A; A U twice -> M               3 + 7 X
    write, delta_token                     k -> K L; K L v -> A U; A U twice -> M 6 + 2 L + 7 X
    read                                   q A_dot M -> out                       3 + X
    read, backward                         q A_dot dO M -> dq dA_dot dM           5 + 2 X
    write, backward, Linear                dM -> T; k v T -> dk dv                4 + 3 X
    write, backward, Delta                 + A dM twice -> T; T M -> B; k B; B    5 + 11 X
    write, backward, delta_token           A dM twice -> T; k -> K L; K L v M,
                                           K L T -> Y; k v K L Y Y -> dk dv       14 + 4 L + 7 X + 4 Y
Measured there (us a call of the forward pass), and what its bytes take at 4.1 TB/s:
                                                       H8 D128 N2048   H16 D64 N512
    attention, cuDNN                       4             994   262       489   262
    sums_kernel                            2 + X         171   139       161   147
    scan_kernel, Linear: M and z           2 X            23    17        59    33
    read_kernel                            3 + X         264   205       234   213
    overlap_kernel, Delta                  1 + X         187    74       152    82
    walk_kernel, Delta: three launches     5 X           123    42       140    82
With every kernel at its bytes Linear's forward would be 1.36 and 1.80 times the attention; by these kernels
it is 1.46 and 1.93. A product is 34 (D128) or 17 (D64) GFLOP, 57 or 29 us at 600 TFLOP/s: sums and overlap
make two for float32's low halves, which bound overlap at D128 by 115 us; attention's are 550 and 137 GFLOP.

Shapes as in compressive.py; P = S + 1 slots: the memory before each written segment and after the last one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infini_bench.memory.kernels import tokens
from infini_bench.memory.kernels import walk as walks
from infini_bench.memory.kernels.pieces import dense
from infini_bench.memory.kernels.read import read as launch_read
from infini_bench.memory.kernels.read import read_backward
from infini_bench.memory.kernels.tokens_backward import tokens_backward
from infini_bench.memory.kernels.write import overlap, sums, taken_like
from infini_bench.memory.kernels.write_backward import outer, overlap_backward, write_backward


@torch.library.custom_op(
    "infini_bench::write",
    mutates_args=(),
    schema="(Tensor k, Tensor v, Tensor M, Tensor z, int written, bool delta, str features)"
    " -> (Tensor, Tensor, Tensor)",
)
def _write(k, v, M, z, written, delta, features):
    before, norms, taken = _write_like(k, v, M, z, written, delta, features)
    before[:, 0], norms[:, 0] = M, z
    if written:
        sums(k, v, before, norms, features)
        walks.scan(norms, out=norms)
        if delta:
            taken = overlap(k, norms, features)
            walks.walk(taken, before, out=before)
        else:
            walks.scan(before, out=before)
    return before, norms, taken


@_write.register_fake
def _write_like(k, v, M, z, written, delta, features):
    batch, groups, size = z.shape
    before = M.new_empty(batch, written + 1, groups, size, size)
    norms, taken = z.new_empty(batch, written + 1, groups, size), taken_like(k, written if delta else 0)
    return before, norms, taken


@torch.library.custom_op(
    "infini_bench::write_backward",
    mutates_args=(),
    schema="(Tensor dM, Tensor dz, Tensor k, Tensor v, Tensor before, Tensor norms, Tensor taken, bool delta,"
    " str features) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _write_backward(dM, dz, k, v, before, norms, taken, delta, features):
    k, v = dense(k), dense(v)
    if before.shape[1] == 1:
        return torch.zeros_like(k), torch.zeros_like(v), dM[:, 0].clone(), dz[:, 0].clone()
    crossed = None
    if delta:
        T, t = walks.walk(taken, dM, back=True), dz.clone(memory_format=torch.contiguous_format)
        crossed = outer(T, before, k)
        overlap_backward(k, norms, crossed, t, features)
    else:
        T, t = walks.scan(dM, back=True), dz.contiguous()
    t = walks.scan(t, back=True)
    dk, dv = write_backward(k, v, norms, T, t, crossed, features)
    return dk, dv, T[:, 0].clone(), t[:, 0].clone()


@_write_backward.register_fake
def _write_backward_like(dM, dz, k, v, before, norms, taken, delta, features):
    k, v = dense(k), dense(v)
    return torch.empty_like(k), torch.empty_like(v), torch.empty_like(dM[:, 0]), torch.empty_like(dz[:, 0])


def _save_write(ctx, inputs, output):
    k, v, _, _, _, ctx.delta, ctx.features = inputs
    ctx.save_for_backward(k, v, *output)


def _backward_of_write(ctx, dM, dz, _):
    return *_write_backward(dM, dz, *ctx.saved_tensors, ctx.delta, ctx.features), None, None, None


_write.register_autograd(_backward_of_write, setup_context=_save_write)


@torch.library.custom_op(
    "infini_bench::write_tokens",
    mutates_args=(),
    schema="(Tensor k, Tensor v, Tensor gate, Tensor M, int written, str features) -> (Tensor, Tensor)",
)
def _write_tokens(k, v, gate, M, written, features):
    before, taken = _write_tokens_like(k, v, gate, M, written, features)
    before[:, 0] = M
    if written:
        tokens.maps(tokens.solve(k, gate, written, features), v, before, taken)
        walks.walk(taken, before, out=before)
    return before, taken


@_write_tokens.register_fake
def _write_tokens_like(k, v, gate, M, written, features):
    batch, groups, size, _ = M.shape
    return M.new_empty(batch, written + 1, groups, size, size), taken_like(k, written)


@torch.library.custom_op(
    "infini_bench::write_tokens_backward",
    mutates_args=(),
    schema="(Tensor dM, Tensor k, Tensor v, Tensor gate, Tensor before, Tensor taken, str features)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _write_tokens_backward(dM, k, v, gate, before, taken, features):
    written = before.shape[1] - 1
    if not written:
        return (
            torch.zeros_like(dense(k)),
            torch.zeros_like(dense(v)),
            torch.zeros_like(gate),
            dM[:, 0].clone(),
        )
    T = walks.walk(taken, dM, back=True)
    solved = tokens.solve(k, gate, written, features)
    states = tokens.states(solved, v, before), tokens.states(solved, v, T, back=True)
    return *tokens_backward(k, v, gate, solved, *states, features), T[:, 0].clone()


@_write_tokens_backward.register_fake
def _write_tokens_backward_like(dM, k, v, gate, before, taken, features):
    return tuple(torch.empty_like(x) for x in (dense(k), dense(v), gate, dM[:, 0]))


def _save_write_tokens(ctx, inputs, output):
    k, v, gate, _, _, ctx.features = inputs
    ctx.save_for_backward(k, v, gate, *output)


def _backward_of_write_tokens(ctx, dM, _):
    return *_write_tokens_backward(dM, *ctx.saved_tensors, ctx.features), None, None


_write_tokens.register_autograd(_backward_of_write_tokens, setup_context=_save_write_tokens)


@torch.library.custom_op(
    "infini_bench::read",
    mutates_args=(),
    schema="(Tensor q, Tensor local, Tensor gate, Tensor before, Tensor norms, int done, str features)"
    " -> Tensor",
)
def _read(q, local, gate, before, norms, done, features):
    return launch_read(q, local, gate, before, norms, done, features)


@_read.register_fake
def _read_like(q, local, gate, before, norms, done, features):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@torch.library.custom_op(
    "infini_bench::read_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor local, Tensor gate, Tensor before, Tensor norms, int done,"
    " str features) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _read_backward(grad, q, local, gate, before, norms, done, features):
    return read_backward(grad, q, local, gate, before, norms, done, features)


@_read_backward.register_fake
def _read_backward_like(grad, q, local, gate, before, norms, done, features):
    return tuple(torch.empty_like(x) for x in (dense(q), dense(local), gate, before, norms))


def _save_read(ctx, inputs, output):
    *tensors, ctx.done, ctx.features = inputs
    ctx.save_for_backward(*tensors)


def _backward_of_read(ctx, grad):
    return *_read_backward(grad, *ctx.saved_tensors, ctx.done, ctx.features), None, None


_read.register_autograd(_backward_of_read, setup_context=_save_read)


def write(
    k_BSNGD: Tensor,
    v_BSNGD: Tensor,
    M_BGDD: Tensor,
    z_BGD: Tensor,
    written: int,
    update: str,
    features: str,
    gate_GE: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """M (B, P, G, D, D) and z (B, P, G, D), float32, before each of the first ``written`` segments and after
    the last of them, from M and z before the first (Eq. 8 or 9, or delta_token's rule).

    delta_token has no z: (B, G, 0), and (B, P, G, 0) comes back. gate: u and c (G, D + 1) of its strengths
    w_t = sigmoid(u k_t + c), float32; None: they are 1.
    """
    if update == "delta_token":
        gate = M_BGDD.new_empty(M_BGDD.shape[1], 0) if gate_GE is None else gate_GE
        before, _ = _write_tokens(k_BSNGD, v_BSNGD, gate, M_BGDD, written, features)
        return before, z_BGD[:, None].expand(-1, written + 1, -1, -1)
    before, norms, _ = _write(k_BSNGD, v_BSNGD, M_BGDD, z_BGD, written, update == "delta", features)
    return before, norms


def read(
    q_BSQHD: Tensor,
    local_BSQHD: Tensor,
    gate_H: Tensor,
    M_BPGDD: Tensor,
    z_BPGD: Tensor,
    done: int,
    features: str,
) -> Tensor:
    """gate * A_mem + (1 - gate) * local, (B, S, Q, H, D) (Eq. 7, 10); S at most P.

    z of no features, (B, P, G, 0): A_mem is unit-norm features times M. gate: after the sigmoid, float32.
    done: segments before the first one; the document's first is ungated.
    """
    return _read(q_BSQHD, local_BSQHD, gate_H, M_BPGDD, z_BPGD, done, features)
