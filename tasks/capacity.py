"""The compressive memory alone, without a model or training: what is written, and what can be read back.

Protocol, version 1. ``task.trials`` memories of one head of D = ``decoder.head_dim`` are each filled with P
= ratio x D distinct pairs: keys and values of independent standard normal components. Everything goes
through `CompressiveMemory.forward` with the gate fully open, so that an output is what was read and nothing
else. All writes are cut into segments of ``task.per_segment`` writes (``all``: one segment). Afterwards the
memory is asked for every distinct pair with exactly its key, each time from the same state. ``position``:
the ratio; ``length``: P; ``protocol``: the cut; ``condition``: how keys are made and written,

* ``random``: each pair once;
* ``collinear``: each once, but any two keys share one common part and have a cosine of ``task.cosine``,
  expected;
* ``duplicated``: all pairs in order, ``task.copies`` times over;
* ``overwritten``: every key with an old value, then every key with the value that is asked for;
* ``zipf``: each pair once and (copies - 1) P further writes drawn with probability 1 / rank, shuffled.

Of a value v and what was read, r: ``cosine`` of both; ``relative_error`` |r - v| / |v|; ``gain`` r.v / v.v,
the part of the value that comes back (1: all of it). Means over pairs and trials; intervals: bootstrap over
trials.

Shapes: B trials, P pairs, W writes, D head size.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from infini_bench.errors import UserError
from infini_bench.memory import Memory, build_memory
from infini_bench.metrics.intervals import bootstrap
from infini_bench.progress import NullProgress

from .base import Row, Untrained
from .footprint import head_size

OPEN = 40.0  # beta whose sigmoid is 1 in float32
CALL = 32  # segments a call: the memory after each of them exists at once


@dataclass
class Pairs:
    """k_BPD, v_BPD: what is asked for. order_BW: which pair each write is. old_v_BWD: first values."""

    k_BPD: Tensor
    v_BPD: Tensor
    order_BW: Tensor
    old_v_BWD: Tensor | None = None

    def written(self) -> tuple[Tensor, Tensor]:
        """Keys and values in the order of writing: (B, W, D)."""
        index = self.order_BW[..., None].expand(-1, -1, self.k_BPD.shape[2])
        k, v = self.k_BPD.gather(1, index), self.v_BPD.gather(1, index)
        if self.old_v_BWD is not None:
            v = torch.cat([self.old_v_BWD, v[:, self.old_v_BWD.shape[1] :]], 1)
        return k, v


class Capacity(Untrained):
    name = "capacity"
    version = "1"
    score = ("cosine", "relative_error")

    def build(self, device: torch.device) -> Memory:
        return self.memory(self.cfg.memory.segment).to(device)

    def memory(self, segment: int) -> Memory:
        """One head's memory with an open gate and segments of ``segment`` writes."""
        if self.cfg.memory.kind != "compressive":
            raise UserError(
                f"eval capacity asks a compressive memory, and model={self.cfg.model} has none; "
                "take model=infini_linear or another infini_*."
            )
        cfg = replace(self.cfg.memory, segment=segment, gate_start=OPEN, gate_split=0.0)
        return build_memory(cfg, 1, 1, head_size(self.cfg))

    @torch.no_grad()
    def evaluate(self, model, progress=None) -> list[Row]:
        device = next(model.parameters()).device
        cells = [*product(self.task.keys, self.task.ratios, self.task.per_segment)]
        rows = []
        with (progress or NullProgress()).task("capacity", len(cells)) as bar:
            for kind, ratio, cut in cells:
                pairs = self.pairs(kind, round(ratio * head_size(self.cfg)))
                rows += self._rows(kind, ratio, cut, pairs, device)
                bar.advance(1)
        return rows

    def pairs(self, kind: str, n: int) -> Pairs:
        """Drawn on the CPU from seed, kind and number of pairs alone: the same for every memory and cut."""
        if n < 1:
            raise UserError("task.ratios x head size gives no pair at all; raise one of them.")
        task, seed = self.task, zlib.crc32(f"{self.cfg.seed} {kind} {n}".encode())
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        batch, size = task.trials, head_size(self.cfg)
        k, v = normal(batch, n, size), normal(batch, n, size)
        once = torch.arange(n).expand(batch, n)
        if kind == "collinear":
            k = task.cosine**0.5 * normal(batch, 1, size) + (1 - task.cosine) ** 0.5 * k
        if kind == "duplicated":
            return Pairs(k, v, once.repeat(1, task.copies))
        if kind == "overwritten":
            return Pairs(k, v, once.repeat(1, 2), old_v_BWD=normal(batch, n, size))
        if kind == "zipf":
            chance = (1 / torch.arange(1.0, n + 1)).expand(batch, n)
            drawn = torch.multinomial(chance, (task.copies - 1) * n, replacement=True, generator=generator)
            order = torch.cat([once, drawn], 1)
            shuffled = torch.rand(order.shape, generator=generator).argsort(1)
            return Pairs(k, v, order.gather(1, shuffled))
        return Pairs(k, v, once)

    def _rows(self, kind: str, ratio: float, cut: str, pairs: Pairs, device: torch.device) -> list[Row]:
        k, v = (x.to(device) for x in pairs.written())
        writes = k.shape[1]
        size = writes if cut == "all" else min(int(cut), writes)
        if writes % size:
            raise UserError(
                f"task.per_segment={cut} does not divide {writes} writes ({kind}, ratio {ratio:g})."
            )
        read = read_back(self.memory(size).to(device), k, v, pairs.k_BPD.to(device)).cpu()
        asked = pairs.v_BPD
        measured = {
            "cosine": F.cosine_similarity(read, asked, dim=-1),
            "relative_error": (read - asked).norm(dim=-1) / asked.norm(dim=-1),
            "gain": (read * asked).sum(-1) / asked.square().sum(-1),
        }
        columns = {"length": asked.shape[1], "position": f"{ratio:g}", "condition": kind}
        columns |= {"protocol": "one segment" if cut == "all" else f"{cut} a segment", "n": len(asked)}
        columns["extra"] = {"writes": writes, "head_dim": asked.shape[2]}
        rows = []
        for name, value_BP in measured.items():
            by_trial = value_BP.double().mean(1).numpy()
            bounds = bootstrap(by_trial, lambda x: float(x.mean()), seed=self.cfg.seed)
            rows.append(self.row(name, float(by_trial.mean()), bounds, **columns))
        return rows


def read_back(memory: Memory, k_BWD: Tensor, v_BWD: Tensor, asked_BPD: Tensor) -> Tensor:
    """What the memory gives for each of ``asked`` after all writes, which fill whole segments: (B, P, D)."""
    span, size = memory.span, k_BWD.shape[2]
    cos = torch.ones(1, span, size, device=k_BWD.device)  # type: ignore[arg-type]
    rope = (cos, torch.zeros_like(cos))
    state = None
    for k, v in zip(*(x[:, :, None].split(CALL * memory.segment, 1) for x in (k_BWD, v_BWD)), strict=True):
        _, state = memory(k, k, v, rope, state)
    reads = []
    for q in asked_BPD[:, :, None].split(memory.segment, 1):  # inside one segment: nothing is written yet
        reads.append(memory(q, q, q, rope, state)[0][:, :, 0])
    return torch.cat(reads, 1)
