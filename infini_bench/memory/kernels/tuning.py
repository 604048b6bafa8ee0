"""Block shapes and precision of each kernel by head size.

rows: tokens a block. loop: blocks a program walks. low: which float32 operands keep their low half
(``pieces``): 0 none, 1 the features, 2 the memory's matrices too. One rounded operand leaves bfloat16 outputs
within 1.5 times their own rounding; results that stay float32 (M; gradients of the gate, M and z) allow none.
warps and stages are Triton's; a block of 16 rows a warp lets Triton compute every row once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Shape:
    rows: int = 64
    warps: int = 4
    stages: int = 2
    loop: int = 8
    low: int = 1
    regs: int | None = None  # registers a thread at most, so that more programs fit a multiprocessor
    parts: int = 1  # sums: programs that share a segment's features


SHAPES: dict[str, dict[int, Shape]] = {
    "sums": {64: Shape(64, 4, 3), 128: Shape(32, 4, 4, parts=2)},
    "overlap": {64: Shape(64, 4, 3, regs=96), 128: Shape(64, 8, 3, regs=128)},
    "walk": {64: Shape(64, 4, 3), 128: Shape(64, 8, 2)},  # rows: columns of M a program holds
    "solve": {64: Shape(warps=4), 128: Shape(warps=4)},
    "chunks": {64: Shape(64, 4, 2), 128: Shape(128, 8, 2)},  # rows: as of walk
    "tokens_backward": {64: Shape(64, 4, 1), 128: Shape(64, 4, 1)},  # rows: columns of M at a time
    "read": {64: Shape(64, 4, 3), 128: Shape(64, 4, 3)},
    "read_backward": {64: Shape(64, 4, 2, low=2), 128: Shape(64, 8, 2, low=2)},
    "outer": {64: Shape(warps=4), 128: Shape(warps=8)},
    "overlap_backward": {64: Shape(64, 4, 2, low=2), 128: Shape(64, 8, 2, low=2)},
    "write_backward": {64: Shape(64, 4, 2, 8, low=2), 128: Shape(64, 4, 2, 8, low=2)},
}


def shape(kernel: str, size: int, dtype: torch.dtype) -> Shape:
    """The entry of the next head size. float32 inputs take twice the space, so half the rows."""
    found = SHAPES[kernel][64 if size <= 64 else 128]
    if dtype == torch.float16:
        return replace(found, low=2)  # eleven bits need both halves of everything
    if dtype == torch.float32:
        return replace(found, rows=max(found.rows // 2, 16), warps=8, stages=1, low=0, regs=None)
    return found
