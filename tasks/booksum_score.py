"""From summaries to metric rows: ROUGE against each kind of reference, and what the summaries are like.

Shapes: D books, R references of one book, 4 = rouge1, rouge2, rougeL, rougeLsum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from infini_bench.data import Document
from infini_bench.metrics import rouge
from infini_bench.metrics.intervals import bootstrap, paired_bootstrap
from infini_bench.metrics.summaries import METRICS, Reader
from infini_bench.schema import RunConfig

from .base import Row

Combine = Callable[[np.ndarray], np.ndarray]  # (R, 4) -> (4,)


@dataclass
class Written:
    """Summaries under one condition, by number of the book. kinds: of references to score; None = all."""

    condition: str
    length: int | None
    protocol: str
    seed: int
    kinds: list[str | None] | None = None
    texts: dict[int, list[str]] = field(default_factory=dict)
    cut: list[int] = field(default_factory=list)  # books longer than ``length``
    tokens: dict[int, list[int]] = field(default_factory=dict)  # of a model
    sentences: dict[int, list[list[int]]] = field(default_factory=dict)  # of the book, in place of its text
    extra: dict[str, Any] = field(default_factory=dict)

    def add(self, number: int, texts: list[str], cut: bool, tokens: list[int]) -> None:
        self.texts[number], self.tokens[number] = texts, tokens
        self.cut += [number] if cut else []

    def lines(self, books: list[Document]) -> Iterator[dict[str, Any]]:
        """For `save_summaries`."""
        for number, texts in self.texts.items():
            for sample, text in enumerate(texts):
                line = {"book": books[number].id, "condition": self.condition, "length": self.length}
                line |= {"protocol": self.protocol, "sample": sample}
                if number in self.sentences:
                    yield {**line, "references": self.kinds, "sentences": self.sentences[number][sample]}
                else:
                    drawn = {} if "greedy" in self.protocol else {"seed": [self.seed, number, sample]}
                    yield {**line, **drawn, "text": text}


class Scores:
    """Scores of summaries of ``books``; ``row`` makes a metric row of a task."""

    def __init__(self, cfg: RunConfig, books: list[Document], row: Callable[..., Row]):
        self.cfg, self.books, self.row = cfg, books, row
        self.folder = Path(cfg.data.cache_dir) / "rouge"
        self.measured: dict[tuple[int, str], dict[str, float]] = {}

    def rows(self, written: list[Written], extra: dict[str, Any]) -> list[Row]:
        """All rows. extra: what those of ``overall`` of the summaries themselves say besides."""
        self.warm(written)
        for number, book in enumerate(self.books):  # one after the other: what is counted of a book is large
            texts = {text for one in written for text in one.texts.get(number, [])}
            reader = Reader(book.text, self.goals(number, None))
            self.measured |= {(number, text): reader.measure(text) for text in texts}
        kinds = kinds_of(self.books, self.cfg.task.kind)  # type: ignore[attr-defined]
        rows = [row for one in written for kind in one.kinds or kinds for row in self._rows(one, kind, extra)]
        return rows + self._gains([one for one in written if one.condition == "pairwise"], kinds)

    def warm(self, written: list[Written]) -> None:
        """ROUGE of all pairs at once, on all cores, so that it is only looked up later."""
        pairs = [
            (text, goal)
            for one in written
            for kind in one.kinds or [None]
            for number, texts in one.texts.items()
            for text in texts
            for goal in self.goals(number, kind)
        ]
        rouge.score_pairs(pairs, folder=self.folder)

    def goals(self, number: int, kind: str | None) -> list[str]:
        """A book's references of a kind."""
        return [summary.text for summary in self.books[number].summaries if kind in (None, summary.source)]

    def rouge_of(self, one: Written, kind: str | None, combine: Combine = rouge.pairwise) -> np.ndarray:
        """Scores (D, 4) of each book that has such a reference, means over its samples."""
        numbers = [number for number in one.texts if self.goals(number, kind)]
        goals = [self.goals(number, kind) for number in numbers]
        scores = rouge.score_documents([one.texts[number] for number in numbers], goals, self.folder)
        return np.stack([np.mean([combine(sample) for sample in samples], axis=0) for samples in scores])

    def _rows(self, one: Written, kind: str | None, extra: dict[str, Any]) -> list[Row]:
        numbers = [number for number in one.texts if self.goals(number, kind)]
        ids = [self.books[number].id for number in numbers]
        cut = [self.books[number].id for number in numbers if number in one.cut]
        facts = {"books": ids, "rouge": rouge.SETTINGS, "cut": cut, "cut_books": len(cut), **one.extra}
        rows = self._rouge_rows(one, kind, rouge.pairwise, {**facts, **extra})
        if one.condition == "pairwise":
            rows += self._rouge_rows(one, kind, rouge.best, {"books": ids})
        values = {metric: self._mean_over_samples(one, numbers, metric) for metric in METRICS}
        if one.tokens:
            values["summary_tokens"] = np.array([np.mean(one.tokens[number]) for number in numbers])
        for metric, each in values.items():
            known = each[np.isfinite(each)]
            if len(known):
                rows.append(self._row(one, kind, metric, one.condition, known, np.mean))
        return rows

    def _mean_over_samples(self, one: Written, numbers: list[int], metric: str) -> np.ndarray:
        """(D,), NaN where no sample has a value."""
        values = [[self.measured[n, text][metric] for text in one.texts[n]] for n in numbers]
        known = [[value for value in each if math.isfinite(value)] for each in values]
        return np.array([np.mean(each) if each else math.nan for each in known])

    def _rouge_rows(
        self, one: Written, kind: str | None, combine: Combine, extra: dict[str, Any]
    ) -> list[Row]:
        books_D4 = self.rouge_of(one, kind, combine)
        condition = "best" if combine is rouge.best else one.condition
        measures = {name: (lambda rows, i=i: float(rows[:, i].mean())) for i, name in enumerate(rouge.KINDS)}
        rows = [
            self._row(one, kind, metric, condition, books_D4, measure) for metric, measure in measures.items()
        ]
        extra = {**extra, "scores": books_D4.round(4).tolist()}
        return [*rows, self._row(one, kind, "overall", condition, books_D4, rouge.overall, extra)]

    def _gains(self, own: list[Written], kinds: list[str | None]) -> list[Row]:
        """Overall of each length over the next shorter one, on the books that the shorter one cuts."""
        rows = []
        for shorter, longer in pairwise(own):
            if longer.length == shorter.length:
                continue
            for kind in kinds:
                numbers = [number for number in shorter.texts if self.goals(number, kind)]
                cut = np.array([number in shorter.cut for number in numbers])
                if not cut.any():
                    continue
                more, less = (self.rouge_of(one, kind)[cut] for one in (longer, shorter))
                value, bounds = paired_bootstrap(more, less, rouge.overall, seed=self.cfg.seed)
                facts = {
                    "over": shorter.length,
                    "books": [self.books[n].id for n in shorter.cut if n in numbers],
                }
                columns = self._columns(longer, kind, "pairwise", len(more))
                rows.append(self.row("overall_gain", value, bounds, extra=facts, **columns))
        return rows

    def _row(
        self,
        one: Written,
        kind: str | None,
        metric: str,
        condition: str,
        rows: np.ndarray,
        measure,
        extra=None,
    ) -> Row:
        """A metric row from the books' own numbers, one a row."""
        bounds = bootstrap(rows, measure, seed=self.cfg.seed)
        columns = self._columns(one, kind, condition, len(rows))
        return self.row(metric, float(measure(rows)), bounds, extra=extra or {}, **columns)

    def _columns(self, one: Written, kind: str | None, condition: str, n: int) -> dict[str, Any]:
        split = self.cfg.task.split  # type: ignore[attr-defined]
        return {
            **{"split": split, "length": one.length, "position": kind},
            **{"condition": condition, "protocol": one.protocol, "n": n},
        }


def kinds_of(books: list[Document], asked: str | None) -> list[str | None]:
    """The kind that is asked for; else None, and the kinds of references if there are several."""
    if asked:
        return [asked]
    sources = sorted({summary.source for book in books for summary in book.summaries})
    return [None, *(sources if len(sources) > 1 else [])]
