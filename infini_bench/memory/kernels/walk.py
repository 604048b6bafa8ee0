"""From what each segment adds to the memory before every segment, and gradients the same way back.

Linear: a running sum over slots. Delta: x_{i+1} = x_i - A_i x_i + u_i; columns of x are independent, so a
program holds some of them and walks. Many segments are walked in two levels: groups of about sqrt(S) segments
all at once from [0 | I] to [L | P], so that x_end = P x_start + L; the groups' ends one after another by the
same rule with A = I - P and u = L; then inside all groups at once from the starts: 3 sqrt(S) steps, not S.

The way back is the same walk from the last slot, with A^T for A.
"""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from infini_bench.memory.kernels.pieces import INTERPRETED, halves, number, product
from infini_bench.memory.kernels.tuning import shape

ONE_LEVEL = 24  # steps that are walked in a row before two levels pay


@triton.jit
def scan_kernel(
    x, y, P, SIZE, ITEMS: tl.constexpr, BACK: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """y[p] = sum of x[..p], or of x[p..] with BACK: (B, P, SIZE) each."""
    i = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    offset = tl.program_id(1).to(tl.int64) * P * SIZE
    step = SIZE
    if BACK:
        offset += (P - 1).to(tl.int64) * SIZE
        step = -SIZE
    x += offset + i
    y += offset + i
    acc = tl.zeros([ITEMS], tl.float32)
    for _ in tl.range(0, P, num_stages=STAGES):
        acc += tl.load(x, mask=i < SIZE, other=0.0)
        tl.store(y, acc, mask=i < SIZE)
        x += step
        y += step


@triton.jit
def walk_kernel(
    A, x, y, start, last, S, G, C, plane,
    D: tl.constexpr, COLUMNS: tl.constexpr, BACK: tl.constexpr, SUMMARY: tl.constexpr,
    WORK: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Steps [j C, j C + C) of the walk over S steps, for COLUMNS columns.

    A (B, S, G, D, D) as halves, the low one ``plane`` elements behind; x and y (B, S + 1, G, D, D) float32.
    Step i reads A[i], adds x[i + 1] and writes y[i + 1]; BACK mirrors all indices, and takes A^T. It starts
    from start[j], start (B, groups + 1, G, D, D). SUMMARY starts from [0 | I] and writes no y, but L into
    start[j + 1] and I - P into last[j], last (B, groups, G, D, D) as halves.
    """
    j, g, b = tl.program_id(0).to(tl.int64), tl.program_id(1) % G, (tl.program_id(1) // G).to(tl.int64)
    groups = tl.num_programs(0)
    f, c = tl.arange(0, D)[:, None], tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tile, inner = f * D + tl.arange(0, D)[None, :], f * D + c % D
    jump = G * D * D
    start += (b * (groups + 1) + j) * jump + g * D * D
    ours = (tl.program_id(2) + 1) * COLUMNS <= D  # and not the columns of P, to which nothing is added
    if SUMMARY:
        state = tl.where(f == c - D, 1.0, 0.0)
    else:
        state = tl.load(start + inner)
        if j == 0:
            tl.store(y + (b * (S + 1) + (S if BACK else 0)) * jump + g * D * D + inner, state)
    for i in tl.range(j * C, tl.minimum(j * C + C, S), num_stages=STAGES):
        step = A + (b * S + (S - 1 - i if BACK else i)) * jump + g * D * D
        high = tl.load(step + tile)
        low = tl.load(step + plane + tile) if SPLIT else high
        slot = (b * (S + 1) + (S - 1 - i if BACK else i + 1)) * jump + g * D * D
        add = tl.load(x + slot + inner, mask=tl.where(ours, c, D) < D, other=0.0)
        s_high, s_low = halves(state, WORK)
        if BACK:
            high, low = tl.trans(high), tl.trans(low)
        state = state + add - product(high, low, s_high, s_low, SPLIT, SPLIT, WORK)
        if not SUMMARY:
            tl.store(y + slot + inner, state)
    if SUMMARY:
        if ours:
            tl.store(start + jump + inner, state)
        else:
            last += (b * groups + j) * jump + g * D * D
            high, low = halves(tl.where(f == c - D, 1.0, 0.0) - state, WORK)
            tl.store(last + inner, high)
            if SPLIT:
                tl.store(last + groups * plane // S + inner, low)


def scan(x: Tensor, back: bool = False, out: Tensor | None = None) -> Tensor:
    """Running sum of x (B, P, ...) float32 over P, from the end if ``back``; ``out`` may be x itself."""
    x = x.contiguous()
    out = torch.empty_like(x) if out is None else out
    size = prod(x.shape[2:])
    items = 128 if size < 1 << 18 else 512
    scan_kernel[(triton.cdiv(size, items), x.shape[0])](
        x, out, x.shape[1], size, ITEMS=items, BACK=back, STAGES=1 if INTERPRETED.value else 8, num_warps=4
    )
    return out


def walk(A: Tensor, x: Tensor, back: bool = False, out: Tensor | None = None) -> Tensor:
    """y of ``walk_kernel`` from y[0] = x[0] (the last slot if ``back``); ``out`` may be x itself.

    A: (1 or 2, B, S, G, D, D), the halves of float32, or float32 itself. ``back`` takes A^T.
    """
    x = x.contiguous()
    out = torch.empty_like(x) if out is None else out
    _, batch, steps, groups, size, _ = A.shape
    t = shape("walk", size, A.dtype)
    columns = min(t.rows, size)

    def launch(A, x, y, start, last, each, parts, back, summary):
        walk_kernel[(parts, batch * groups, (1 + summary) * size // columns)](
            A, x, y, start, last, A.shape[2], groups, each, A[0].numel(),
            D=size, COLUMNS=columns, BACK=back, SUMMARY=summary, SPLIT=A.shape[0] > 1, STAGES=t.stages,
            num_warps=t.warps, maxnreg=t.regs, WORK=number(A)["WORK"],
        )  # fmt: skip

    each = steps if steps <= ONE_LEVEL else round(steps**0.5)
    parts = -(-steps // each)
    starts = x.new_empty(batch, parts + 1, groups, size, size)
    starts[:, 0] = x[:, -1 if back else 0]
    if parts > 1:
        ends = A.new_empty(A.shape[0], batch, parts, groups, size, size)
        launch(A, x, x, starts, ends, each, parts, back, True)
        begin = torch.stack([starts[:, 0]] * 2, 1)
        launch(ends, starts, starts, begin, ends, parts, 1, False, False)
    launch(A, x, out, starts, A, each, parts, back, False)
    return out
