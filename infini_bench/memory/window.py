"""Exact attention over the own segment and a few cached ones: block, Transformer-XL, sliding window.

Transformer-XL here is the one of the paper's Table 2 (Memorizing Transformers, arXiv 2203.08913): the keys
and values of the previous segment are cached, not differentiated, and read with rotary positions that go on
across the border. Nothing is stored rotated: cached keys are raw and rotated anew at their distance.

The cache keeps the model's dtype: it holds copies of activations, not sums, so float32 would add no digit.

Shapes: B batch, S segments, N segment length, Q queries, C cached segments, H heads, G KV heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infini_bench.memory.base import Memory, Rope, State, attend, rotate
from infini_bench.memory.blocks import Blocks
from infini_bench.schema import MemoryConfig


class WindowMemory(Memory):
    """Softmax attention over C cached segments and the own one.

    ``block``: C = 0, nothing crosses a boundary. ``xl``: C = 1, gradients stop at the cache (dk + dv) G N l
    floats (Table 1, row Transformer-XL). ``sliding``: a query sees the last W tokens, itself included, with
    gradients; C = ceil((W - 1) / N), and whole segments are cached, so the state is rounded up to C N tokens.
    """

    def __init__(self, cfg: MemoryConfig, heads: int, kv_heads: int, head_dim: int):
        super().__init__(cfg, heads, kv_heads, head_dim)
        self.window = (cfg.window or 2 * cfg.segment) if cfg.kind == "sliding" else None
        self.previous = {"block": 0, "xl": 1, "knn": 1}.get(
            cfg.kind, -(-((self.window or 1) - 1) // cfg.segment)
        )
        self.has_memory = self.previous > 0
        self.differentiable = cfg.kind == "sliding"

    def state_floats(self) -> int:
        return 2 * self.head_dim * self.kv_heads * self.segment * self.previous

    def start(self, k_BTGD: Tensor) -> State:
        if not self.previous:
            return {}
        batch, _, groups, size = k_BTGD.shape
        empty = k_BTGD.new_zeros(batch, self.previous, self.segment, groups, size)
        return {"past_k": empty, "past_v": empty}

    def segments(self, b: Blocks, carry: State, rope: Rope) -> tuple[Tensor, State]:
        if not self.previous:
            return self.local(b, rope), {}
        k, past_k = self.chain(carry["past_k"], b.k_BSKGD, b.full)
        v, past_v = self.chain(carry["past_v"], b.v_BSKGD, b.full)
        out = self.read(b, k, v, rope) if self.enabled else self.local(b, rope)
        return out, {"past_k": past_k, "past_v": past_v}

    def chain(self, past_BCNGD: Tensor, own_BSKGD: Tensor, full: int | Tensor) -> tuple[Tensor, Tensor]:
        """Cached and own entries of every segment (B, S, C*N+K, G, D), and the cache after the call."""
        whole = own_BSKGD if own_BSKGD.shape[2] == self.segment else past_BCNGD[:, :0]
        chain = torch.cat([past_BCNGD, whole], 1)
        windows = chain.unfold(1, self.previous, 1).movedim(-1, 2)[:, : own_BSKGD.shape[1]]
        earlier = windows.detach() if self.cfg.kind in ("xl", "knn") else windows
        return torch.cat([earlier.flatten(2, 3), own_BSKGD], 2), self.last(chain, full)

    def read(self, b: Blocks, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """Attention over cached and own keys (B, S, C*N+K, G, D): (B, S, Q, H, D)."""
        q = rotate(b.q_BSQHD, rope, b.slots + self.previous * self.segment)
        k = rotate(k, rope, torch.arange(k.shape[2], device=k.device))
        missing = self.previous - b.ages()  # cached segments that lie before the document's start
        if not isinstance(b.done, int):
            mask = self.visible(b.slots, k.shape[2], missing[..., None, None])
            return attend(q, k, v, mask.flatten(0, 1)[:, None], False)
        # only the first segments of a document miss some; all others share one small mask
        first = min(max(self.previous - b.done, 0), q.shape[1])
        parts = [slice(s, s + 1) for s in range(first)] + [slice(first, None)] * (first < q.shape[1])
        masks = [self.visible(b.slots, k.shape[2], missing[part][:1]) for part in parts]
        return torch.cat(
            [attend(q[:, p], k[:, p], v[:, p], m, False) for p, m in zip(parts, masks, strict=True)], 1
        )

    def visible(self, slots: Tensor, n_keys: int, missing: Tensor) -> Tensor:
        """Keys not later, inside the window and inside the document: bool (Q, K) or (B, S, Q, K)."""
        k_slot = torch.arange(n_keys, device=slots.device)
        q_slot = (slots if slots.dim() == 1 else slots[:, None])[..., None] + self.previous * self.segment
        seen = (k_slot <= q_slot) & (k_slot >= missing * self.segment)
        return seen if self.window is None else seen & (q_slot - k_slot < self.window)

    def last(self, chain_BCNGD: Tensor, full: int | Tensor) -> Tensor:
        """The C segments before the boundary ``full``: (B, C, N, G, D)."""
        if isinstance(full, int):
            return chain_BCNGD[:, full : full + self.previous]
        index = full[:, None] + torch.arange(self.previous, device=full.device)
        return chain_BCNGD[torch.arange(chain_BCNGD.shape[0], device=full.device)[:, None], index]
