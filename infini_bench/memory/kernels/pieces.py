"""What the Triton kernels share: feature maps, and matrix products whose operands keep float32's bits.

Tensor cores take bfloat16 operands. A float32 block x is fed to them as x = high + low + e, both bfloat16,
|e| <= 2^-17 |x|; leaving out ``low`` rounds it to 2^-9. Native bfloat16 inputs need no ``low``.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

EPS: tl.constexpr = tl.constexpr(1e-6)  # floor of the normaliser, as in compressive.py
INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def sigma(x, FEATURES: tl.constexpr):
    """Feature map of a float32 block; NaN stays NaN."""
    if FEATURES == "elu1":
        y = tl.where(x > 0, x + 1, tl.exp(x))
    elif FEATURES == "relu2":
        y = tl.where(x < 0, 0.0, x * x)
    else:
        tl.static_assert(FEATURES == "exp")
        y = tl.exp(tl.where(x > 20, 16.0, x - 4))
    return y


@triton.jit
def slope(x, y, FEATURES: tl.constexpr):
    """sigma'(x), where y = sigma(x)."""
    if FEATURES == "elu1":
        y = tl.where(x > 0, 1.0, y)
    elif FEATURES == "relu2":
        y = tl.where(x < 0, 0.0, 2 * x)
    else:
        y = tl.where(x > 20, 0.0, y)
    return y


@triton.jit
def halves(x, WORK: tl.constexpr):
    """high and low of a float32 block, in the dtype of the matrix products."""
    high = x.to(WORK)
    return high, (x - high.to(tl.float32)).to(WORK)


@triton.jit
def pair(x, WORK: tl.constexpr):
    """A column (n, 1) as (n, 16): high, low, zeros. No product is narrower; sum the result's columns."""
    high, low = halves(x, WORK)
    side = tl.arange(0, 16)[None, :]
    return tl.where(side == 0, high.to(tl.float32), tl.where(side == 1, low.to(tl.float32), 0.0)).to(WORK)


@triton.jit
def dot(a, b, acc, WORK: tl.constexpr):
    """acc + a b, accumulated in float32."""
    if tl.float32 == WORK:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    elif INTERPRETED:  # its matrix product does not know bfloat16
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def dot3(a, a_low, b, b_low, acc, LOW_A: tl.constexpr, LOW_B: tl.constexpr, WORK: tl.constexpr):
    """acc + (a + a_low) (b + b_low) without the product of both lows; a ``low`` that is off is not read."""
    if LOW_A:
        acc = dot(a_low, b, acc, WORK)
    if LOW_B:
        acc = dot(a, b_low, acc, WORK)
    return dot(a, b, acc, WORK)


@triton.jit
def product(a, a_low, b, b_low, LOW_A: tl.constexpr, LOW_B: tl.constexpr, WORK: tl.constexpr):
    """``dot3`` from zero."""
    return dot3(a, a_low, b, b_low, tl.zeros([a.shape[0], b.shape[1]], tl.float32), LOW_A, LOW_B, WORK)


@triton.jit
def load(base, at, rows, LIMIT, EVEN: tl.constexpr):
    """A block (ROWS, D) at offsets ``at`` from a scalar pointer; rows (ROWS, 1) from LIMIT on read zero."""
    return tl.load(base + at) if EVEN else tl.load(base + at, mask=rows < LIMIT, other=0.0)


@triton.jit
def store(base, at, x, rows, LIMIT, EVEN: tl.constexpr):
    if EVEN:
        tl.store(base + at, x.to(base.dtype.element_ty))
    else:
        tl.store(base + at, x.to(base.dtype.element_ty), mask=rows < LIMIT)


@triton.jit
def keep(at, plane, x, WORK: tl.constexpr, SPLIT: tl.constexpr):
    """Stores a float32 block as its halves, the low one ``plane`` elements behind; whole unless SPLIT."""
    high, low = halves(x, WORK)
    tl.store(at, high)
    if SPLIT:
        tl.store(at + plane, low)


@triton.jit
def kept(at, plane, SPLIT: tl.constexpr):
    """What ``keep`` has stored; ``low`` is not to be read unless SPLIT."""
    high = tl.load(at)
    return high, tl.load(at + plane) if SPLIT else high


def described(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Blocks of rows x columns of one head of x (B, S, N, H, D) for the copy engine, which spares a program
    the registers of addresses; rows from N on read zero. It asks for strides and an address in multiples of
    16 bytes: x is copied where it has others."""
    if x.stride(-1) != 1 or x.data_ptr() % 16 or any(s * x.element_size() % 16 for s in x.stride()[:-1]):
        x = x.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor(x, [*x.shape], [*x.stride()], [1, 1, rows, 1, columns])


def strides(*tensors: Tensor) -> list[int]:
    """Strides of batch, segment, token and head of tensors (B, S, N, H, D), whose last axis is dense."""
    for x in tensors:
        assert x.stride(-1) == 1, x.stride()
    return [s for x in tensors for s in x.stride()[:4]]


def dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def number(x: Tensor) -> dict[str, Any]:
    """Dtype of the matrix products for inputs of x's dtype, and whether those inputs have a ``low``."""
    if x.dtype == torch.float32:
        return {"WORK": tl.float32, "NATIVE": False}
    return {"WORK": tl.bfloat16, "NATIVE": x.dtype != torch.bfloat16}
