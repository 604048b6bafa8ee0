"""Exact attention over the own segment and a few cached ones: block, Transformer-XL, sliding window, sinks.

Transformer-XL here is the one of the paper's Table 2 (Memorizing Transformers, arXiv 2203.08913): the keys
and values of the previous segment are cached, not differentiated, and read with rotary positions that go on
across the border. Nothing is stored rotated: cached keys are raw and rotated anew at their distance.

The cache keeps the model's dtype: it holds copies of activations, not sums, so float32 would add no digit.

Shapes: B batch, S segments, N segment length, Q queries, C cached segments, K keys that a segment reads,
A sinks, H heads, G KV heads, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from infini_bench.memory.base import Memory, Rope, State, attend, rotate
from infini_bench.memory.blocks import Blocks, Count
from infini_bench.schema import MemoryConfig


class WindowMemory(Memory):
    """Softmax attention over C cached segments and the own one.

    ``block``: C = 0, nothing crosses a boundary. ``xl``: C = 1, gradients stop at the cache (dk + dv) G N l
    floats (Table 1, row Transformer-XL). ``sliding``: a query sees the last W tokens, itself included, with
    gradients; C = ceil((W - 1) / N), and whole segments are cached, so the state is rounded up to C N tokens.
    """

    steady = True

    def __init__(self, cfg: MemoryConfig, heads: int, kv_heads: int, head_dim: int):
        super().__init__(cfg, heads, kv_heads, head_dim)
        self.window = (cfg.window or 2 * cfg.segment) if cfg.kind in ("sliding", "sink") else None
        self.differentiable = cfg.kind in ("sliding", "sink")
        self.previous = -(-(self.window - 1) // cfg.segment) if self.window else int(cfg.kind != "block")
        self.front = self.previous * cfg.segment  # key slots before the own segment's
        self.settled: int = self.previous  # age from which all segments share one mask
        self.has_memory = self.previous > 0

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

    def chain(self, past_BCNGD: Tensor, own_BSKGD: Tensor, full: Count) -> tuple[Tensor, Tensor]:
        """Cached and own entries of every segment (B, S, C*N+K, G, D), and the cache after the call."""
        whole = own_BSKGD.shape[2] == self.segment
        chain = torch.cat([past_BCNGD, own_BSKGD], 1) if whole else past_BCNGD
        windows = chain.unfold(1, self.previous, 1).movedim(-1, 2)[:, : own_BSKGD.shape[1]]
        earlier = windows if self.differentiable else windows.detach()
        return torch.cat([earlier.flatten(2, 3), own_BSKGD], 2), self.last(chain, full)

    def read(self, b: Blocks, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """Attention over cached and own keys (B, S, K, G, D), whose positions go on: (B, S, Q, H, D)."""
        q = rotate(b.q_BSQHD, rope, b.slots, self.front)
        return self.masked(b, q, rotate(k, rope, range(k.shape[2])), v)

    def masked(self, b: Blocks, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention over those of the K keys that are ``visible``."""
        slots = b.slot_tensor()
        if not isinstance(b.done, int):
            mask = self.visible(slots, k.shape[2], b.ages()[..., None, None])
            return attend(q, k, v, mask.flatten(0, 1)[:, None], False)
        # only the first segments of a document miss some keys; all others share one small mask
        first = min(max(self.settled - b.done, 0), q.shape[1])
        parts = [slice(s, s + 1) for s in range(first)] + [slice(first, None)] * (first < q.shape[1])
        masks = [self.visible(slots, k.shape[2], b.done + part.start) for part in parts]
        outs = [attend(q[:, p], k[:, p], v[:, p], m, False) for p, m in zip(parts, masks, strict=True)]
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)

    def visible(self, slots: Tensor, n_keys: int, ages: Count) -> Tensor:
        """Keys not later, inside the window and inside the document: bool (Q, K) or (B, S, Q, K).

        ages: segments finished before, of one segment or of each, broadcastable to the result.
        """
        k_slot = torch.arange(n_keys, device=slots.device)
        q_slot = (slots if slots.dim() == 1 else slots[:, None])[..., None] + self.front
        seen = (k_slot <= q_slot) & (k_slot >= self.dead(ages))
        return seen if self.window is None else seen & (q_slot - k_slot < self.window)

    def dead(self, ages: Count) -> Count:
        """Key slots, from the first, that lie before the document's start: as ``ages``."""
        return (self.previous - ages) * self.segment

    def last(self, chain_BCNGD: Tensor, full: Count) -> Tensor:
        """The C segments before the boundary ``full``: (B, C, N, G, D)."""
        if isinstance(full, int):
            return chain_BCNGD[:, full : full + self.previous]
        index = full[:, None] + torch.arange(self.previous, device=full.device)
        return chain_BCNGD[torch.arange(chain_BCNGD.shape[0], device=full.device)[:, None], index]


class SinkMemory(WindowMemory):
    """Attention sinks (StreamingLLM, arXiv 2309.17453): the document's first A tokens beside the window.

    A query sees the last W tokens, itself included, and those of the first A that have left this window, so
    none is counted twice. Positions are those inside a cache of A + W tokens: up to A + W - 1 a distance is
    the true one, and from then on a sink's stays what it was, however long the document. Sinks and window
    are differentiated, as in ``sliding``.

    State: the sliding window's whole cached segments, and the raw ``sink_k``, ``sink_v`` (B, A, G, D).
    """

    def __init__(self, cfg: MemoryConfig, heads: int, kv_heads: int, head_dim: int):
        super().__init__(cfg, heads, kv_heads, head_dim)
        self.width = cfg.window or 2 * cfg.segment
        self.furthest = cfg.sinks + self.width - 1  # distance to sink 0 where it stops to grow
        self.settled = -(-self.furthest // cfg.segment)

    @property
    def span(self) -> int:
        return max((self.previous + 1) * self.segment, self.furthest + 1)

    def state_floats(self) -> int:
        return super().state_floats() + 2 * self.head_dim * self.kv_heads * self.cfg.sinks

    def start(self, k_BTGD: Tensor) -> State:
        batch, _, groups, size = k_BTGD.shape
        empty = k_BTGD.new_zeros(batch, self.cfg.sinks, groups, size)
        return {**super().start(k_BTGD), "sink_k": empty, "sink_v": empty}

    def segments(self, b: Blocks, carry: State, rope: Rope) -> tuple[Tensor, State]:
        new: State = {}
        keys = []
        for name, own in (("k", b.k_BSKGD), ("v", b.v_BSKGD)):
            sinks = new[f"sink_{name}"] = self.sinks(carry[f"sink_{name}"], own[:, 0], b.done)
            near, new[f"past_{name}"] = self.chain(carry[f"past_{name}"], own, b.full)
            keys.append(torch.cat([sinks[:, None].expand(-1, own.shape[1], -1, -1, -1), near], 2))
        k, v = keys
        return self.read(b, k, v, rope) if self.enabled else self.local(b, rope), new

    def sinks(self, kept_BAGD: Tensor, first_BKGD: Tensor, done: Count) -> Tensor:
        """The first A entries of the document, zeros for those to come; ``first``: of the call's segment."""
        own = first_BKGD[:, : self.cfg.sinks]
        own = F.pad(own, (0, 0, 0, 0, 0, self.cfg.sinks - own.shape[1]))
        if isinstance(done, int):
            return kept_BAGD if done else own.clone()
        return torch.where((done > 0).view(-1, 1, 1, 1), kept_BAGD, own)

    def read(self, b: Blocks, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """Attention over sinks, cached and own keys: (B, S, A+C*N+K, G, D) -> (B, S, Q, H, D).

        Each query has one position for the window and one for the sinks. Both fit in one softmax: queries
        [q_window, q_sink] of size 2D meet keys [k, 0] in the window and [0, k] at the sinks.
        """
        sinks = self.cfg.sinks
        near = rotate(b.q_BSQHD, rope, b.slots, self.front)
        far = rotate(b.q_BSQHD, rope, self.places(b).clamp(max=self.furthest))
        size = self.head_dim
        k = torch.cat(
            [
                F.pad(rotate(k[:, :, :sinks], rope, range(sinks)), (size, 0)),
                F.pad(rotate(k[:, :, sinks:], rope, range(k.shape[2] - sinks)), (0, size)),
            ],
            2,
        )
        return self.masked(b, torch.cat([near, far], -1) * 2**0.5, k, v)  # scaled by 1 / sqrt(2D) inside

    def places(self, b: Blocks) -> Tensor:
        """Position in the document of every query: (1 or B, S, Q)."""
        slots = b.slot_tensor()
        slots = slots if slots.dim() == 1 else slots[:, None]
        places = b.ages()[..., None] * self.segment + slots
        return places if places.dim() == 3 else places[None]

    def visible(self, slots: Tensor, n_keys: int, ages: Count) -> Tensor:
        """As in the window, after the A sinks, which are visible once they have left it."""
        near = super().visible(slots, n_keys - self.cfg.sinks, ages)
        place = (slots if slots.dim() == 1 else slots[:, None])[..., None] + ages * self.segment
        far = place - torch.arange(self.cfg.sinks, device=slots.device) >= self.width
        return torch.cat([far, near], -1)
