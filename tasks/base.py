"""What every task gives: training batches that are a pure function of the cursor, and an evaluation.

Shapes: B batch, T targets of a sequence.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from infini_bench.data import Document, Tokenizer, build_tokenizer, load_documents, token_store
from infini_bench.errors import UserError
from infini_bench.metrics.intervals import Interval
from infini_bench.progress import NullProgress, Progress
from infini_bench.schema import RunConfig

if TYPE_CHECKING:
    from infini_bench.models import MemoryLlamaForCausalLM

Row = dict[str, Any]


@dataclass
class Batch:
    """``loss = (weights * nll).sum()``, the mean over rows of each row's weighted loss.

    tokens: (B, T + 1) int64; inputs are ``[:, :-1]``, targets ``[:, 1:]``. weights: (B, T) float32, 0 where
    nothing is asked. task_weights: (B, T) float32, 1 where the target is part of the answer; None = all.
    before: what each row's document has in front of its tokens, in whole segments, (t,) int64: read without
    gradient; None = nothing. Rows with it need not agree in t.
    """

    tokens: Tensor
    weights: Tensor
    task_weights: Tensor | None = None
    before: list[Tensor] | None = None

    @property
    def read(self) -> int:
        """Tokens of all rows."""
        return self.weights.numel() + sum(len(ids) for ids in self.before or ())


class Task(ABC):
    """Base of the tasks. Nothing is loaded before it is asked for."""

    name: str
    version: str  # goes up whenever the same model would get other numbers
    score: tuple[str, ...]  # metrics that a table shows first

    def __init__(self, cfg: RunConfig, tokenizer: Tokenizer | None = None):
        self.cfg = cfg
        self.task: Any = cfg.task
        self._given_tokenizer = tokenizer
        self._documents: dict[str, list[Document]] = {}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, or the one that the data config asks for."""
        return self._given_tokenizer or self._build_tokenizer()

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of what is asked: the documents, or the prompt and its settings."""

    @abstractmethod
    def batch(self, cursor: int, rows: int, segments: int | None = None, split: str = "train") -> Batch:
        """Rows number ``cursor`` ... ``cursor + rows - 1`` of a split: a pure function of these and the seed.

        segments: length in segments of the model while a curriculum runs; unset = the task's own length.
        """

    @abstractmethod
    def evaluate(self, model, progress: Progress | NullProgress | None = None) -> list[Row]:
        """Metric rows (see `row`) of a model that `infini_bench.models` made; the model is left as it was."""

    def check_training(self) -> None:
        """Raises UserError, before any work, for what could not be trained to the curriculum's end."""
        levels: list[int | None] = [*self.cfg.trainer.curriculum] or [None]
        for segments in levels:
            self.batch(0, 1, segments)

    def documents(self, split: str, pairs: bool = False) -> list[Document]:
        """Documents of a split, read once. pairs: they must have summaries."""
        if split not in self._documents:
            self._documents[split] = load_documents(self.cfg.data, split, pairs=pairs)
        return self._documents[split]

    def all_tokens(self, split: str, instead: str, tokenizer: Tokenizer | None = None) -> np.ndarray:
        """Tokens of all documents of ``split``, end to end. instead: what to do where there are none."""
        found = token_store(self.cfg.data, self.documents(split), tokenizer or self.tokenizer)
        if not len(found.all_tokens):
            raise UserError(f'Split "{split}" has no text to hide anything in; {instead}.')
        return found.all_tokens

    def _build_tokenizer(self) -> Tokenizer:
        return build_tokenizer(self.cfg.data, lambda: (d.text for d in self.documents("train")))

    def row(self, metric: str, value: float, interval: Interval | None = None, **columns: Any) -> Row:
        """A metric row: the table's columns that a task knows, None where one does not apply.

        columns: split, length, position, condition, protocol, n, extra. A value that is no number stays
        empty, and ``extra["not_finite"]`` says what it was.
        """
        blank: Row = dict.fromkeys(("split", "length", "position", "condition", "protocol", "n"))
        extra = dict(columns.pop("extra", {}))
        if not math.isfinite(value):
            extra["not_finite"] = str(value)
        limits = interval if interval is not None and all(map(math.isfinite, interval)) else (None, None)
        measured = {"metric": metric, "value": value if math.isfinite(value) else None}
        bounds = {"ci_low": limits[0], "ci_high": limits[1]}
        return {"dataset": self.cfg.data.name, **blank, **columns, **measured, **bounds, "extra": extra}


class Untrained(Task):
    """A question about an architecture: asked of random weights, about data drawn from the seed."""

    @property
    def fingerprint(self) -> str:
        return f"{self.name}-{self.version}"  # all that is asked follows from version, settings and seed

    def batch(self, cursor: int, rows: int, segments: int | None = None, split: str = "train") -> Batch:
        raise RuntimeError(f"{self.name} trains nothing")

    @abstractmethod
    def build(self, device: torch.device) -> torch.nn.Module:
        """What is asked, new, on ``device``; random weights come from torch's global generator."""

    def model(self) -> MemoryLlamaForCausalLM:
        """The configured model on the CPU, float32, for tokens below ``data.vocab_size``."""
        from infini_bench.models import build_model

        return build_model(self.cfg.decoder, self.cfg.memory, self.cfg.data.vocab_size)

    def row(self, metric: str, value: float, interval: Interval | None = None, **columns: Any) -> Row:
        """As `Task.row`; no corpus is read, so the data set is ``synthetic``."""
        return {**super().row(metric, value, interval, **columns), "dataset": "synthetic"}


def mean_over_rows(weights: Tensor) -> Tensor:
    """Weights (B, T) scaled so that each row's sum is 1 / B; a row of zeros stays one."""
    return weights / weights.sum(1, keepdim=True).clamp_min(1e-12) / len(weights)


def has_controls(cfg: RunConfig, model: Any) -> bool:
    """Whether to measure what memory brings: asked for, and there is one that can be switched off."""
    return cfg.task.controls and model.has_memory  # type: ignore[attr-defined]


def aligned(chunk: int, segment: int, rows: int = 1) -> int:
    """Tokens of each row in a call of at most ``chunk`` tokens, in whole segments and at least one."""
    return max(segment, chunk // rows // segment * segment)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the mode that was before after it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def forced(model, logits, state, expected_BA: np.ndarray) -> np.ndarray:
    """The most probable token at each answer position, given the right tokens before it: (B, A)."""
    best = [logits.argmax(-1, keepdim=True)]
    if expected_BA.shape[1] > 1:
        known = torch.from_numpy(expected_BA[:, :-1].astype(np.int64)).to(model.device)
        best.append(model.step(known, state)[0].argmax(-1))
    return torch.cat(best, dim=1).cpu().numpy()
