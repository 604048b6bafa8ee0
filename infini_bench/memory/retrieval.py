"""Top-k retrieval over all earlier keys: Unlimiformer (arXiv 2305.01625) for a decoder without an encoder.

In every layer, head and query, one softmax over
* the local window: the own segment up to the query and the whole segment before it, at true distances;
* the ``neighbours`` keys with the largest scores among all older ones, at one distance, 2N, the first that
  the window never has.

Keys are stored as they come, before any position, and the query is turned by 2N: R_2N q . k ranks what
attention will weigh, so that one index serves all positions, and a rotary table of 2N + 1 entries suffices
for any length. With ``neighbours`` at least the number of older keys, this is full attention whose distances
are clipped at 2N.

Nothing is learned and nothing is compressed: a pretrained decoder takes it without training, and trained on
documents of at most 2N tokens it computes what a model with a window of two segments does. Gradients flow
through what was chosen, not through the choice. The search is exact and reads every key for every query: time
grows with the square of the document, and the state by (dk + dv) G floats a token. With ``searching`` off
only the window is read and all keys are kept, as Unlimiformer encodes: time then grows with the length.

Shapes: B batch, S segments, N segment length, Q queries, K keys of a segment, P keys before a segment, C of
them before the window, W keys of the window, H heads, G KV heads, R = H / G, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infini_bench.memory.base import Memory, Rope, State, rotate
from infini_bench.memory.blocks import Blocks
from infini_bench.memory.knn import SCORES, keep, largest
from infini_bench.schema import MemoryConfig


class RetrievalMemory(Memory):
    """A window of one cached segment and the own one, and the best of all older keys.

    State: ``mem_k``, ``mem_v`` (B, P, G, D), raw, of all finished segments, newest last; ``stored``: how many
    of them are live in each row.
    """

    previous = 1
    searching = True  # False: only the window is read, of what is fed meanwhile

    def __init__(self, cfg: MemoryConfig, heads: int, kv_heads: int, head_dim: int):
        super().__init__(cfg, heads, kv_heads, head_dim)
        self.far = 2 * cfg.segment  # distance at which everything older stands

    @property
    def span(self) -> int:
        return self.far + 1

    def state_floats(self) -> int:
        return 2 * self.head_dim * self.kv_heads * self.segment  # of each segment so far

    def start(self, k_BTGD: Tensor) -> State:
        return {"mem_k": k_BTGD[:, :0], "mem_v": k_BTGD[:, :0], "stored": 0}

    def segments(self, b: Blocks, carry: State, rope: Rope) -> tuple[Tensor, State]:
        old_k, old_v, stored = carry["mem_k"], carry["mem_v"], carry["stored"]
        n_seg, before = b.q_BSQHD.shape[1], old_k.shape[1]
        state = {"mem_k": old_k, "mem_v": old_v, "stored": stored}  # while no segment ends, nothing is copied
        k, v = old_k, old_v
        if n_seg > 1 or not isinstance(b.full, int) or b.full:
            k, v = (torch.cat([x, y.flatten(1, 2)], 1) for x, y in ((k, b.k_BSKGD), (v, b.v_BSKGD)))
            state = keep(k, v, before, stored, b.full, self.segment)
        if not self.enabled:
            return self.local(b, rope), state
        outs = []
        for s in range(n_seg):
            end = before + s * self.segment
            first = 0 if self.searching else max(end - self.segment, 0)
            live = torch.as_tensor(stored, device=k.device).expand(k.shape[0]) + s * self.segment
            outs.append(self.read(b, s, k[:, first:end], v[:, first:end], live, rope))
        return torch.stack(outs, 1), state

    def read(self, b: Blocks, s: int, k_BPGD: Tensor, v_BPGD: Tensor, live_B: Tensor, rope: Rope) -> Tensor:
        """Outputs of segment ``s``, whose row has ``live`` keys before it, the last P given: (B, Q, H, D)."""
        n, old = self.segment, max(k_BPGD.shape[1] - self.segment, 0)
        near_k, near_v = (
            torch.cat([x[:, old:], own[:, s]], 1) for x, own in ((k_BPGD, b.k_BSKGD), (v_BPGD, b.v_BSKGD))
        )
        cached = k_BPGD.shape[1] - old  # 0 or N
        place = torch.arange(n - cached, n + near_k.shape[1] - cached, device=near_k.device)
        near_k = rotate(near_k[:, None], rope, place)[:, 0]
        slots = b.slot_tensor() + n
        q = b.q_BSQHD[:, s : s + 1]
        near_q = rotate(q, rope, slots)[:, 0]
        far_q = rotate(q, rope, torch.full_like(slots, self.far))[:, 0]
        slots = slots if slots.dim() == 2 else slots[None]  # (1 or B, Q)
        seen = (place <= slots[..., None]) & (place >= n - live_B[:, None, None])  # (B, Q, W)
        dead = torch.arange(old, device=k_BPGD.device) < (k_BPGD.shape[1] - live_B)[:, None]  # (B, C)
        values = v_BPGD[:, :old], near_v
        step = q.shape[2]
        if not torch.is_grad_enabled():
            step = max(1, SCORES // (q.shape[0] * self.heads * max(old, 1)))
        parts = [
            self.weigh(near, far, near_k, k_BPGD[:, :old], values, mask, dead)
            for near, far, mask in zip(
                near_q.split(step, 1), far_q.split(step, 1), seen.split(step, 1), strict=True
            )
        ]
        return torch.cat(parts, 1)

    def weigh(
        self,
        near_q: Tensor,
        far_q: Tensor,
        near_k: Tensor,
        far_k: Tensor,
        values: tuple[Tensor, Tensor],
        seen_BQW: Tensor,
        dead_BC: Tensor,
    ) -> Tensor:
        """One softmax over the window and the best of the rest: (B, Q, H, D).

        Queries (B, Q, H, D); keys and values (B, W or C, G, D), ``values`` of the C before those of the W.
        """
        wide = torch.promote_types(near_q.dtype, torch.float32)
        with torch.autocast(near_q.device.type, enabled=False):
            q = [x.to(wide).unflatten(2, (self.kv_heads, -1)) / self.head_dim**0.5 for x in (near_q, far_q)]
            near, far = (
                torch.einsum("bqgrd,bkgd->bgrqk", x, k.to(wide))
                for x, k in zip(q, (near_k, far_k), strict=True)
            )
            near = near.masked_fill(~seen_BQW[:, None, None], -torch.inf)
            far = far.masked_fill(dead_BC[:, None, None, None], -torch.inf)
            place = None
            if far.shape[-1] > self.cfg.neighbours:
                best, place = largest(far.detach(), self.cfg.neighbours)
                if far.shape[3] == 1 and not torch.is_grad_enabled():
                    far = best  # a step of decoding sums the chosen values, not all weighed with zeros
                else:
                    chosen = torch.zeros_like(far, dtype=torch.bool).scatter_(-1, place, True)
                    far, place = far.masked_fill(~chosen, -torch.inf), None
            weights = torch.softmax(torch.cat([far, near], -1), -1).split([far.shape[-1], near.shape[-1]], -1)
            new = torch.einsum("bgrqk,bkgd->bqgrd", weights[1], values[1].to(wide))
            if place is None:
                old = torch.einsum("bgrqk,bkgd->bqgrd", weights[0], values[0].to(wide))
            else:
                index = place.movedim(1, -1).flatten(1, -2)[..., None]  # (B, R K, G, 1), as Q = 1
                v = values[0].gather(1, index.expand(-1, -1, -1, self.head_dim)).to(wide)
                v = v.unflatten(1, (-1, place.shape[-1]))
                old = torch.einsum("bgrqk,brkgd->bqgrd", weights[0], v)
            return (old + new).flatten(2, 3).to(near_q.dtype)
