"""Time, memory and share of the machine's peak against length: what ``infini-bench profile`` measures.

Protocol, version 1. Random weights and random tokens; no text is tokenized. After a warm-up a call is timed
``task.repeats`` times, fewer if together they would take more than ``task.seconds``, at least once. A number
is the median, its interval the 10th to 90th percentile of the repetitions, ``n`` their number. bf16 on a GPU
and float32 on a CPU unless ``trainer.precision`` says otherwise; in bf16, a memory's float32 products are
TF32, as in training. A length that does not fit, or whose one call takes longer than ``task.seconds``, is a
row without a value that says why (``extra["failed"]``).

``task.level=model``: the whole configured model (`efficiency_model`). ``task.level=operator``: one layer's
memory, given projections (`efficiency_operator`). It is the rows' ``protocol``.

Rows (``length``: tokens of the document; ``condition``: the form, or which reference; ``variant``: shape):

* ``forward_ms``, ``train_ms``, ``decode_ms``; and for each (``position``) ``tokens_per_s``,
  ``percent_of_peak`` of the matrix product measured in the same run (``extra["peak_tflops"]``),
  ``peak_bytes`` (of tensors on a GPU, of the whole process on a CPU);
* ``state_bytes``: what is carried at the end of the document;
* ``ratio_to_local_forward``, ``ratio_to_local_train``: this over local attention only, of the same run (lower
  is better); ``ratio_to_full_forward``: full attention's time over this; ``ratio_to_peer_inference``,
  ``ratio_to_peer_train``: the peer's time over this (higher is better; ``variant``: the peer,
  ``condition``: the shape; of an operator, ``extra["peer"]``). It takes turns with local attention and with
  peers, repetition by repetition.

``results/efficiency.sh`` has the commands behind the published table.

Operations counted for the share, and for the bound ``extra["bound_ms"]``: the weights' products, attention
inside the segment (the causal half), over the document for ``full``, and a compressive memory's reads and
writes; a training step counts three times its forward pass. What other memories add is not counted: their
shares are lower bounds.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

from infini_bench.device import torch_device
from infini_bench.progress import NullProgress
from infini_bench.timing import Ceilings, Stopwatch, Timer, Times, Work, ceilings, clock
from infini_bench.units import parse_length

from .base import Row, Untrained
from .footprint import head_size


class Efficiency(Untrained):
    name = "efficiency"
    version = "1"
    score = ("forward_ms", "train_ms", "decode_ms")
    timer: Timer = staticmethod(clock)

    def build(self, device: torch.device) -> torch.nn.Module:
        from .efficiency_operator import build_layer
        from .efficiency_peers import check_peers

        layer = build_layer(self.cfg) if self.task.level == "operator" else None
        check_peers(self)  # before minutes of work
        return (layer or self.model()).to(device)  # type: ignore[arg-type]

    def evaluate(self, model, progress=None) -> list[Row]:
        from . import efficiency_model, efficiency_operator

        gc.collect()  # else what an earlier job of this process left counts as this one's memory
        measure = {"model": efficiency_model.measure, "operator": efficiency_operator.measure}
        work = (progress or NullProgress()).task(f"profile {self.cfg.model}", len(self.lengths))
        with work as bar, warnings.catch_warnings(), products(self.dtype != torch.float32):
            warnings.simplefilter("ignore")  # each attention backend says at length why it cannot run
            return measure[self.task.level](self, model, bar)

    @property
    def lengths(self) -> list[int]:
        return sorted({parse_length(length) for length in self.task.lengths})

    @cached_property
    def device(self) -> torch.device:
        return torch_device(self.cfg.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of projections, and of weights outside training."""
        wanted = self.cfg.trainer.precision
        low = wanted == "bf16" or (wanted == "auto" and self.device.type == "cuda")
        return torch.bfloat16 if low else torch.float32

    @cached_property
    def watch(self) -> Stopwatch:
        return Stopwatch(self.device, self.task.repeats, self.task.seconds, self.timer)

    @cached_property
    def best(self) -> Ceilings:
        return ceilings(self.watch, self.dtype)

    @property
    def shape(self) -> str:
        """What the row's times are of, e.g. b1-h8-d128-n2048; g where KV heads are fewer."""
        body, groups = self.cfg.decoder, self.cfg.decoder.kv_heads or self.cfg.decoder.heads
        heads = f"h{body.heads}" + (f"-g{groups}" if groups != body.heads else "")
        layer = f"{heads}-d{head_size(self.cfg)}-n{self.cfg.memory.segment}"
        whole = f"-l{body.layers}-w{body.dim}" if self.task.level == "model" else ""
        return f"b{self.task.batch}{whole}-{layer}"

    def row(self, metric: str, value: float, interval: Any = None, **columns: Any) -> Row:
        found = {"peak_tflops": self.best.flops / 1e12, "copy_gb_per_s": self.best.bandwidth / 1e9}
        extra = {"variant": self.shape, **found, **columns.pop("extra", {})}
        return super().row(metric, value, interval, **{"protocol": self.task.level, **columns}, extra=extra)

    def timed(
        self, what: str, found: Times | str, tokens: int, work: Work | None, **columns: Any
    ) -> list[Row]:
        """Rows of one kind of call, ``what`` = forward, train or decode, that reads so many tokens a row."""
        extra = columns.pop("extra", {})
        if isinstance(found, str):
            return [self.missing(f"{what}_ms", found, extra=extra, **columns)]
        columns |= {"n": len(found.ms), "extra": extra}
        if work is not None:
            columns["extra"] = {**extra, "bound_ms": self.best.bound_ms(work)}
        rows = [self.row(f"{what}_ms", found.median, found.spread, **columns)]
        each = [("peak_bytes", float(found.memory))]
        each.append(("tokens_per_s", self.task.batch * tokens / found.median * 1e3))
        if work is not None:
            each.append(("percent_of_peak", self.best.percent(work, found.median)))
        return rows + [self.row(name, value, position=what, **columns) for name, value in each]

    def ratio(self, metric: str, found: list[Times] | str, **columns: Any) -> list[Row]:
        """The median of the ratios, repetition by repetition, and their spread."""
        if isinstance(found, str):
            return [self.missing(metric, found, **columns)]
        top, bottom = found
        ratios = Times([a / b for a, b in zip(top.ms, bottom.ms, strict=False)])
        return [self.row(metric, ratios.median, ratios.spread, n=len(ratios.ms), **columns)]

    def missing(self, metric: str, why: str, **columns: Any) -> Row:
        """A number that there is not, and the reason."""
        row = self.row(metric, math.nan, **{**columns, "n": 0})
        return {**row, "extra": {**row["extra"], "failed": why}}


@contextmanager
def products(low: bool) -> Iterator[None]:
    """Inside, float32 matrix products of a bf16 run are as exact as in training (TF32)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if low else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
