"""Perplexities and bits from summed losses: totals over the documents first, the ratio last.

nats: (documents,) summed loss of each document; units: (documents,) its tokens, words or bytes.
Per-word perplexity and bits per byte can be compared across tokenizers, per-token perplexity cannot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from infini_bench.metrics.intervals import Interval, bootstrap, paired_bootstrap

Numbers = Sequence[float] | np.ndarray
Measure = Callable[[Numbers, Numbers], float]


def perplexity(nats: Numbers, units: Numbers) -> float:
    """exp(total nats / total units): per token, or per word under any tokenizer. Infinite beyond float64."""
    try:
        return math.exp(float(np.sum(nats)) / float(np.sum(units)))
    except OverflowError:
        return math.inf


def bits_per(nats: Numbers, units: Numbers) -> float:
    """Total nats / ln 2 / total units: bits per byte, or per token."""
    return float(np.sum(nats)) / math.log(2) / float(np.sum(units))


def mean_nats(nats: Numbers, units: Numbers) -> float:
    """Total nats / total units: the loss per token."""
    return float(np.sum(nats)) / float(np.sum(units))


def interval(measure: Measure, nats: Numbers, units: Numbers, seed: int = 0) -> Interval | None:
    """Bootstrap over documents of ``measure(nats, units)``; None with fewer than two documents."""
    return bootstrap(_rows(nats, units), lambda rows: measure(rows[:, 0], rows[:, 1]), seed=seed)


def difference(
    measure: Measure, nats: Numbers, other_nats: Numbers, units: Numbers, seed: int = 0
) -> tuple[float, Interval | None]:
    """``measure(nats) - measure(other_nats)`` on the same documents, with its paired interval."""
    first, second = _rows(nats, units), _rows(other_nats, units)
    return paired_bootstrap(first, second, lambda rows: measure(rows[:, 0], rows[:, 1]), seed=seed)


def _rows(nats: Numbers, units: Numbers) -> np.ndarray:
    return np.stack([np.asarray(nats, float), np.asarray(units, float)], axis=1)
