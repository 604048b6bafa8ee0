"""Gradients of keys, values and the write gate, where a segment is written key by key (``tokens``).

For a chunk with M before it and T = dL/dM after it, R = V - K M, E = L (w R) and Y = L^T K T:
    dV = w Y        dA = -tril(Y E^T, -1), of A = tril(w K K^T, -1)
    dw = sum_D Y R + sum_D K (dA K)        dK = E T^T - (w Y) M^T + w (dA K) + dA^T (w K)
then through the norm, sigma and the gate's sigmoid to the raw keys, u and c. All chunks at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from infini_bench.memory.kernels.pieces import (
    EPS,
    dense,
    dot3,
    halves,
    load,
    number,
    product,
    slope,
    store,
    strides,
)
from infini_bench.memory.kernels.tokens import Solved, states, strength, unit
from infini_bench.memory.kernels.tuning import shape


@triton.jit
def tokens_backward_kernel(
    k, v, gate, L, M, T, dk, dv, dgate, N, G, C, plane, plane_L,
    kb, ks, kn: tl.constexpr, kh, vb, vs, vn: tl.constexpr, vh,
    eb, es, en: tl.constexpr, eh, fb, fs, fn: tl.constexpr, fh,
    D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr, FEATURES: tl.constexpr,
    GATED: tl.constexpr, WORK: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One chunk of ROWS keys; its part of the gate's gradient goes to dgate (B, S, G, C, D + 1) float32."""
    s, chunk = (tl.program_id(0) // C).to(tl.int64), tl.program_id(0) % C
    b, g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    n, d, m = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, ROWS)
    rows = chunk * ROWS + n[:, None]
    at = ((b * (tl.num_programs(0) // C) + s) * G + g) * C + chunk
    v += b * vb + s * vs + g * vh
    dv += b * fb + s * fs + g * fh
    x = load(k + b * kb + s * ks + g * kh, rows * kn + d[None, :], rows, N, EVEN).to(tl.float32)
    f, inverse, norm = unit(x, FEATURES)
    u, p = strength(x, gate + g * (D + 1), d, D, GATED)
    p = tl.where(chunk * ROWS + n < N, p, 0.0)[:, None]
    key = f * inverse[:, None]
    k_high, k_low = halves(key, WORK)
    tile = at * ROWS * ROWS + n[:, None] * ROWS + m[None, :]
    l_high = tl.load(L + tile)
    l_low = tl.load(L + plane_L + tile) if SPLIT else l_high
    to_k = tl.zeros([ROWS, D], tl.float32)
    to_A = tl.zeros([ROWS, ROWS], tl.float32)
    to_w = tl.zeros([ROWS], tl.float32)
    for first in tl.range(0, D, COLUMNS, num_stages=STAGES):
        c = first + tl.arange(0, COLUMNS)
        tile = at * D * D + d[:, None] * D + c[None, :]
        high = tl.load(M + tile)
        low = tl.load(M + plane + tile) if SPLIT else high
        t_high = tl.load(T + tile)
        t_low = tl.load(T + plane + tile) if SPLIT else t_high
        r = load(v, rows * vn + c[None, :], rows, N, EVEN).to(tl.float32)
        r -= product(k_high, k_low, high, low, SPLIT, SPLIT, WORK)
        e_high, e_low = halves(p * r, WORK)
        e_high, e_low = halves(product(l_high, l_low, e_high, e_low, SPLIT, SPLIT, WORK), WORK)
        y_high, y_low = halves(product(k_high, k_low, t_high, t_low, SPLIT, SPLIT, WORK), WORK)
        y = product(tl.trans(l_high), tl.trans(l_low), y_high, y_low, SPLIT, SPLIT, WORK)
        to_w += tl.sum(y * r, 1)
        y_high, y_low = halves(-y, WORK)
        to_A = dot3(y_high, y_low, tl.trans(e_high), tl.trans(e_low), to_A, SPLIT, SPLIT, WORK)
        to_k = dot3(e_high, e_low, tl.trans(t_high), tl.trans(t_low), to_k, SPLIT, SPLIT, WORK)
        y *= p
        store(dv, rows * fn + c[None, :], y, rows, N, EVEN)
        y_high, y_low = halves(-y, WORK)
        to_k = dot3(y_high, y_low, tl.trans(high), tl.trans(low), to_k, SPLIT, SPLIT, WORK)
    a_high, a_low = halves(tl.where(n[:, None] > m[None, :], to_A, 0.0), WORK)
    through = product(a_high, a_low, k_high, k_low, SPLIT, SPLIT, WORK)
    to_w += tl.sum(key * through, 1)
    k_high, k_low = halves(p * key, WORK)
    to_k += p * through
    to_k = dot3(tl.trans(a_high), tl.trans(a_low), k_high, k_low, to_k, SPLIT, SPLIT, WORK)
    along = tl.where(norm > EPS, tl.sum(to_k * key, 1), 0.0)[:, None]
    to_x = (to_k - along * key) * inverse[:, None] * slope(x, f, FEATURES)
    if GATED:
        change = to_w[:, None] * p * (1 - p)  # 0 behind the segment's last key
        to_x += change * u[None, :]
        dgate += at * (D + 1)
        tl.store(dgate + d, tl.sum(change * x, 0))
        tl.store(dgate + D, tl.sum(tl.sum(change, 1), 0))
    store(dk + b * eb + s * es + g * eh, rows * en + d[None, :], to_x, rows, N, EVEN)


def tokens_backward(
    k: Tensor, v: Tensor, gate: Tensor, x: Solved, M: Tensor, T: Tensor, features: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of k, v (B, S, N, G, D) and gate from the memories before all segments, M (B, P, G, D, D), and
    the gradients of all of them, T."""
    batch, _, n, groups, size = k.shape
    _, _, segments, _, count, rows, _ = x.K.shape
    k, v, gate, t = dense(k), dense(v), gate.contiguous(), shape("tokens_backward", size, k.dtype)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    dk[:, segments:], dv[:, segments:] = 0, 0
    before, after = states(x, v, M), states(x, v, T, back=True)
    parts = gate.new_empty(batch, segments, groups, count, gate.shape[1])
    tokens_backward_kernel[(segments * count, batch * groups)](
        k, v, gate, x.L, before, after, dk, dv, parts, n, groups, count, before[0].numel(), x.L[0].numel(),
        *strides(k, v, dk, dv),
        D=size, COLUMNS=min(t.rows, size), ROWS=rows, EVEN=n % rows == 0, FEATURES=features,
        GATED=gate.shape[1] > 0, SPLIT=len(x.L) > 1, WORK=number(k)["WORK"], STAGES=t.stages,
        num_warps=t.warps, maxnreg=t.regs,
    )  # fmt: skip
    return dk, dv, parts.sum((0, 1, 3))
