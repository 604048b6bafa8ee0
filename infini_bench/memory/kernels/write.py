"""Writing a segment into the memory (Eq. 8, 9), forward: what each segment adds and takes back.

One program a segment and KV head; keys and values are read once, the F x D sums stay in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from infini_bench.memory.kernels.pieces import EPS, dot, dot3, halves, load, number, sigma, strides
from infini_bench.memory.kernels.tuning import shape


@triton.jit
def sums_kernel(
    k, v, M, z, N, G, P,
    kb, ks, kn: tl.constexpr, kh, vb, vs, vn: tl.constexpr, vh,
    D: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr, FEATURES: tl.constexpr,
    WORK: tl.constexpr, NATIVE: tl.constexpr, LOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """U_s = sigma(K)^T V (D, D) and sum_t sigma(K_t) (D,) of segment s into slot s + 1 of M and z."""
    s, b, g = tl.program_id(0).to(tl.int64), (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    n, d = tl.arange(0, ROWS)[:, None], tl.arange(0, D)
    k += b * kb + s * ks + g * kh
    v += b * vb + s * vs + g * vh
    U = tl.zeros([D, D], tl.float32)
    total = tl.zeros([D, 16], tl.float32)  # 16 equal columns: the narrowest product there is
    ones = tl.full([ROWS, 16], 1.0, tl.float32).to(WORK)
    for start in tl.range(0, N, ROWS, num_stages=STAGES):
        x = load(k + start * kn, n * kn + d[None, :], start + n, N, EVEN).to(tl.float32)
        y = load(v + start * vn, n * vn + d[None, :], start + n, N, EVEN)
        f = sigma(x, FEATURES)
        if not EVEN:
            f = tl.where(start + n < N, f, 0.0)
        f_high, f_low = halves(f, WORK)
        if NATIVE:
            y_high, y_low = halves(y.to(tl.float32), WORK)
        else:
            y_high, y_low = y, y
        U = dot3(tl.trans(f_high), tl.trans(f_low), y_high, y_low, U, LOW > 0, NATIVE, WORK)
        total = dot3(tl.trans(f_high), tl.trans(f_low), ones, ones, total, LOW > 0, False, WORK)
    slot = (b * P + s + 1) * G + g
    tl.store(M + slot * D * D + d[:, None] * D + d[None, :], U)
    tl.store(z + slot * D + d, tl.sum(total, 1) / 16)


@triton.jit
def overlap_kernel(
    k, z, A, N, G, P, plane,
    kb, ks, kn: tl.constexpr, kh,
    D: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr, FEATURES: tl.constexpr,
    WORK: tl.constexpr, SPLIT: tl.constexpr, LOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A_s = sum_t sigma(K_t) sigma(K_t)^T / (sigma(K_t) z_{s-1}) (D, D), symmetric; 0 where nothing is known.

    With x_t = sigma(K_t) / sqrt(norm_t) it is X^T X, so one product of unlike halves serves for both.
    """
    s, b, g = tl.program_id(0).to(tl.int64), (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    n, d = tl.arange(0, ROWS)[:, None], tl.arange(0, D)
    k += b * kb + s * ks + g * kh
    known = tl.load(z + ((b * P + s) * G + g) * D + d)[None, :]
    like = tl.zeros([D, D], tl.float32)
    unlike = tl.zeros([D, D], tl.float32)
    for start in tl.range(0, N, ROWS, num_stages=STAGES):
        x = load(k + start * kn, n * kn + d[None, :], start + n, N, EVEN).to(tl.float32)
        f = sigma(x, FEATURES)
        norm = tl.sum(f * known, 1)[:, None]
        keep = norm > EPS
        if not EVEN:
            keep = keep & (start + n < N)
        f = f * tl.where(keep, tl.rsqrt(tl.where(keep, norm, 1.0)), 0.0)
        high, low = halves(f, WORK)
        like = dot(tl.trans(high), high, like, WORK)
        if LOW > 0:
            unlike = dot(tl.trans(high), low, unlike, WORK)
    if LOW > 0:
        like += unlike + tl.trans(unlike)
    A += ((b * (P - 1) + s) * G + g) * D * D + d[:, None] * D + d[None, :]
    high, low = halves(like, WORK)
    tl.store(A, high)
    if SPLIT:
        tl.store(A + plane, low)


def sums(k: Tensor, v: Tensor, M: Tensor, z: Tensor, features: str) -> None:
    """Fills slots 1.. of M (B, P, G, D, D) and z (B, P, G, D) with what segments 0..P-2 of k and v add."""
    batch, _, n, groups, size = k.shape
    t, slots = shape("sums", size, k.dtype), M.shape[1]
    sums_kernel[(slots - 1, batch * groups)](
        k, v, M, z, n, groups, slots, *strides(k, v),
        D=size, ROWS=t.rows, EVEN=n % t.rows == 0, FEATURES=features, LOW=t.low, STAGES=t.stages,
        num_warps=t.warps, maxnreg=t.regs, **number(k),
    )  # fmt: skip


def taken_like(k: Tensor, segments: int) -> Tensor:
    """Space for A."""
    batch, _, _, groups, size = k.shape
    planes, dtype = (1, torch.float32) if k.dtype == torch.float32 else (2, torch.bfloat16)
    return torch.empty(planes, batch, segments, groups, size, size, dtype=dtype, device=k.device)


def overlap(k: Tensor, z: Tensor, features: str) -> Tensor:
    """A (2, B, P-1, G, D, D), float32 as its halves (one and whole for float32 keys), from the keys and the
    normaliser before each segment, z (B, P, G, D)."""
    batch, _, n, groups, size = k.shape
    t, slots = shape("overlap", size, k.dtype), z.shape[1]
    A = taken_like(k, slots - 1)
    overlap_kernel[(slots - 1, batch * groups)](
        k, z, A, n, groups, slots, A[0].numel(), *strides(k),
        D=size, ROWS=t.rows, EVEN=n % t.rows == 0, FEATURES=features, WORK=number(k)["WORK"],
        SPLIT=len(A) > 1, LOW=t.low, STAGES=t.stages, num_warps=t.warps, maxnreg=t.regs,
    )  # fmt: skip
    return A
