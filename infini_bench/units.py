"""Lengths, depths, counts and did-you-mean, as people write them. Standard library only."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from infini_bench.errors import UserError

K = 1024
M = 1024 * 1024

NAMED_DEPTHS = ("start", "middle", "end", "end_outside")
_FACTORS = {"": 1, "K": K, "M": M}
_LENGTH = re.compile(r"([0-9]{1,12})(?:\.([0-9]{1,12}))?([KM]?)", re.IGNORECASE)
_PERCENT = re.compile(r"([0-9]{1,3})(?:\.([0-9]{1,6}))?%?")


def parse_length(text: str | int) -> int:
    """Number of tokens of ``"512"``, ``"4K"`` (x 1024), ``"1M"`` (x 1024 x 1024) or ``"1.5K"``.

    Raises UserError for anything else: other suffixes, fractions of a token, zero, negative numbers.
    """
    match = _LENGTH.fullmatch(str(text).strip())
    if match is None:
        raise UserError(f'"{text}" is not a length; write a number of tokens such as 512, 4K or 1M.')
    whole, fraction, suffix = match.group(1), match.group(2) or "", match.group(3).upper()
    tokens, remainder = divmod(int(whole + fraction) * _FACTORS[suffix], 10 ** len(fraction))
    if remainder:
        raise UserError(f'The length "{text}" is not a whole number of tokens.')
    if tokens == 0:
        raise UserError(f'The length "{text}" is empty; it must be at least 1 token.')
    return tokens


def format_length(tokens: int) -> str:
    """The shortest exact text that `parse_length` reads back: 4096 -> "4K", 1000 -> "1000"."""
    for suffix, factor in (("M", M), ("K", K)):
        if tokens and tokens % factor == 0:
            return f"{tokens // factor}{suffix}"
    return str(tokens)


def counted(number: int, noun: str) -> str:
    """``1 job``, ``2 jobs``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def parse_depth(text: str | int) -> str:
    """Canonical needle depth: one of `NAMED_DEPTHS`, or a percentage as ``"0"`` ... ``"100"``.

    ``"50%"``, ``"50.0"`` and ``50`` all give ``"50"``. Raises UserError for anything else.
    """
    word = str(text).strip()
    if word in NAMED_DEPTHS:
        return word
    match = _PERCENT.fullmatch(word)
    if match is None:
        choices = "start, middle, end, end_outside or a percentage such as 25"
        raise UserError(f'"{text}" is not a depth{suggest(word, NAMED_DEPTHS)}; write {choices}.')
    fraction = (match.group(2) or "").rstrip("0")
    if int(match.group(1)) > 100 or (int(match.group(1)) == 100 and fraction):
        raise UserError(f'The depth "{text}" lies outside 0-100 %.')
    return str(int(match.group(1))) + (f".{fraction}" if fraction else "")


def suggest(word: str, options: Iterable[str]) -> str:
    """`` (did you mean "x"?)`` for the nearest option, or an empty string if none is near."""
    near = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    return f' (did you mean "{near[0]}"?)' if near else ""
