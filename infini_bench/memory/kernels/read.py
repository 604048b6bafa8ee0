"""Reading the memory and mixing with the local attention (Eq. 7, 10), forward and backward.

out = c (sigma(Q) M) + (1 - gate) A_dot with c = gate / (sigma(Q) z), gate = 0 in a document's first segment.
Backward, with w = dO M^T (one product serves all): sigma(Q) M dO = sigma(Q) w, hence
    d sigma(Q) = c w - c (sigma(Q) w) / norm z        dM = sum_t (c sigma(Q))^T dO
    d gate = sum_t sigma(Q) w / norm - dO A_dot       dz = sum_t -c (sigma(Q) w) / norm sigma(Q)
and the forward's numerator is not needed again. Without z (UNIT) the features' norm |sigma(Q)| stands for
sigma(Q) z, and sigma(Q) / |sigma(Q)|, its derivative, for z.
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
    pair,
    product,
    sigma,
    slope,
    store,
    strides,
)
from infini_bench.memory.kernels.tuning import shape


@triton.jit
def read_kernel(
    q, local, gate, M, z, out, Q, H, R, P, done,
    qb, qs, qn: tl.constexpr, qh, lb, ls, ln: tl.constexpr, lh,
    ob, os, on: tl.constexpr, oh,
    D: tl.constexpr, ROWS: tl.constexpr, LOOP: tl.constexpr, EVEN: tl.constexpr, FEATURES: tl.constexpr,
    UNIT: tl.constexpr, WORK: tl.constexpr, LOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs of ROWS * LOOP queries of one head and segment; M is read once for all of them."""
    parts = tl.cdiv(Q, ROWS * LOOP)
    s, begin = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts * ROWS * LOOP
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    n, d = tl.arange(0, ROWS)[:, None], tl.arange(0, D)
    q += b * qb + s * qs + h * qh
    local += b * lb + s * ls + h * lh
    out += b * ob + s * os + h * oh
    slot = (b * P + s) * (H // R) + h // R
    share = tl.where(s + done > 0, tl.load(gate + h), 0.0)
    if not UNIT:
        known = pair(tl.load(z + slot * D + d)[:, None], WORK)
    m_high, m_low = halves(tl.load(M + slot * D * D + d[:, None] * D + d[None, :]), WORK)
    for start in tl.range(begin, tl.minimum(begin + ROWS * LOOP, Q), ROWS, num_stages=STAGES):
        x = load(q, start * qn + n * qn + d[None, :], start + n, Q, EVEN).to(tl.float32)
        near = load(local, start * ln + n * ln + d[None, :], start + n, Q, EVEN).to(tl.float32)
        f = sigma(x, FEATURES)
        f_high, f_low = halves(f, WORK)
        if UNIT:
            norm = tl.sqrt(tl.sum(f * f, 1))
        else:
            norm = tl.sum(product(f_high, f_low, known, known, LOW > 0, False, WORK), 1)
        far = product(f_high, f_low, m_high, m_low, LOW > 0, LOW > 1, WORK)
        far = far * (share / tl.maximum(norm, EPS))[:, None] + (1 - share) * near
        store(out + start * on, n * on + d[None, :], far, start + n, Q, EVEN)


@triton.jit
def read_backward_kernel(
    q, local, grad, gate, M, z, dq, dlocal, dgate, dM, dz, S, Q, H, R, P, done,
    qb, qs, qn: tl.constexpr, qh, lb, ls, ln: tl.constexpr, lh,
    ob, os, on: tl.constexpr, oh, eb, es, en: tl.constexpr, eh, fb, fs, fn: tl.constexpr, fh,
    D: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr, FEATURES: tl.constexpr, UNIT: tl.constexpr,
    WORK: tl.constexpr, NATIVE: tl.constexpr, LOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All queries of a segment that read one KV head: their gradients, and theirs to M and z before it.

    dgate: (B, S, H) float32, this segment's part. Slots of dM and dz that no segment reads get zeros.
    """
    s, G = tl.program_id(0).to(tl.int64), H // R
    b, g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    n, d = tl.arange(0, ROWS)[:, None], tl.arange(0, D)
    q += b * qb + s * qs
    local += b * lb + s * ls
    grad += b * ob + s * os
    dq += b * eb + s * es
    dlocal += b * fb + s * fs
    slot = (b * P + s) * G + g
    tile = slot * D * D + d[:, None] * D + d[None, :]
    if not UNIT:
        known = tl.load(z + slot * D + d)[None, :]
    m_high, m_low = halves(tl.load(M + tile), WORK)
    to_M = tl.zeros([D, D], tl.float32)  # transposed: dO then comes straight from shared memory
    to_z = tl.zeros([ROWS, D], tl.float32)
    if s < S:
        for r in range(R):
            h = g * R + r
            share = tl.where(s + done > 0, tl.load(gate + h), 0.0)
            to_gate = tl.zeros([ROWS], tl.float32)
            for start in tl.range(0, Q, ROWS, num_stages=STAGES):
                rows = start + n
                do = load(grad + start * on + h * oh, n * on + d[None, :], rows, Q, EVEN)
                near = load(local + start * ln + h * lh, n * ln + d[None, :], rows, Q, EVEN).to(tl.float32)
                do_wide = do.to(tl.float32)
                to_gate -= tl.sum(do_wide * near, 1)
                store(dlocal + start * fn + h * fh, n * fn + d[None, :], (1 - share) * do_wide, rows, Q, EVEN)
                if NATIVE:
                    do_high, do_low = halves(do_wide, WORK)
                else:
                    do_high, do_low = do, do
                w = product(do_high, do_low, tl.trans(m_high), tl.trans(m_low), NATIVE, LOW > 1, WORK)
                x = load(q + start * qn + h * qh, n * qn + d[None, :], rows, Q, EVEN).to(tl.float32)
                f = sigma(x, FEATURES)
                norm = tl.sqrt(tl.sum(f * f, 1)) if UNIT else tl.sum(f * known, 1)
                inverse = 1 / tl.maximum(norm, EPS)
                if UNIT:
                    known = f * inverse[:, None]
                far = tl.sum(f * w, 1) * inverse  # dO A_mem
                to_gate += far
                c = (share * inverse)[:, None]
                far = tl.where(norm > EPS, -far, 0.0)[:, None]
                change = c * (w + far * known) * slope(x, f, FEATURES)
                store(dq + start * en + h * eh, n * en + d[None, :], change, rows, Q, EVEN)
                if not UNIT:
                    to_z += c * far * f
                f_high, f_low = halves(c * f, WORK)
                to_M = dot3(tl.trans(do_high), tl.trans(do_low), f_high, f_low, to_M, NATIVE, LOW > 0, WORK)
            tl.store(dgate + (b * S + s) * H + h, tl.where(s + done > 0, tl.sum(to_gate, 0), 0.0))
    tl.store(dM + tile, tl.trans(to_M))
    if not UNIT:
        tl.store(dz + slot * D + d, tl.sum(to_z, 0))


def read(q: Tensor, local: Tensor, gate: Tensor, M: Tensor, z: Tensor, done: int, features: str) -> Tensor:
    """Outputs (B, S, Q, H, D) in q's dtype: see ``ops.read``."""
    batch, segments, queries, heads, size = q.shape
    t, out = shape("read", size, q.dtype), torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q, local = dense(q), dense(local)
    parts = triton.cdiv(queries, t.rows * t.loop)
    read_kernel[(segments * parts, batch * heads)](
        q, local, gate, M, z, out, queries, heads, heads // M.shape[2], M.shape[1], done,
        *strides(q, local, out),
        D=size, ROWS=t.rows, LOOP=t.loop, EVEN=queries % t.rows == 0, FEATURES=features, LOW=t.low,
        UNIT=z.shape[-1] == 0, STAGES=t.stages, num_warps=t.warps, maxnreg=t.regs, WORK=number(q)["WORK"],
    )  # fmt: skip
    return out


def read_backward(
    grad: Tensor, q: Tensor, local: Tensor, gate: Tensor, M: Tensor, z: Tensor, done: int, features: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, local, gate, M and z."""
    batch, segments, queries, heads, size = q.shape
    t, slots, groups = shape("read_backward", size, q.dtype), M.shape[1], M.shape[2]
    q, local, grad = dense(q), dense(local), dense(grad)
    dq, dlocal = torch.empty_like(q), torch.empty_like(local)
    dM, dz = torch.empty_like(M), torch.empty_like(z)
    dgate = gate.new_empty(batch, segments, heads)
    read_backward_kernel[(slots, batch * groups)](
        q, local, grad, gate, M, z, dq, dlocal, dgate, dM, dz,
        segments, queries, heads, heads // groups, slots, done, *strides(q, local, grad, dq, dlocal),
        D=size, ROWS=t.rows, EVEN=queries % t.rows == 0, FEATURES=features, LOW=t.low, STAGES=t.stages,
        UNIT=z.shape[-1] == 0, num_warps=t.warps, maxnreg=t.regs, **number(q),
    )  # fmt: skip
    return dq, dlocal, dgate.sum((0, 1)), dM, dz
