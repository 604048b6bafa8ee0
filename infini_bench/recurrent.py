"""Runs a model whose memory lives in tokens segment by segment, whatever the calls are.

A call is cut into rounds that cross no segment border of any row. In a round, a row gives its read tokens
if it is at a segment's start, its next tokens up to the border, and its write tokens if it gets there. The
layers attend over these and over what earlier rounds of the segment left in their caches, which are cleared
at its end.

Shapes: B batch, T tokens of the call, K tokens of a round, R read tokens, m write tokens, N segment length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from infini_bench.cache import MemoryCache, MemoryLayer
from infini_bench.layer import MemoryDecoderLayer
from infini_bench.memory.base import Rope, State
from infini_bench.memory.blocks import Count
from infini_bench.memory.tokens import Association, TokenMemory
from infini_bench.schema import MemoryConfig

if TYPE_CHECKING:
    from infini_bench.decoder import MemoryLlamaConfig, MemoryLlamaModel


class AssociativeLayer(MemoryDecoderLayer):
    """A decoder layer that reads its `Association` before it runs and writes to it afterwards (ARMT)."""

    def __init__(self, config: MemoryLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.association = Association(MemoryConfig(**config.memory), config.hidden_size)

    def forward(  # type: ignore[override]
        self, x_BKD: Tensor, *args: Any, M: Tensor, z: Tensor, reads: bool, writes: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, K, dim), M (B, F, dim) and z (B, F) before -> after; writes: the last so many columns write."""
        if reads:
            x_BKD = x_BKD + self.association.read(x_BKD, M, z)
        out = super().forward(x_BKD, *args)
        return (out, *self.association.write(out[:, -writes:], M, z)) if writes else (out, M, z)


class SegmentRun:
    """One call of such a model.

    cache: a layer for each of the model's, with the unfinished segment's keys and values, and behind them
    one for this run: ``fill`` tokens of that segment, ``done`` segments, ``seen`` columns, and what the
    memory carries; it is added to a cache that has none yet.
    """

    def __init__(self, model: MemoryLlamaModel, memory: TokenMemory, cache: MemoryCache):
        depth = len(model.layers)
        if len(cache.layers) == depth:
            cache.layers.append(MemoryLayer())
        self.model, self.memory, self.own = model, memory, cache.layers[depth]
        self.cache = MemoryCache(cache.layers[:depth])
        self.rope: Rope | None = None  # of the last round: whole segments share it

    def __call__(self, x_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        """Last hidden states (B, T, dim) of embeddings; the cache gets the new state.

        mask_BT: bool, False = padding, whose outputs mean nothing; None = no padding.
        """
        fresh = {"fill": 0, "done": 0, "seen": 0}
        self.state = dict(self.own.state or {**self.memory.start(x_BTD), **fresh})
        if mask_BT is None and isinstance(self.state["done"], int):
            out = self.even(x_BTD)
        else:
            all_BT = torch.ones(x_BTD.shape[:2], dtype=torch.bool, device=x_BTD.device)
            out = self.ragged(x_BTD, all_BT if mask_BT is None else mask_BT)
        self.own.state = {**self.state, "seen": self.state["seen"] + x_BTD.shape[1]}
        return out

    def even(self, x_BTD: Tensor) -> Tensor:
        """All rows at the same place: one round a segment, no mask, and nothing is asked of the device."""
        size, tokens = self.memory.segment, x_BTD.shape[1]
        first = min(tokens, size - self.state["fill"])
        whole, rest = divmod(tokens - first, size)
        # cut at once: a slice a segment would fill a gradient of all tokens with zeros every time
        parts = x_BTD.split([first, *[size] * whole, *[rest] * (rest > 0)], 1)
        return torch.cat([self.round(part, part.shape[1]) for part in parts], 1)

    def ragged(self, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Rows at different places: each row's next tokens are gathered, and their outputs scattered back."""
        if self.memory.cfg.gradient_depth is not None and torch.is_grad_enabled():
            raise ValueError(
                "gradient_depth counts segments of the document: train without padding or row resets"
            )
        used, size = torch.zeros_like(mask_BT[:, 0], dtype=torch.long), x_BTD.shape[1]
        self.state |= {name: used + self.state[name] for name in ("fill", "done")}
        x = pick(x_BTD, (~mask_BT).long().argsort(dim=1, stable=True))  # tokens first, then padding
        out = x.new_zeros(len(x), size + 1, x.shape[2])  # the last slot takes what is no token
        while True:
            take = torch.minimum(mask_BT.sum(1) - used, self.memory.segment - self.state["fill"])
            steps = torch.arange(int(take.max()), device=x.device)
            if not len(steps):
                return pick(out, (mask_BT.cumsum(1) - 1).clamp(min=0))
            slots, here = used[:, None] + steps, steps < take[:, None]
            made = self.round(pick(x, slots.clamp(max=size - 1)), take, here)
            out = out.scatter(1, torch.where(here, slots, size)[..., None].expand_as(made), made)
            used = used + take
            self.compact()

    def round(self, x_BKD: Tensor, take: Count, here_BK: Tensor | None = None) -> Tensor:
        """Last hidden states (B, K, dim) of the next ``take`` tokens; where rows differ, here_BK has them."""
        memory, state, total = self.memory, self.state, self.state["fill"] + take
        begins, ends = (state["fill"] == 0) & (take > 0), total == memory.segment
        read, reads = memory.read(state) if some(begins) else (x_BKD[:, :0], 0)
        write = memory.write(state) if some(ends) else x_BKD[:, :0]
        x, mask = torch.cat([read, x_BKD, write], 1), None
        if here_BK is not None:
            mask = torch.cat([marks(begins, reads, read), here_BK, marks(ends, memory.tokens, write)], 1)
        out, written = self.layers(x, mask, some(ends))
        _, own, last = out.split([read.shape[1], x_BKD.shape[1], write.shape[1]], 1)
        if some(ends):
            state |= self.end(last, None if isinstance(ends, bool) else ends, written)
        state |= {"fill": total % memory.segment, "done": state["done"] + total // memory.segment}
        return own

    def layers(self, x_BKD: Tensor, mask_BK: Tensor | None, ends: bool) -> tuple[Tensor, State]:
        """Last hidden states (B, K, dim) of a round, and what the layers wrote.

        A whole segment of rows that agree needs no caches; in training it is one graph, if that is compiled.
        """
        seen = self.cache.get_seq_length()
        size = seen + x_BKD.shape[1]
        if self.rope is None or self.rope[0].shape[1] != size:
            last = torch.tensor([[size - 1]])  # on the CPU, where it is asked for
            self.rope = self.model.rotary_emb(x_BKD, last)
        given = x_BKD, self.rope, self.memory.beside(self.state), self.memory.tokens * ends
        shared = isinstance(self.model.layers[0], FSDPModule)  # gathered one by one: no graph holds them all
        if ends and not seen and mask_BK is None and torch.is_grad_enabled() and not shared:
            return self.model.whole(*given)
        return self.model.round(*given, mask_BK, self.cache)

    def end(self, out_BmD: Tensor, full_B: Tensor | None, written: State) -> State:
        """What crosses the border of the rows that end a segment, None = all; its inside is cleared."""
        depth = self.memory.cfg.gradient_depth
        carried = self.memory.after(self.state, out_BmD, full_B, written)
        for layer in self.cache.layers:
            layer.reset() if full_B is None else layer.reset_rows(full_B)
        if full_B is None and depth is not None and (self.state["done"] + 1) % depth == 0:
            return {name: x.detach() for name, x in carried.items()}
        return carried

    def compact(self) -> None:
        """Keep each row's live columns only, so that the caches stay as wide as the longest open segment."""
        states = [layer.state or {} for layer in self.cache.layers]
        if "valid" not in states[0]:
            return
        valid = states[0]["valid"]
        width = int(valid.sum(1).max())
        order = (~valid).long().argsort(dim=1, stable=True)[:, :width]
        for layer, state in zip(self.cache.layers, states, strict=True):
            kept = {name: pick(state[name], order) for name in ("past_k", "past_v", "valid")}
            layer.state = {**state, **kept, "seen": width} if width else None


def some(rows: bool | Tensor) -> bool:
    """Whether it holds for any row."""
    return rows if isinstance(rows, bool) else bool(rows.any())


def marks(rows_B: Tensor, count: Count, part_BRD: Tensor) -> Tensor:
    """The first ``count`` columns of the part, in these rows: (B, R) bool."""
    columns = torch.arange(part_BRD.shape[1], device=part_BRD.device)
    return rows_B[:, None] & (columns < (count if isinstance(count, int) else count[:, None]))


def pick(x: Tensor, index_BT: Tensor) -> Tensor:
    """Columns of each row: (B, C, ...) -> (B, T, ...)."""
    index = index_BT.view(*index_BT.shape, *[1] * (x.dim() - 2))
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))
