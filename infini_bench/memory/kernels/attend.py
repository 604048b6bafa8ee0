"""Local attention, the read of the memory and the gate in one kernel: A_dot never leaves the registers.

Causal softmax attention inside each segment (Eq. 6) as in FlashAttention (arXiv 2205.14135): blocks of keys
pass by, while maximum, sum and accumulator of a block of queries stay. The memory's queries are raw, those of
the attention carry their positions, so both are inputs. Then, as in ``read.py``,
    out = gate (sigma(Q) M) / (sigma(Q) z) + (1 - gate) A_dot,  gate = 0 in a document's first segment.
For a backward pass it also writes A_dot and the log-sum-exp that torch's own backward of attention asks for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from infini_bench.memory.kernels.pieces import (
    EPS,
    dense,
    described,
    dot,
    dot3,
    fetch,
    halves,
    load,
    number,
    sigma,
    store,
    strides,
)
from infini_bench.memory.kernels.tuning import shape

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def passing(
    x, k, v, acc, top, total, begin, end, row, N, SCALE, b, s, g, kn: tl.constexpr, vn: tl.constexpr,
    D: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr,
    STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The keys [begin, end) pass by: accumulator, maximum (of log2) and sum after them."""
    c, d = tl.arange(0, COLUMNS)[:, None], tl.arange(0, D)[None, :]
    for start in tl.range(begin, end, COLUMNS, num_stages=STAGES):
        key = fetch(k, start * kn + c * kn + d, start + c, N, EVEN, b, s, start, g, 0, D, TMA)
        score = dot(x, tl.trans(key), tl.zeros([x.shape[0], COLUMNS], tl.float32), x.dtype)
        if MASKED:
            score = tl.where(row >= start + tl.trans(c), score, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1) * SCALE)
        p = tl.exp2(score * SCALE - new[:, None])
        fade = tl.exp2(top - new)
        total = total * fade + tl.sum(p, 1)
        value = fetch(v, start * vn + c * vn + d, start + c, N, EVEN, b, s, start, g, 0, D, TMA)
        acc = dot(p.to(x.dtype), value, acc * fade[:, None], x.dtype)
        top = new
    return acc, top, total


@triton.jit
def attend_kernel(
    q, k, v, raw, gate, M, z, out, local, lse, N, H, R, P, S, done, SCALE,
    qb, qs, qn: tl.constexpr, qh, kb, ks, kn: tl.constexpr, kh, vb, vs, vn: tl.constexpr, vh,
    rb, rs, rn: tl.constexpr, rh, ob, os, on: tl.constexpr, oh,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr, FEATURES: tl.constexpr,
    WORK: tl.constexpr, LOW: tl.constexpr, KEEP: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Outputs of ROWS queries of one head and segment, the most expensive block of a segment first.

    Heads that share keys, and blocks that do, follow one another. local: as out; lse: (B, S, H, N).
    """
    parts = tl.cdiv(N, ROWS)
    pair, b = tl.program_id(0) // parts, tl.program_id(1).to(tl.int64)
    s, h, begin = (pair // H).to(tl.int64), pair % H, (parts - 1 - tl.program_id(0) % parts) * ROWS
    n, d = tl.arange(0, ROWS)[:, None], tl.arange(0, D)
    rows = begin + n
    x = load(q + b * qb + s * qs + h * qh, rows * qn + d[None, :], rows, N, EVEN)
    acc, total = tl.zeros([ROWS, D], tl.float32), tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    g = h // R
    if not TMA:
        k += b * kb + s * ks + g * kh
        v += b * vb + s * vs + g * vh
    acc, top, total = passing(
        x,
        k,
        v,
        acc,
        top,
        total,
        0,
        begin,
        rows,
        N,
        SCALE,
        b,
        s,
        g,
        kn,
        vn,
        D,
        COLUMNS,
        True,
        False,
        STAGES,
        TMA,
    )
    end = tl.minimum(begin + ROWS, N)
    acc, top, total = passing(
        x,
        k,
        v,
        acc,
        top,
        total,
        begin,
        end,
        rows,
        N,
        SCALE,
        b,
        s,
        g,
        kn,
        vn,
        D,
        COLUMNS,
        EVEN,
        True,
        STAGES,
        TMA,
    )
    near = acc / total[:, None]
    to = b * ob + s * os + h * oh
    if KEEP:
        store(local + to, rows * on + d[None, :], near, rows, N, EVEN)
        at = lse + ((b * S + s) * H + h) * N + begin + tl.arange(0, ROWS)
        tl.store(at, (top + tl.log2(total)) / LOG2E, mask=begin + tl.arange(0, ROWS) < N)
    slot = (b * P + s) * (H // R) + g
    share = tl.where(s + done > 0, tl.load(gate + h), 0.0)
    known = tl.load(z + slot * D + d)[None, :]
    m_high, m_low = halves(tl.load(M + slot * D * D + d[:, None] * D + d[None, :]), WORK)
    f = load(raw + b * rb + s * rs + h * rh, rows * rn + d[None, :], rows, N, EVEN)
    f = sigma(f.to(tl.float32), FEATURES)
    norm = tl.sum(f * known, 1)
    f_high, f_low = halves(f * (share / tl.maximum(norm, EPS))[:, None], WORK)
    both = dot3(f_high, f_low, m_high, m_low, (1 - share) * near, LOW > 0, LOW > 1, WORK)
    store(out + to, rows * on + d[None, :], both, rows, N, EVEN)


def attend(
    q: Tensor, k: Tensor, v: Tensor, raw: Tensor, gate: Tensor, M: Tensor, z: Tensor,
    done: int, features: str, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Outputs (B, S, N, H, D); with ``keep`` A_dot and its log-sum-exp (B, S, H, N) too, else nothing."""
    batch, segments, n, heads, size = q.shape
    t = shape("attend", size, q.dtype)
    q, k, v, raw = dense(q), dense(k), dense(v), dense(raw)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    local = torch.empty_like(out) if keep else out.new_empty(0)
    lse = q.new_empty(batch, segments, heads, n, dtype=torch.float32) if keep else gate.new_empty(0)
    blocks = described(t.columns, size, k, v) if t.tma else None
    attend_kernel[(segments * heads * triton.cdiv(n, t.rows), batch)](
        q, *(blocks or (k, v)), raw, gate, M, z, out, local, lse, n, heads, heads // k.shape[3], M.shape[1],
        segments, done, LOG2E.value * size**-0.5, *strides(q, k, v, raw, out),
        D=size, ROWS=t.rows, COLUMNS=t.columns, EVEN=n % t.rows == 0, FEATURES=features, LOW=t.low, KEEP=keep,
        STAGES=t.stages, TMA=blocks is not None, num_warps=t.warps, maxnreg=t.regs, WORK=number(q)["WORK"],
    )  # fmt: skip
    return out, local, lse
