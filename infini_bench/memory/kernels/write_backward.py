"""Gradients of a segment's keys and values from those of the memory after it, T = dL/dM_s and t = dL/dz_s.

dV = sigma(K) T and d sigma(K) = V T^T + t. For Delta, through A_s = sum_t k k^T / norm (k = sigma(K_t)), also
y / norm - e z_{s-1}, and -e k to z_{s-1}: y = B k, e = (k y) / (2 norm^2), B = dA + dA^T, dA = -T M_{s-1}^T.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from infini_bench.memory.kernels.pieces import (
    EPS,
    dot3,
    halves,
    load,
    number,
    product,
    sigma,
    slope,
    store,
    strides,
)
from infini_bench.memory.kernels.tuning import shape


@triton.jit
def outer_kernel(T, M, B, G, P, D: tl.constexpr, WORK: tl.constexpr, SPLIT: tl.constexpr):
    """B_s = -(T_{s+1} M_s^T + M_s T_{s+1}^T)."""
    s, b, g = tl.program_id(0).to(tl.int64), (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    tile = tl.arange(0, D)[:, None] * D + tl.arange(0, D)[None, :]
    before = ((b * P + s) * G + g) * D * D
    t_high, t_low = halves(tl.load(T + before + G * D * D + tile), WORK)
    m_high, m_low = halves(tl.load(M + before + tile), WORK)
    y = product(t_high, t_low, tl.trans(m_high), tl.trans(m_low), SPLIT, SPLIT, WORK)
    tl.store(B + ((b * (P - 1) + s) * G + g) * D * D + tile, -(y + tl.trans(y)))


@triton.jit
def through_norm(f, known, B_high, B_low, LOW: tl.constexpr, WORK: tl.constexpr):
    """y, 1 / norm and e of the rows of f; 0 where the memory knows nothing of a key, as in the forward."""
    f_high, f_low = halves(f, WORK)
    y = product(f_high, f_low, B_high, B_low, LOW > 0, LOW > 1, WORK)
    norm = tl.sum(f * known, 1)
    keep = norm > EPS
    inverse = tl.where(keep, 1 / tl.where(keep, norm, 1.0), 0.0)
    return y, inverse, 0.5 * tl.sum(f * y, 1) * inverse * inverse


@triton.jit
def overlap_backward_kernel(
    k, z, B, dz, N, G, P,
    kb, ks, kn: tl.constexpr, kh,
    D: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr, FEATURES: tl.constexpr,
    WORK: tl.constexpr, LOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds to slot s of dz what the norms of segment s's keys give to z before it."""
    s, b, g = tl.program_id(0).to(tl.int64), (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    n, d = tl.arange(0, ROWS)[:, None], tl.arange(0, D)
    k += b * kb + s * ks + g * kh
    at = ((b * P + s) * G + g) * D + d
    known = tl.load(z + at)[None, :]
    tile = ((b * (P - 1) + s) * G + g) * D * D + d[:, None] * D + d[None, :]
    B_high, B_low = halves(tl.load(B + tile), WORK)
    part = tl.zeros([ROWS, D], tl.float32)
    for start in tl.range(0, N, ROWS, num_stages=STAGES):
        f = sigma(load(k + start * kn, n * kn + d[None, :], start + n, N, EVEN).to(tl.float32), FEATURES)
        if not EVEN:
            f = tl.where(start + n < N, f, 0.0)
        _, _, e = through_norm(f, known, B_high, B_low, LOW, WORK)
        part -= e[:, None] * f
    tl.store(dz + at, tl.load(dz + at) + tl.sum(part, 0))


@triton.jit
def write_backward_kernel(
    k, v, z, T, t, B, dk, dv, N, G, P,
    kb, ks, kn: tl.constexpr, kh, vb, vs, vn: tl.constexpr, vh,
    eb, es, en: tl.constexpr, eh, fb, fs, fn: tl.constexpr, fh,
    D: tl.constexpr, ROWS: tl.constexpr, LOOP: tl.constexpr, EVEN: tl.constexpr, FEATURES: tl.constexpr,
    DELTA: tl.constexpr, WORK: tl.constexpr, NATIVE: tl.constexpr, LOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of ROWS * LOOP keys and values of one KV head; zeros behind the last written segment."""
    parts = tl.cdiv(N, ROWS * LOOP)
    s, begin = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts * ROWS * LOOP
    b, g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    n, d = tl.arange(0, ROWS)[:, None], tl.arange(0, D)
    k += b * kb + s * ks + g * kh
    v += b * vb + s * vs + g * vh
    dk += b * eb + s * es + g * eh
    dv += b * fb + s * fs + g * fh
    end = tl.minimum(begin + ROWS * LOOP, N)
    if s >= P - 1:
        for start in tl.range(begin, end, ROWS):
            nothing = tl.zeros([ROWS, D], tl.float32)
            store(dk + start * en, n * en + d[None, :], nothing, start + n, N, EVEN)
            store(dv + start * fn, n * fn + d[None, :], nothing, start + n, N, EVEN)
    else:
        before = (b * P + s) * G + g
        after, tile = before + G, d[:, None] * D + d[None, :]
        T_high, T_low = halves(tl.load(T + after * D * D + tile), WORK)
        to_all = tl.load(t + after * D + d)[None, :]
        if DELTA:
            known = tl.load(z + before * D + d)[None, :]
            B_high, B_low = halves(tl.load(B + ((b * (P - 1) + s) * G + g) * D * D + tile), WORK)
        for start in tl.range(begin, end, ROWS, num_stages=STAGES):
            rows = start + n
            x = load(k + start * kn, n * kn + d[None, :], rows, N, EVEN).to(tl.float32)
            y = load(v + start * vn, n * vn + d[None, :], rows, N, EVEN)
            f = sigma(x, FEATURES)
            to_k = tl.zeros([ROWS, D], tl.float32) + to_all
            if DELTA:
                back, inverse, e = through_norm(f, known, B_high, B_low, LOW, WORK)
                to_k += back * inverse[:, None] - e[:, None] * known
            if NATIVE:
                y_high, y_low = halves(y.to(tl.float32), WORK)
            else:
                y_high, y_low = y, y
            to_k = dot3(y_high, y_low, tl.trans(T_high), tl.trans(T_low), to_k, NATIVE, LOW > 1, WORK)
            store(dk + start * en, n * en + d[None, :], to_k * slope(x, f, FEATURES), rows, N, EVEN)
            f_high, f_low = halves(f, WORK)
            to_v = product(f_high, f_low, T_high, T_low, LOW > 0, LOW > 1, WORK)
            store(dv + start * fn, n * fn + d[None, :], to_v, rows, N, EVEN)


def outer(T: Tensor, M: Tensor, k: Tensor) -> Tensor:
    """B (B, P-1, G, D, D) from T and M (B, P, G, D, D), as exact as keys of k's dtype ask for."""
    batch, slots, groups, size, _ = M.shape
    B = torch.empty_like(M[:, 1:], memory_format=torch.contiguous_format)
    outer_kernel[(slots - 1, batch * groups)](
        T, M, B, groups, slots, D=size, WORK=number(k)["WORK"], SPLIT=k.dtype != torch.float32,
        num_warps=shape("outer", size, k.dtype).warps,
    )  # fmt: skip
    return B


def overlap_backward(k: Tensor, z: Tensor, B: Tensor, dz: Tensor, features: str) -> None:
    """Adds the part of dz (B, P, G, D) that comes through A."""
    batch, _, n, groups, size = k.shape
    t, slots = shape("overlap_backward", size, k.dtype), z.shape[1]
    overlap_backward_kernel[(slots - 1, batch * groups)](
        k, z, B, dz, n, groups, slots, *strides(k),
        D=size, ROWS=t.rows, EVEN=n % t.rows == 0, FEATURES=features, WORK=number(k)["WORK"], LOW=t.low,
        STAGES=t.stages, num_warps=t.warps, maxnreg=t.regs,
    )  # fmt: skip


def write_backward(
    k: Tensor, v: Tensor, z: Tensor, T: Tensor, t_z: Tensor, B: Tensor | None, features: str
) -> tuple[Tensor, Tensor]:
    """Gradients of k and v (B, S, N, G, D) from T (B, P, G, D, D), t_z (B, P, G, D) and, for Delta, B."""
    batch, segments, n, groups, size = k.shape
    t, dk, dv = shape("write_backward", size, k.dtype), torch.empty_like(k), torch.empty_like(v)
    parts = triton.cdiv(n, t.rows * t.loop)
    write_backward_kernel[(segments * parts, batch * groups)](
        k, v, z, T, t_z, T if B is None else B, dk, dv, n, groups, T.shape[1], *strides(k, v, dk, dv),
        D=size, ROWS=t.rows, LOOP=t.loop, EVEN=n % t.rows == 0, FEATURES=features, DELTA=B is not None,
        LOW=t.low, STAGES=t.stages, num_warps=t.warps, maxnreg=t.regs, **number(k),
    )  # fmt: skip
    return dk, dv
