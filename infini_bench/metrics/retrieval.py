"""Retrieval of a key: was it given back exactly, and how many of its tokens were right.

Shapes: n trials, A answer tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from infini_bench.metrics.intervals import wilson


class Percent(NamedTuple):
    """A share of hits in percent with its Wilson interval; n counts what was tried."""

    value: float
    low: float
    high: float
    n: int


def exact_match(predicted_nA: np.ndarray, expected_nA: np.ndarray) -> Percent:
    """Trials whose every answer token is right; n = trials."""
    return percent((predicted_nA == expected_nA).all(axis=1))


def token_accuracy(predicted_nA: np.ndarray, expected_nA: np.ndarray) -> Percent:
    """Answer tokens that are right, all trials together; n = trials x answer tokens.

    The interval takes tokens as independent; those of one key are not quite, so it is a little narrow.
    """
    return percent((predicted_nA == expected_nA).ravel())


def percent(hits: np.ndarray) -> Percent:
    """Share of True in a boolean array (n,), n > 0."""
    count, n = int(hits.sum()), len(hits)
    low, high = wilson(count, n)
    return Percent(100 * count / n, 100 * low, 100 * high, n)
