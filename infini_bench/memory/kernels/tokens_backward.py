"""Gradients of keys, values and the write gate, where a segment is written key by key (``tokens``).

For a chunk with M before it and T = dL/dM after it, R = V - K M and E = L (w R):
    dV = w L^T K T                                  B = -tril(dV E^T, -1)
    w dw = sum_D dV R + sum_j B_ij (K K^T)_ij        dK = E T^T - dV M^T + (B + B^T) K
where B is the gradient of K K^T through L; then through the norm and sigma to the raw keys, and through
w = sigmoid(u k + c), of slope w (1 - w), to those and to u and c. All chunks at once.
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
    kept,
    load,
    number,
    product,
    slope,
    store,
    strides,
)
from infini_bench.memory.kernels.tokens import Solved, unit
from infini_bench.memory.kernels.tuning import shape


@triton.jit
def tokens_backward_kernel(
    k, v, gate, K, L, w, M, T, dk, dv, dgate, N, G, C, plane_K, plane_L, plane,
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
    K += at * ROWS * D + n[:, None] * D + d[None, :]
    L += at * ROWS * ROWS + n[:, None] * ROWS + m[None, :]
    k_high, k_low = kept(K, plane_K, SPLIT)
    l_high, l_low = kept(L, plane_L, SPLIT)
    p = tl.load(w + at * ROWS + n)
    to_k = tl.zeros([ROWS, D], tl.float32)
    to_B = tl.zeros([ROWS, ROWS], tl.float32)
    to_w = tl.zeros([ROWS], tl.float32)
    for first in tl.range(0, D, COLUMNS, num_stages=STAGES):
        c = first + tl.arange(0, COLUMNS)
        tile = at * D * D + c[:, None] * D + d[None, :]
        c = c[None, :]
        m_high, m_low = kept(M + tile, plane, SPLIT)
        t_high, t_low = kept(T + tile, plane, SPLIT)
        r = load(v, rows * vn + c, rows, N, EVEN).to(tl.float32)
        r -= product(k_high, k_low, tl.trans(m_high), tl.trans(m_low), SPLIT, SPLIT, WORK)
        e_high, e_low = halves(p[:, None] * r, WORK)
        e_high, e_low = halves(product(l_high, l_low, e_high, e_low, SPLIT, SPLIT, WORK), WORK)
        to_k = dot3(e_high, e_low, t_high, t_low, to_k, SPLIT, SPLIT, WORK)
        y = product(k_high, k_low, tl.trans(t_high), tl.trans(t_low), SPLIT, SPLIT, WORK)
        y_high, y_low = halves(y, WORK)
        y = product(tl.trans(l_high), tl.trans(l_low), y_high, y_low, SPLIT, SPLIT, WORK) * p[:, None]
        store(dv, rows * fn + c, y, rows, N, EVEN)
        to_w += tl.sum(y * r, 1)
        y_high, y_low = halves(-y, WORK)
        to_B = dot3(y_high, y_low, tl.trans(e_high), tl.trans(e_low), to_B, SPLIT, SPLIT, WORK)
        to_k = dot3(y_high, y_low, m_high, m_low, to_k, SPLIT, SPLIT, WORK)
    to_B = tl.where(n[:, None] > m[None, :], to_B, 0.0)
    overlap = product(k_high, k_low, tl.trans(k_high), tl.trans(k_low), SPLIT, SPLIT, WORK)
    to_w += tl.sum(to_B * overlap, 1)
    b_high, b_low = halves(to_B + tl.trans(to_B), WORK)
    to_k = dot3(b_high, b_low, k_high, k_low, to_k, SPLIT, SPLIT, WORK)
    x = load(k + b * kb + s * ks + g * kh, rows * kn + d[None, :], rows, N, EVEN).to(tl.float32)
    f, inverse, norm = unit(x, FEATURES)
    along = tl.where(norm > EPS, tl.sum(to_k * f, 1) * inverse * inverse, 0.0)[:, None]
    to_x = (to_k - along * f) * inverse[:, None] * slope(x, f, FEATURES)
    if GATED:
        to_w *= 1 - p  # 0 behind the segment's last key, as y
        to_x += to_w[:, None] * tl.load(gate + g * (D + 1) + d)[None, :]
        dgate += at * (D + 1)
        tl.store(dgate + d, tl.sum(to_w[:, None] * x, 0))
        tl.store(dgate + D, tl.sum(to_w, 0))
    store(dk + b * eb + s * es + g * eh, rows * en + d[None, :], to_x, rows, N, EVEN)


def tokens_backward(
    k: Tensor, v: Tensor, gate: Tensor, x: Solved, M: Tensor, T: Tensor, features: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of k, v (B, S, N, G, D) and gate; M, T: ``states`` and, ``back``, their gradients."""
    batch, _, n, groups, size = k.shape
    _, _, segments, _, count, rows, _ = x.K.shape
    k, v, gate, t = dense(k), dense(v), gate.contiguous(), shape("tokens_backward", size, k.dtype)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    dk[:, segments:], dv[:, segments:] = 0, 0
    parts = gate.new_empty(batch, segments, groups, count, gate.shape[1])
    tokens_backward_kernel[(segments * count, batch * groups)](
        k, v, gate, *x, M, T, dk, dv, parts, n, groups, count, x.K[0].numel(), x.L[0].numel(), M[0].numel(),
        *strides(k, v, dk, dv),
        D=size, COLUMNS=min(t.rows, size), ROWS=rows, EVEN=n % rows == 0, FEATURES=features,
        GATED=gate.shape[1] > 0, SPLIT=len(x.L) > 1, WORK=number(k)["WORK"], STAGES=t.stages,
        num_warps=t.warps, maxnreg=t.regs,
    )  # fmt: skip
    return dk, dv, parts.sum((0, 1, 3))
