"""The contract that every memory keeps: tokens + state -> outputs + state.

* Any cut of a document into calls, down to single tokens, gives the outputs of one call.
* No output depends on a later token; rows of a batch never mix; padding is never written.
* States are values: a call returns a new one and leaves the given one as it was, so a state can be kept,
  compared, saved, or differentiated through. Only `decoding`, ``inside`` a segment, writes into its own.
* What crosses a segment boundary is ``state_floats()``, and tests count it on live tensors.

Shapes: B batch, T tokens, S segments, N segment length, H heads, G KV heads, D head size.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infini_bench.errors import UserError
from infini_bench.memory.blocks import Blocks, Slots, cut, cut_one, cut_ragged
from infini_bench.schema import MemoryConfig

State = dict[str, Any]  # tensors with the batch first, and counts (int, or (B,) tensor where rows differ)
Rope = tuple[Tensor, Tensor]


def rotate(x_BSNHD: Tensor, rope: Rope, slots: Slots, front: int = 0) -> Tensor:
    """Rotary position embedding (halves convention) at positions ``front`` + ``slots``: a range or (N,), the
    same for all rows, or, with S = 1, (B, N)."""
    if isinstance(slots, range):  # taken without a copy, which in each layer would cost a GPU a launch
        cos, sin = (t[:, front + slots.start : front + slots.stop, None] for t in rope)
    else:
        cos, sin = (t[0, slots + front if front else slots][..., None, :] for t in rope)
        if slots.dim() == 2:
            cos, sin = cos[:, None], sin[:, None]
    first, second = x_BSNHD.chunk(2, -1)
    return x_BSNHD * cos + torch.cat([-second, first], -1) * sin


class ContiguousGradient(torch.autograd.Function):
    """The identity, whose gradient arrives contiguous.

    torch 2.11 keeps cuDNN's plan of attention's backward pass, its choice on an H100 or H200, by the layouts
    of queries, keys, values and mask. The gradient of outputs is then read by the strides that the first one
    had. These differ between compiled layers, and between models of one process: a view of a matrix
    product's result here, a tensor of its own where a layer mixes its outputs there. One would be read far
    beyond its end, the other at wrong places.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        return dx.contiguous()


def attend(q_BSQHD: Tensor, k_BSKGD: Tensor, v_BSKGD: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Softmax attention inside each segment (Eq. 6 with sqrt(D), as every implementation): (B, S, Q, H, D).

    mask: bool, broadcastable to (B * S, 1, Q, K); True = visible.
    """
    n_seg, groups = q_BSQHD.shape[1], q_BSQHD.shape[3] != k_BSKGD.shape[3]
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q_BSQHD, k_BSKGD, v_BSKGD))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=groups)
    out = out.transpose(1, 2)
    return (ContiguousGradient.apply(out) if out.requires_grad else out).unflatten(0, (-1, n_seg))


def forms(model: nn.Module) -> list[str]:
    """The forms in which the memories of ``model`` were computed, see `Memory.form`."""
    return sorted({layer.form for layer in model.modules() if isinstance(layer, Memory) and layer.form})


class Memory(nn.Module):
    """Base of the memories of one attention layer.

    A subclass says how many earlier segments its rotary table spans (``previous``), what crosses a segment
    boundary (``start``, ``state_floats``) and what one call computes (``segments``).
    """

    previous = 0
    has_memory = True  # False: nothing crosses a segment boundary, or nothing is ever left behind
    form: str | None = None  # that computed the last call, where there are several, and why
    auxiliary: Tensor | None = None  # what the last training call adds to the loss, summed over its tokens
    differentiable = True  # False: what crosses a boundary is not differentiated, by design
    steady = False  # True: ``segments`` heeds `cut_one`, whose slots beyond the last token are unused
    # Segments done from which on their number changes nothing; None: it always may, or ``seen`` does.
    settled: int | None = None

    def __init__(self, cfg: MemoryConfig, heads: int, kv_heads: int, head_dim: int):
        super().__init__()
        self.cfg, self.heads, self.kv_heads, self.head_dim = cfg, heads, kv_heads, head_dim
        self.segment = cfg.segment
        self.enabled = True

    @property
    def span(self) -> int | None:
        """Length of the rotary table that ``forward`` needs; None = the document so far."""
        return (self.previous + 1) * self.segment

    def reset_parameters(self) -> None:
        """Set the memory's own parameters, if it has any, to their start; called under no_grad."""

    def penalise(self, k_BTGD: Tensor, mask_BT: Tensor | None) -> None:
        """Leave in ``auxiliary`` what writing a call's own keys adds to the training loss, if anything."""

    @abstractmethod
    def start(self, k_BTGD: Tensor) -> State:
        """What crosses the boundary into a document's first segment, on the keys' device."""

    @abstractmethod
    def segments(self, blocks: Blocks, carry: State, rope: Rope) -> tuple[Tensor, State]:
        """Outputs (B, S, Q, H, D) of the call's segments, and what crosses the last boundary it completes."""

    @abstractmethod
    def state_floats(self) -> int:
        """Floats of one row that cross a segment boundary in this layer (Table 1, H replaced by G)."""

    def forward(
        self,
        q_BTHD: Tensor,
        k_BTGD: Tensor,
        v_BTGD: Tensor,
        rope: Rope,
        state: State | None = None,
        mask_BT: Tensor | None = None,
        inside: bool = False,
    ) -> tuple[Tensor, State]:
        """Attention of one layer over one call.

        q_BTHD, k_BTGD, v_BTGD: projections before any position embedding. rope: cos and sin, (1, span, D).
        mask_BT: bool, False = padding; None = no padding. inside: the call is as `cut_one` has it, and the
        state as `MemoryCache.spread`; its keys and values are written in place. Returns outputs (B, T, H, D)
        and the new state.
        """
        self.penalise(k_BTGD, mask_BT)
        if state is None:
            begin = self.start(k_BTGD)
            self.must(isinstance(begin, dict), "start", "a dict of tensors")
            state = {**begin, "done": 0, "seen": 0}
        done, seen = state["done"], state["seen"]
        assert isinstance(seen, int)
        rest = (state["k"], state["v"], state["fill"]) if "k" in state else None
        if mask_BT is None and not isinstance(done, int) and not inside:
            mask_BT = torch.ones(q_BTHD.shape[:2], dtype=torch.bool, device=q_BTHD.device)
        if inside:
            assert rest is not None
            blocks = cut_one(q_BTHD, k_BTGD, v_BTGD, rest, done)
        elif mask_BT is None:
            blocks = cut(q_BTHD, k_BTGD, v_BTGD, rest, done, self.segment)
        else:
            blocks = cut_ragged(q_BTHD, k_BTGD, v_BTGD, rest, done, mask_BT, self.segment)
        result = self.segments(blocks, state, rope)
        pair = isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)
        self.must(pair, "segments", "outputs and a dict of tensors")
        out, carry = result
        if inside:  # what crosses a border is as it was
            return blocks.join(out), {**state, "fill": blocks.left, "seen": seen + 1}
        k, v = blocks.rest()
        counts = {"fill": blocks.left, "done": blocks.done + blocks.full, "seen": seen + q_BTHD.shape[1]}
        return blocks.join(out), {**carry, "k": k, "v": v, **counts}

    def must(self, holds: bool, method: str, what: str) -> None:
        """Raises UserError, with the place, where a subclass's ``method`` has not returned ``what``."""
        if not holds:
            code = getattr(type(self), method).__code__
            place = f"{Path(code.co_filename).name}, line {code.co_firstlineno}"
            raise UserError(f"{type(self).__name__}.{method} must return {what} ({place}).")

    def local(self, b: Blocks, rope: Rope) -> Tensor:
        """Causal attention inside the own segment only: (B, S, Q, H, D)."""
        own = range(b.k_BSKGD.shape[2])
        q, k = rotate(b.q_BSQHD, rope, b.slots), rotate(b.k_BSKGD, rope, own)
        if isinstance(b.slots, range) and (b.slots == own or len(b.slots) == 1):
            return attend(q, k, b.v_BSKGD, None, b.slots == own)  # one token sees all keys there are
        slots = b.slot_tensor()
        mask = torch.arange(len(own), device=slots.device) <= slots[..., None]
        return attend(q, k, b.v_BSKGD, mask if mask.dim() == 2 else mask[:, None], False)
