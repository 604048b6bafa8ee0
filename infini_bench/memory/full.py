"""Full causal attention over the whole document: the upper bound, with a state that grows.

Shapes: B batch, T tokens of the call, P tokens before it, H heads, G KV heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from infini_bench.memory.base import Memory, Rope, State, attend, rotate
from infini_bench.memory.blocks import Blocks


class FullMemory(Memory):
    """Softmax attention over everything, at absolute rotary positions.

    State: rotated keys and values of all tokens, (dk + dv) G floats a token; nothing is compressed, so there
    is no memory to switch off. ``valid`` and ``count`` appear once padding or a row reset makes rows differ.
    """

    has_memory = False
    span = None

    def state_floats(self) -> int:
        return 2 * self.head_dim * self.kv_heads * self.segment  # of each segment so far

    def start(self, k_BTGD: Tensor) -> State:
        return {}

    def segments(self, blocks: Blocks, carry: State, rope: Rope) -> tuple[Tensor, State]:
        raise RuntimeError("full attention has no segments")

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
        """As ``Memory.forward``; it is not ``steady``, so nothing is ever ``inside``."""
        state = {"seen": 0, "done": 0} if state is None else state
        if mask_BT is None and isinstance(state["done"], int):
            return self.even(q_BTHD, k_BTGD, v_BTGD, rope, state)
        if mask_BT is None:
            mask_BT = torch.ones(q_BTHD.shape[:2], dtype=torch.bool, device=q_BTHD.device)
        return self.ragged(q_BTHD, k_BTGD, v_BTGD, rope, state, mask_BT)

    def even(self, q: Tensor, k: Tensor, v: Tensor, rope: Rope, state: State) -> tuple[Tensor, State]:
        """All rows at the same position: one causal call, without a mask tensor of the sequence's length."""
        seen = state["seen"]
        assert isinstance(seen, int)
        slots = range(seen, seen + q.shape[1])
        q, k = rotate(q[:, None], rope, slots), rotate(k[:, None], rope, slots)[:, 0]
        q, k = q.to(v.dtype), k.to(v.dtype)  # as autocast would, which a mask without tensor passes by
        if seen:
            k, v = torch.cat([state["past_k"], k], 1), torch.cat([state["past_v"], v], 1)
        new = {"past_k": k, "past_v": v, "seen": k.shape[1], "done": 0}
        mask = causal_lower_right(q.shape[2], k.shape[1]) if seen and q.shape[2] > 1 else None
        return attend(q, k[:, None], v[:, None], mask, seen == 0)[:, 0], new

    def ragged(
        self, q: Tensor, k: Tensor, v: Tensor, rope: Rope, state: State, mask_BT: Tensor
    ) -> tuple[Tensor, State]:
        """Rows at different positions: padding keeps its column but is never visible."""
        batch, seen = q.shape[0], state["seen"]
        assert isinstance(seen, int)
        before = torch.ones(batch, seen, dtype=torch.bool, device=q.device)
        count = torch.full((batch,), seen, device=q.device)
        before, count = state.get("valid", before), state.get("count", count)
        slots = (count[:, None] + mask_BT.cumsum(1) - 1).clamp(min=0)
        q, k = rotate(q[:, None], rope, slots), rotate(k[:, None], rope, slots)[:, 0]
        q, k = q.to(v.dtype), k.to(v.dtype)
        if seen:
            k, v = torch.cat([state["past_k"], k], 1), torch.cat([state["past_v"], v], 1)
        valid = torch.cat([before, mask_BT], 1)
        column = torch.arange(k.shape[1], device=q.device)
        own = column[seen:, None]
        visible = (column <= own) & valid[:, None] | (column == own)  # padding sees itself: no empty softmax
        out = attend(q, k[:, None], v[:, None], visible[:, None], False)[:, 0]
        count = count + mask_BT.sum(1)
        new: State = {"past_k": k, "past_v": v, "valid": valid, "count": count, "seen": k.shape[1]}
        return out, {**new, "done": count * 0}
