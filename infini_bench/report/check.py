"""What `make demo` must show, judged from tidy rows: memories that work and models that learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

MEMORIES = ("infini_linear", "infini_delta")
LEAST = 80.0  # percent exact match with memory on
NEAR_CHANCE = 10.0  # points above chance, with memory off; below it the model answers no legal key at all
FAR = 4  # segments between needle and question
BETTER_BY = 1.0  # bits a token, than a unigram model


@dataclass(frozen=True)
class Check:
    ok: bool
    text: str


def demo_checks(rows: list[Row], models: Sequence[str]) -> list[Check]:
    """What must hold for every memory and every language model; a number that is missing does not hold.

    Memory on: each length and depth by itself. Memory off: each length with its depths together, since ten
    points are less than the noise of a few trials.
    """
    found = [check for memory in MEMORIES if memory in models for check in _passkey(rows, memory)]
    return found + [_language(rows, model) for model in models]


def _passkey(rows: list[Row], model: str) -> list[Check]:
    own = [row for row in rows if row["model"] == model and row["metric"] == "exact_match"]
    far = [row for row in own if row["extra"]["segments"] >= FAR]
    on = [row for row in far if row["condition"] == "constant"]
    off = [row for row in far if row["condition"] == "memory_off"]
    lengths = sorted({row["length"] for row in off})
    checks = [_on(row) for row in on] + [_off([row for row in off if row["length"] == n]) for n in lengths]
    return (
        checks
        if on and off
        else [*checks, Check(False, f"{model}: no needle {FAR} segments back, on and off")]
    )


def _on(row: Row) -> Check:
    place = f"{row['position']} ({row['extra']['segments']} segments back)"
    text = f"{row['model']}, {row['length']} tokens, {place}: {row['value']:.0f} %, at least {LEAST:.0f} %"
    return Check(row["value"] >= LEAST, text)


def _off(rows: list[Row]) -> Check:
    trials = sum(row["n"] for row in rows)
    value = sum(row["value"] * row["n"] for row in rows) / trials
    chance = rows[0]["extra"]["chance"]
    text = f"{rows[0]['model']}, {rows[0]['length']} tokens, memory off: {value:.0f} %, "
    text += f"at most {NEAR_CHANCE:.0f} points above chance, {chance:.1f} %"
    return Check(value - chance <= NEAR_CHANCE, text)


def _language(rows: list[Row], model: str) -> Check:
    def values(metric: str, missing: float) -> list[float]:
        found = [row["value"] for row in rows if row["model"] == model and row["metric"] == metric]
        return [missing if value is None else value for value in found] or [missing]

    gain = min(values("unigram_bits_per_token", -math.inf)) - max(values("bits_per_token", math.inf))
    text = f"{model}: {gain:.2f} bits a token better than a unigram model, at least {BETTER_BY:.0f}"
    return Check(gain >= BETTER_BY, text)
