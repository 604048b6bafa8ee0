"""Confidence intervals: Wilson for counts of hits, bootstrap over documents for everything else."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

Statistic = Callable[[np.ndarray], float]  # rows of one sample -> its number


class Interval(NamedTuple):
    low: float
    high: float


def wilson(hits: float, n: float, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a share, in 0..1 (Wilson 1927). n is above 0."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, weight = hits / n, z * z / n
    centre = share + weight / 2
    spread = z * math.sqrt(share * (1 - share) / n + weight / (4 * n))
    low, high = ((centre + sign * spread) / (1 + weight) for sign in (-1, 1))
    return Interval(0.0 if hits == 0 else low, 1.0 if hits == n else high)


def bootstrap(
    rows: np.ndarray, statistic: Statistic, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Interval | None:
    """Percentile bootstrap of ``statistic(rows)``; rows (n, ...) are drawn with replacement.

    None with fewer than two rows: one document says nothing about its neighbours.
    """
    n = len(rows)
    if n < 2:
        return None
    draws = np.random.default_rng(seed).integers(0, n, (resamples, n))
    values = [statistic(rows[draw]) for draw in draws]
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(float(low), float(high))


def paired_bootstrap(
    first: np.ndarray, second: np.ndarray, statistic: Statistic, **options
) -> tuple[float, Interval | None]:
    """``statistic(first) - statistic(second)`` and its interval, both drawn with the same documents.

    first, second: (n, ...), row i of both belongs to document i. Options are those of `bootstrap`.
    """
    if len(first) != len(second):
        raise ValueError(f"paired rows differ in number: {len(first)} and {len(second)}")
    both = np.stack([first, second], axis=1)

    def difference(rows: np.ndarray) -> float:
        return statistic(rows[:, 0]) - statistic(rows[:, 1])

    return difference(both), bootstrap(both, difference, **options)
