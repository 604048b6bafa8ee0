"""Writing a segment into the memory (Eq. 8, 9), forward: what each segment adds and takes back.

One program a segment and KV head, or several that share the features; the F x D sums stay in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from infini_bench.memory.kernels.pieces import EPS, described, dot, dot3, halves, number, sigma
from infini_bench.memory.kernels.tuning import shape


@triton.jit
def sums_kernel(
    k, v, M, z, N, G, P,
    D: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr, FEATURES: tl.constexpr,
    WORK: tl.constexpr, NATIVE: tl.constexpr, LOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """U_s = sigma(K)^T V (D, D) and sum_t sigma(K_t) (D,) of segment s into slot s + 1 of M and z: F rows.

    k, v: descriptors (``described``) in blocks of ROWS x F and ROWS x D.
    """
    s, first = tl.program_id(0) // (D // F), tl.program_id(0) % (D // F) * F
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    d, c = tl.arange(0, D), first + tl.arange(0, F)
    U = tl.zeros([F, D], tl.float32)
    total = tl.zeros([F, 16], tl.float32)  # 16 equal columns: the narrowest product there is
    ones = tl.full([ROWS, 16], 1.0, tl.float32).to(WORK)
    for start in tl.range(0, N, ROWS, num_stages=STAGES):
        x = k.load([b, s, start, g, first]).reshape(ROWS, F)
        y = v.load([b, s, start, g, 0]).reshape(ROWS, D)
        f = sigma(x.to(tl.float32), FEATURES)
        if not EVEN:
            f = tl.where(start + tl.arange(0, ROWS)[:, None] < N, f, 0.0)
        f_high, f_low = halves(f, WORK)
        f_high, f_low = tl.trans(f_high), tl.trans(f_low)
        if NATIVE:
            y_high, y_low = halves(y.to(tl.float32), WORK)
        else:
            y_high, y_low = y, y
        U = dot3(f_high, f_low, y_high, y_low, U, LOW > 0, NATIVE, WORK)
        total = dot3(f_high, f_low, ones, ones, total, LOW > 0, False, WORK)
    slot = (b.to(tl.int64) * P + s + 1) * G + g
    tl.store(M + slot * D * D + c[:, None] * D + d[None, :], U)
    tl.store(z + slot * D + c, tl.sum(total, 1) / 16)


@triton.jit
def overlap_kernel(
    k, z, A, N, G, P, plane,
    D: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr, FEATURES: tl.constexpr,
    WORK: tl.constexpr, SPLIT: tl.constexpr, LOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A_s = sum_t sigma(K_t) sigma(K_t)^T / (sigma(K_t) z_{s-1}) (D, D), symmetric; 0 where nothing is known.

    With x_t = sigma(K_t) / sqrt(norm_t) it is X^T X, so one product of unlike halves serves for both: A is
    the symmetric part of high^T high + 2 high^T low. k: a descriptor in blocks of ROWS x D.
    """
    s, b, g, d = tl.program_id(0), tl.program_id(1) // G, tl.program_id(1) % G, tl.arange(0, D)
    wide = b.to(tl.int64)
    known = tl.load(z + ((wide * P + s) * G + g) * D + d)[None, :]
    half = tl.zeros([D, D], tl.float32)
    for start in tl.range(0, N, ROWS, num_stages=STAGES):
        x = k.load([b, s, start, g, 0]).reshape(ROWS, D)
        f = sigma(x.to(tl.float32), FEATURES)
        norm = tl.sum(f * known, 1)[:, None]
        keep = norm > EPS
        if not EVEN:
            keep = keep & (start + tl.arange(0, ROWS)[:, None] < N)
        f = f * tl.where(keep, tl.rsqrt(tl.where(keep, norm, 1.0)), 0.0)
        high = f.to(WORK)
        if LOW > 0:
            twice = (2 * (f - high.to(tl.float32))).to(WORK)
            half = dot(tl.trans(high), twice, half, WORK)
        half = dot(tl.trans(high), high, half, WORK)
    if LOW > 0:
        half = (half + tl.trans(half)) * 0.5
    A += ((wide * (P - 1) + s) * G + g) * D * D + d[:, None] * D + d[None, :]
    high, low = halves(half, WORK)
    tl.store(A, high)
    if SPLIT:
        tl.store(A + plane, low)


def sums(k: Tensor, v: Tensor, M: Tensor, z: Tensor, features: str) -> None:
    """Fills slots 1.. of M (B, P, G, D, D) and z (B, P, G, D) with what segments 0..P-2 of k and v add."""
    batch, _, n, groups, size = k.shape
    t, slots = shape("sums", size, k.dtype), M.shape[1]
    some = max(size // t.parts, 16)
    sums_kernel[((slots - 1) * (size // some), batch * groups)](
        described(k, t.rows, some), described(v, t.rows, size), M, z, n, groups, slots,
        D=size, F=some, ROWS=t.rows, EVEN=n % t.rows == 0, FEATURES=features, LOW=t.low, STAGES=t.stages,
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
        described(k, t.rows, size), z, A, n, groups, slots, A[0].numel(),
        D=size, ROWS=t.rows, EVEN=n % t.rows == 0, FEATURES=features, WORK=number(k)["WORK"],
        SPLIT=len(A) > 1, LOW=t.low, STAGES=t.stages, num_warps=t.warps, maxnreg=t.regs,
    )  # fmt: skip
    return A
