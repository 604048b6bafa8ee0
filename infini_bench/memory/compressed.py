"""Compressive Transformer (arXiv 1911.05507): what leaves Transformer-XL's cache is compressed, not dropped.

The segment that leaves the cache becomes N / c slots, c = ``rate``, of a first-in-first-out memory of C;
a query attends to slots, cache and own segment in one softmax. The compression function is, per KV head and
for keys and values apart, ``conv``: x_m = sum_i W_i x_{cm+i}, a 1D convolution with kernel = stride = c that
starts as the mean; or elementwise ``mean`` or ``max``, without parameters.

Unlike the paper, which caches hidden states and projects them again when they are read, keys and values are
cached and compressed, raw (pre-position). So a layer's state is 2 dk G (C + N) floats, where the paper's is
d_model (C + N) (Table 1): twice as much with G = H, less with few KV heads. Positions go on from slots to
cache to own segment, one a slot, as the paper's relative positions do.

Nothing that a query reads is differentiated: neither the cache, as in Transformer-XL, nor the slots. ``conv``
learns by the attention-reconstruction loss alone, left in ``auxiliary``: a call in training mode sums, over
its tokens, the mean over heads and features of
    (attn(Q, K_old, V_old) - attn(Q, f(K_old), f(V_old)))^2
where old is the segment in the cache, next to be compressed, attn has no mask and no positions, and
gradients stop at Q, K_old and V_old. The loss of a token does not depend on how the document is cut into
calls.

Shapes: B batch, S segments, N segment length, Q queries, c rate, M = N / c slots a segment, C slots,
H heads, G KV heads, D and E head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from infini_bench.memory.base import Rope, State, attend
from infini_bench.memory.blocks import Blocks, Count, select
from infini_bench.memory.window import WindowMemory
from infini_bench.schema import MemoryConfig


class CompressedMemory(WindowMemory):
    """Transformer-XL's cache and ``compressed`` slots for what left it.

    State: the cache, and ``slot_k``, ``slot_v`` (B, C, G, D) in its dtype, newest last; how many are live
    follows from the number of segments done. ``memory_conv``: W of keys and values, (2, c, G, D, D) float32.
    """

    steady = False

    def __init__(self, cfg: MemoryConfig, heads: int, kv_heads: int, head_dim: int):
        super().__init__(cfg, heads, kv_heads, head_dim)
        self.slots, self.new = cfg.compressed or cfg.segment, cfg.segment // cfg.rate
        self.front += self.slots
        self.settled = 1 - (-self.slots // self.new)
        if cfg.compression == "conv":
            self.memory_conv = nn.Parameter(self.conv_start())

    def conv_start(self) -> Tensor:
        """W of the mean."""
        eye = torch.eye(self.head_dim) / self.cfg.rate
        return eye.expand(2, self.cfg.rate, self.kv_heads, -1, -1).clone()

    def reset_parameters(self) -> None:
        if self.cfg.compression == "conv":
            self.memory_conv.copy_(self.conv_start())

    @property
    def span(self) -> int:
        return self.front + self.segment

    def state_floats(self) -> int:
        return super().state_floats() + 2 * self.head_dim * self.kv_heads * self.slots

    def start(self, k_BTGD: Tensor) -> State:
        batch, _, groups, size = k_BTGD.shape
        empty = k_BTGD.new_zeros(batch, self.slots, groups, size)
        return {**super().start(k_BTGD), "slot_k": empty, "slot_v": empty}

    def segments(self, b: Blocks, carry: State, rope: Rope) -> tuple[Tensor, State]:
        """As ``Memory.segments``; in training mode the call's reconstruction loss is left in ``auxiliary``.

        Raises ValueError where that loss is wanted and padding or a row reset made rows differ.
        """
        new: State = {}
        keys, old, short = [], [], []
        learns = self.cfg.compression == "conv" and self.training and torch.is_grad_enabled()
        for i, (name, own) in enumerate((("k", b.k_BSKGD), ("v", b.v_BSKGD))):
            near, new[f"past_{name}"] = self.chain(carry[f"past_{name}"], own, b.full)
            old.append(near[:, :, : self.segment])
            idle = isinstance(b.full, int) and b.full == 0 and not learns
            short.append(self.compress(old[i][:, :, :0] if idle else old[i], i))
            kept, new[f"slot_{name}"] = self.queue(carry[f"slot_{name}"], short[i].detach(), b.full)
            keys.append(torch.cat([kept, near], 2))
        self.auxiliary = self.reconstruction(b, old, short) if learns else None
        k, v = keys
        return self.read(b, k, v, rope) if self.enabled else self.local(b, rope), new

    def compress(self, x_BSNGD: Tensor, which: int) -> Tensor:
        """Slots of each segment, (B, S, M, G, D) float32. which: 0 for keys, 1 for values."""
        with torch.autocast(x_BSNGD.device.type, enabled=False):
            sizes = (x_BSNGD.shape[2] // self.cfg.rate, self.cfg.rate)
            x = x_BSNGD.detach().float().unflatten(2, sizes)
            if self.cfg.compression == "conv":
                return torch.einsum("bsmcgd,cgde->bsmge", x, self.memory_conv[which].float())
            return x.mean(3) if self.cfg.compression == "mean" else x.amax(3)

    def queue(self, slots_BCGD: Tensor, new_BSMGD: Tensor, full: Count) -> tuple[Tensor, Tensor]:
        """Slots that each segment reads (B, S, C, G, D), none of them from its cache; and those after."""
        line = torch.cat([slots_BCGD, new_BSMGD.flatten(1, 2).to(slots_BCGD.dtype)], 1)
        windows = line.unfold(1, self.slots, self.new).movedim(-1, 2)
        return windows[:, : new_BSMGD.shape[1]], select(windows, full).clone()

    def dead(self, ages: Count) -> Count:
        made = (ages - 1) * self.new
        live = made.clamp(0, self.slots) if isinstance(made, Tensor) else min(max(made, 0), self.slots)
        return self.slots - live + (ages == 0) * self.segment

    def reconstruction(self, b: Blocks, old: list[Tensor], short: list[Tensor]) -> Tensor:
        """The loss of the module's docstring, a float32 scalar; ``old``, ``short``: keys and values.

        In a document's first segment both are zero, and so is the loss.
        """
        if not isinstance(b.done, int):
            raise ValueError("a compression function is trained without padding or row resets")
        with torch.autocast(b.q_BSQHD.device.type, enabled=False):
            q, k, v = (x.detach().float() for x in (b.q_BSQHD, *old))
            lost = attend(q, short[0], short[1], None, False) - attend(q, k, v, None, False)
            return b.join(lost.square()).mean((-1, -2)).sum()
