"""From what each segment adds to the memory before every segment, and gradients the same way back.

Linear: a running sum over slots. Delta: x_{i+1} = x_i - A_i x_i + u_i; columns of x are independent, so a program
holds some of them and walks. Many segments are walked in two levels: all groups of about sqrt(S) segments at once
as [L | I - P] from [0 | I], so that x_end = P x_start + L; the groups' ends one after another by the same rule with
A = I - P and u = L; then inside all groups at once from the known starts: 3 sqrt(S) steps in a row, not S.

The way back is the same walk from the last slot, because A is symmetric.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from infini_bench.memory.kernels.pieces import INTERPRETED
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
    A, x, y, start, last, S, G, C,
    D: tl.constexpr, COLUMNS: tl.constexpr, BACK: tl.constexpr, SUMMARY: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Steps [j C, j C + C) of the walk over S steps, for COLUMNS columns.

    A (B, S, G, D, D), x and y (B, S + 1, G, D, D). Step i reads A[i], adds x[i + 1] and writes y[i + 1]; BACK
    mirrors all indices. It starts from start (B, groups + 1, G, D, D)[j]. SUMMARY starts from [0 | I], writes L
    into start[j + 1] and I - P into last (B, groups, G, D, D)[j], and nothing into y.
    """
    j, g, b = tl.program_id(0), tl.program_id(1) % G, (tl.program_id(1) // G).to(tl.int64)
    groups = tl.num_programs(0)
    f, c = tl.arange(0, D)[:, None], tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tile, inner = f * D + tl.arange(0, D)[None, :], f * D + c % D
    start += ((b * (groups + 1) + j) * G + g) * D * D + inner
    jump = G * D * D
    from_zero = False
    if SUMMARY:
        state = tl.where((c >= D) & (f == c - D), 1.0, 0.0)
        from_zero = tl.program_id(2) * COLUMNS >= D  # the columns of P: nothing is added to them
    else:
        state = tl.load(start)
    first = (b * (S + 1) + (S if BACK else 0)).to(tl.int64) * jump + g * D * D
    if not SUMMARY:
        if j == 0:
            tl.store(y + first + inner, state)
    way = -1 if BACK else 1
    for i in tl.range(j * C, tl.minimum(j * C + C, S), num_stages=STAGES):
        a = tl.load(A + (b * S + (S - 1 - i if BACK else i)) * jump + g * D * D + tile)
        slot = first + way * (i + 1) * jump + inner
        add = tl.load(x + slot, mask=(c < D) & (not from_zero), other=0.0)
        state = state + add - tl.dot(a, state, input_precision="tf32x3")
        if not SUMMARY:
            tl.store(y + slot, state)
    if SUMMARY:
        if from_zero:
            tl.store(last + ((b * groups + j) * G + g) * D * D + inner, tl.where(f == c - D, 1.0, 0.0) - state)
        else:
            tl.store(start + jump, state)


def scan(x: Tensor, back: bool = False, out: Tensor | None = None) -> Tensor:
    """Running sum of x (B, P, ...) float32 over P, from the end if ``back``; ``out`` may be x itself."""
    x = x.contiguous()
    out = torch.empty_like(x) if out is None else out
    size = x[0, 0].numel()
    items = 128 if size < 1 << 18 else 512
    scan_kernel[(triton.cdiv(size, items), x.shape[0])](
        x, out, x.shape[1], size, ITEMS=items, BACK=back, STAGES=1 if INTERPRETED.value else 8, num_warps=4
    )
    return out


def walk(A: Tensor, x: Tensor, back: bool = False, out: Tensor | None = None) -> Tensor:
    """y of ``walk_kernel`` from y[0] = x[0] (the last slot if ``back``); ``out`` may be x itself."""
    x = x.contiguous()
    out = torch.empty_like(x) if out is None else out
    batch, steps, groups, size = A.shape[:4]
    if steps == 0:
        return out.copy_(x)
    t = shape("walk", size, torch.bfloat16)
    columns = min(t.rows, size)
    begin = x[:, -1 if back else 0]

    def launch(A, x, y, start, last, each, parts, back, summary):
        wide = 2 * size if summary else size
        walk_kernel[(parts, batch * groups, wide // columns)](
            A, x, y, start, last, A.shape[1], groups, each,
            D=size, COLUMNS=columns, BACK=back, SUMMARY=summary, STAGES=t.stages, num_warps=t.warps,
        )  # fmt: skip

    each = steps if steps <= ONE_LEVEL else round(steps**0.5)
    parts = -(-steps // each)
    starts = x.new_empty(batch, parts + 1, groups, size, size)
    starts[:, 0] = begin
    if parts > 1:
        ends = x.new_empty(batch, parts, groups, size, size)
        launch(A, x, x, starts, ends, each, parts, back, True)
        launch(ends, starts, starts, begin[:, None].expand(-1, 2, -1, -1, -1).contiguous(), ends, parts, 1, False, False)
    launch(A, x, out, starts, starts, each, parts, back, False)
    return out
