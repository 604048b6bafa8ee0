"""Writing a segment key by key (delta_token, arXiv 2406.06484), forward: the segments' maps M -> P M + U.

With unit-norm features K and strengths w of a chunk of at most 64 keys, M before it becomes, after it,
    M + K^T E,   E = L (w (V - K M)),   L = (I + tril(w K K^T, -1))^-1,
because E's rows solve e_t = w_t (v_t - k_t (M + sum_{j<t} k_j^T e_j)). ``solve`` finds all chunks' K, L and w
at once; ``chunks`` goes through a segment's chunks, for blocks of columns of M apart, from three kinds of
starts: from [0 | I] to U and P, for the walk over segments; from the memory before the segment to that before
every chunk; and back, from the gradient T of the memory after the segment to that after every chunk,
    T - K^T w L^T K T.
The last two are what the gradients of keys and values need (``tokens_backward``). K, L and the states are
halves of float32 (``pieces``): an error in one chunk's map is carried through all chunks after it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from infini_bench.memory.kernels.pieces import (
    EPS,
    dense,
    dot,
    dot3,
    halves,
    keep,
    kept,
    load,
    number,
    product,
    sigma,
    strides,
)
from infini_bench.memory.kernels.tuning import shape

CHUNK = 64  # keys whose triangular system is solved at once


class Solved(NamedTuple):
    """K (planes, B, S, G, C, CHUNK, D) and L (planes, B, S, G, C, CHUNK, CHUNK), as halves or float32 itself;
    w (B, S, G, C, CHUNK) float32, 0 behind the segment's last key."""

    K: Tensor
    L: Tensor
    w: Tensor


@triton.jit
def unit(x, FEATURES: tl.constexpr):
    """sigma(x), 1 / its norm and the norm, of every row."""
    f = sigma(x, FEATURES)
    norm = tl.sqrt(tl.sum(f * f, 1))
    return f, 1 / tl.maximum(norm, EPS), norm


@triton.jit
def solve_kernel(
    k, gate, K, L, w, N, G, C, plane, plane_L,
    kb, ks, kn: tl.constexpr, kh,
    D: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr, FEATURES: tl.constexpr, GATED: tl.constexpr,
    WORK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """``Solved`` of one chunk of ROWS keys.

    The diagonal blocks of 16 are inverted row by row, all at once, into I_D. What is between them, B, then
    makes X = I_D B nilpotent, of at most four blocks: L = (I + X)^-1 I_D = (I - X) (I + X^2) I_D.
    """
    s, chunk = (tl.program_id(0) // C).to(tl.int64), tl.program_id(0) % C
    b, g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    n, d, m = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, ROWS)
    rows = chunk * ROWS + n[:, None]
    x = load(k + b * kb + s * ks + g * kh, rows * kn + d[None, :], rows, N, EVEN).to(tl.float32)
    f, inverse, _ = unit(x, FEATURES)
    p = tl.where(chunk * ROWS + n < N, 1.0, 0.0)
    if GATED:
        gate += g * (D + 1)
        p /= 1 + tl.exp(-tl.sum(x * tl.load(gate + d)[None, :], 1) - tl.load(gate + D))
    at = ((b * (tl.num_programs(0) // C) + s) * G + g) * C + chunk
    tl.store(w + at * ROWS + n, p)
    f = f * inverse[:, None]
    keep(K + at * ROWS * D + n[:, None] * D + d[None, :], plane, f, WORK, SPLIT)
    high = f.to(WORK)
    overlap = tl.zeros([ROWS, ROWS], tl.float32)
    if SPLIT:
        overlap = dot(high, tl.trans((2 * (f - high.to(tl.float32))).to(WORK)), overlap, WORK)
    overlap = dot(high, tl.trans(high), overlap, WORK)
    overlap = (overlap + tl.trans(overlap)) * 0.5  # of high high^T + 2 high low^T
    below = tl.where(n[:, None] > m[None, :], p[:, None] * overlap, 0.0)

    i, r, c = tl.arange(0, ROWS // 16), tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    on = i[:, None, None, None] == i[None, None, :, None]
    block = tl.sum(tl.where(on, below.reshape(ROWS // 16, 16, ROWS // 16, 16), 0.0), 2)
    solved = tl.where(r == c, 1.0, block * 0.0)
    for j in range(15):
        known = tl.sum(tl.where(r == j, solved, 0.0), 1)
        solved -= tl.sum(tl.where(c == j, block, 0.0), 2)[:, :, None] * known[:, None, :]
    solved = tl.where(on, solved[:, :, None, :], 0.0).reshape(ROWS, ROWS)
    if ROWS > 16:
        i_high, i_low = halves(solved, WORK)
        b_high, b_low = halves(tl.where(n[:, None] // 16 > m[None, :] // 16, below, 0.0), WORK)
        x_high, x_low = halves(product(i_high, i_low, b_high, b_low, SPLIT, SPLIT, WORK), WORK)
        y_high, y_low = halves(product(x_high, x_low, x_high, x_low, SPLIT, SPLIT, WORK), WORK)
        solved += product(y_high, y_low, i_high, i_low, SPLIT, SPLIT, WORK)
        i_high, i_low = halves(solved, WORK)
        solved -= product(x_high, x_low, i_high, i_low, SPLIT, SPLIT, WORK)
    keep(L + at * ROWS * ROWS + n[:, None] * ROWS + m[None, :], plane_L, solved, WORK, SPLIT)


@triton.jit
def chunks_kernel(
    K, L, w, v, x, y, N, G, C, plane, plane_L, plane_y,
    vb, vs, vn: tl.constexpr, vh,
    D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, MAP: tl.constexpr, BACK: tl.constexpr,
    WORK: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns through the chunks of a segment, from x (B, S + 1, G, D, D) float32.

    From slot s of x to the state before every chunk, into y (B, S, G, C, D, D) as halves, transposed; BACK,
    from slot s + 1 to the gradient after every chunk. MAP: from [0 | I] to [U | P], U into slot s + 1 of x
    and I - P into y (B, S, G, D, D) as halves. All is computed transposed: what one product leaves in
    registers is then the next one's left operand, and does not pass through shared memory.
    """
    BLOCKS: tl.constexpr = (2 * D if MAP else D) // COLUMNS  # neighbours, to share K and L
    s, segments = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.num_programs(0) // BLOCKS
    b, g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    first = tl.program_id(0) % BLOCKS * COLUMNS
    n, f, m = tl.arange(0, ROWS)[:, None], tl.arange(0, D)[None, :], tl.arange(0, ROWS)[None, :]
    column = first + tl.arange(0, COLUMNS)[:, None]
    inner = f * D + column % D
    at = (b * segments + s) * G + g
    slot = ((b * (segments + 1) + s) * G + g) * D * D
    ours = first < D  # and not the columns of P, to which nothing is added
    K += at * C * ROWS * D + n * D + f
    L += at * C * ROWS * ROWS + n * ROWS + m
    w += at * C * ROWS + m
    v += b * vb + s * vs + g * vh + column % D
    if MAP:
        state = tl.where(f == column - D, 1.0, 0.0)
    else:
        state = tl.load(x + slot + (G * D * D if BACK else 0) + inner)
        y += at * C * D * D + column * D + f
    for i in tl.range(0, C if MAP else C - 1, num_stages=STAGES):
        j = C - 1 - i if BACK else i
        if not MAP:
            keep(y + j * D * D, plane_y, state, WORK, SPLIT)
        key, key_low = kept(K + j * ROWS * D, plane, SPLIT)
        solved, solved_low = kept(L + j * ROWS * ROWS, plane_L, SPLIT)
        p = tl.load(w + j * ROWS)
        high, low = halves(state, WORK)
        e = -product(high, low, tl.trans(key), tl.trans(key_low), SPLIT, SPLIT, WORK)
        if BACK:
            high, low = halves(e, WORK)
            e = p * product(high, low, solved, solved_low, SPLIT, SPLIT, WORK)
        else:
            row = j * ROWS + m
            e += tl.load(v + row * vn, mask=tl.where(ours, row, N) < N, other=0.0).to(tl.float32)
            high, low = halves(p * e, WORK)
            e = product(high, low, tl.trans(solved), tl.trans(solved_low), SPLIT, SPLIT, WORK)
        high, low = halves(e, WORK)
        state = dot3(high, low, key, key_low, state, SPLIT, SPLIT, WORK)
    if not MAP:
        keep(y + (0 if BACK else C - 1) * D * D, plane_y, state, WORK, SPLIT)
    elif ours:
        tl.store(x + slot + G * D * D + inner, state)
    else:
        keep(y + at * D * D + inner, plane_y, tl.where(f == column - D, 1.0, 0.0) - state, WORK, SPLIT)


def solve(k: Tensor, gate: Tensor, segments: int, features: str) -> Solved:
    """The chunks of the first ``segments`` segments of raw keys k (B, S, N, G, D); gate: u and c of every KV
    head (G, D + 1) float32, or (G, 0) where all strengths are 1."""
    batch, _, n, groups, size = k.shape
    k, gate, t = dense(k), gate.contiguous(), shape("solve", size, k.dtype)
    rows = min(CHUNK, max(16, triton.next_power_of_2(n)))
    count = triton.cdiv(n, rows)
    planes, dtype = (1, torch.float32) if k.dtype == torch.float32 else (2, torch.bfloat16)
    each = batch, segments, groups, count, rows
    K, L = (torch.empty(planes, *each, x, dtype=dtype, device=k.device) for x in (size, rows))
    w = torch.empty(each, dtype=torch.float32, device=k.device)
    solve_kernel[(segments * count, batch * groups)](
        k, gate, K, L, w, n, groups, count, K[0].numel(), L[0].numel(), *strides(k),
        D=size, ROWS=rows, EVEN=n % rows == 0, FEATURES=features, GATED=gate.shape[1] > 0, SPLIT=planes > 1,
        WORK=number(k)["WORK"], num_warps=t.warps, maxnreg=t.regs,
    )  # fmt: skip
    return Solved(K, L, w)


def _chunks(x: Solved, v: Tensor, start: Tensor, y: Tensor, form: str) -> None:
    _, batch, segments, groups, count, rows, size = x.K.shape
    v, t = dense(v), shape("chunks", size, x.K.dtype)
    columns = min(t.rows, size)
    chunks_kernel[(segments * ((2 if form == "map" else 1) * size // columns), batch * groups)](
        *x, v, start, y, v.shape[2], groups, count, x.K[0].numel(), x.L[0].numel(), y[0].numel(), *strides(v),
        D=size, COLUMNS=columns, ROWS=rows, MAP=form == "map", BACK=form == "back", SPLIT=len(x.K) > 1,
        WORK=number(x.K)["WORK"], STAGES=t.stages, num_warps=t.warps, maxnreg=t.regs,
    )  # fmt: skip


def maps(x: Solved, v: Tensor, M: Tensor, A: Tensor) -> None:
    """Fills slots 1.. of M (B, P, G, D, D) with U and A (planes, B, P-1, G, D, D) with I - P."""
    _chunks(x, v, M, A, "map")


def states(x: Solved, v: Tensor, M: Tensor, back: bool = False) -> Tensor:
    """The memory before every chunk, (planes, B, P-1, G, C, D, D) as halves, each transposed, from that of
    every slot, M (B, P, G, D, D); or, ``back``, the gradient after every chunk from that of every slot. It
    takes D / 32 times the bytes of bfloat16 keys."""
    planes, *each, _, size = x.K.shape
    y = x.K.new_empty(planes, *each, size, size)
    _chunks(x, v, M.contiguous(), y, "back" if back else "states")
    return y
