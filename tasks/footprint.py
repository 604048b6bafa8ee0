"""What a model carries over a segment boundary, counted on live tensors (Table 1).

Protocol, version 1. A model with random weights reads one row of random tokens, segment by segment, in
float32. After each number of segments in ``task.after`` its state is counted (``length``: tokens read so
far):

* ``state_floats``, ``state_bytes``: what the `MemoryCache` holds there; no segment is unfinished.
* ``paper_formula_floats``: the paper's Table 1 as printed (with H, also where fewer KV heads are stored) at
  this model's sizes. Left out for models that it does not have.
* ``local_floats``, after the last one only: what the unfinished segment holds at its fullest, one token
  before its end.

With ``task.shapes`` the same code runs on tensors that have shapes and types and no values (PyTorch's fake
tensors), so that the paper's own body can be counted anywhere; counts do not depend on values.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from infini_bench.cache import MemoryCache
from infini_bench.errors import UserError
from infini_bench.progress import NullProgress
from infini_bench.schema import RunConfig

from .base import Row, Untrained, evaluating


@dataclass(frozen=True)
class Sizes:
    """The letters of Table 1: head size dk = dv, heads H, segment length N, layers l, width d_model,
    segments S, stored entries NS, compressed slots c, summary vectors p."""

    dk: int
    H: int
    N: int
    l: int  # noqa: E741
    d_model: int
    S: int
    NS: int
    c: int
    p: int


# Model -> floats, as printed; ``infini`` stands for all infini_*. The words are in report/paper.py.
# Memorizing: what is stored, without the Transformer-XL cache that Table 2 counts too. AutoCompressors: one
# accumulation a segment.
FORMULAS: dict[str, Callable[[Sizes], int]] = {
    "transformer_xl": lambda x: 2 * x.dk * x.H * x.N * x.l,
    "compressive": lambda x: x.d_model * (x.c + x.N) * x.l,
    "memorizing": lambda x: 2 * x.dk * x.H * x.NS,
    "rmt": lambda x: x.d_model * x.p * x.l * 2,
    "autocompressor": lambda x: x.d_model * x.p * x.S * x.l,
    "infini": lambda x: x.dk * (x.dk + 1) * x.H * x.l,
}


def paper_formula(cfg: RunConfig, segments: int) -> int | None:
    """Table 1's floats for ``cfg`` after a number of segments; None for a model that it does not have."""
    formula = FORMULAS.get("infini" if cfg.model.startswith("infini") else cfg.model)
    memory = asdict(cfg.memory)  # a memory's own settings, where there is one
    n = cfg.memory.segment
    sizes = Sizes(
        dk=head_size(cfg),
        H=cfg.decoder.heads,
        N=n,
        l=cfg.decoder.layers,
        d_model=cfg.decoder.dim,
        S=segments,
        NS=min(segments * n, cfg.memory.entries),
        c=memory.get("compressed") or n,
        p=memory.get("tokens", 0),
    )
    return formula(sizes) if formula else None


class Footprint(Untrained):
    name = "footprint"
    version = "1"
    score = ("state_floats", "state_bytes")

    def build(self, device: torch.device) -> torch.nn.Module:
        if not self.task.shapes:
            return self.model().to(device)  # type: ignore[arg-type]
        self.cfg = replace(self.cfg, memory=replace(self.cfg.memory, index="torch"))  # faiss wants values
        with self.fake:
            return self.model()

    @cached_property
    def fake(self) -> FakeTensorMode:
        """Inside, tensors have no values."""
        return FakeTensorMode()

    def evaluate(self, model, progress=None) -> list[Row]:
        with torch.no_grad(), self.fake if self.task.shapes else nullcontext():
            try:
                return self._count(model, progress)
            except DataDependentOutputException as error:
                raise UserError(
                    f"The shapes of model={self.cfg.model} depend on values; set task.shapes=false."
                ) from error

    def _count(self, model, progress) -> list[Row]:
        size, after = model.segment, self.task.after
        ids = torch.randint(self.cfg.data.vocab_size, (1, size), device=model.device)
        rows: list[Row] = []
        state: Any = None
        work = (progress or NullProgress()).task("footprint", after[-1])
        with evaluating(model), work as bar:
            for segments in range(1, after[-1] + 1):
                _, state = model.step(ids, state, keep="none")
                bar.advance(1)
                if segments in after:
                    columns = {"length": segments * size, "n": 1, "extra": {"segments": segments}}
                    rows.append(self.row("state_floats", state.floats(), **columns))
                    rows.append(self.row("state_bytes", state.bytes(), **columns))
                    if (printed := paper_formula(self.cfg, segments)) is not None:
                        rows.append(self.row("paper_formula_floats", printed, **columns))
            if size > 1:
                _, state = model.step(ids[:, 1:], state, keep="none")
            rows.append(self.row("local_floats", all_floats(state) - state.floats(), **columns))
        return rows


def all_floats(state: MemoryCache) -> int:
    """Floating-point numbers of everything that the state holds, the unfinished segment included."""
    return sum(x.numel() for x in state.tensors().values() if x.is_floating_point())


def head_size(cfg: RunConfig) -> int:
    return cfg.decoder.head_dim or cfg.decoder.dim // cfg.decoder.heads
