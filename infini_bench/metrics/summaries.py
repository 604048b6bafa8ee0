"""What a summary is like, beside its overlap with references: its length, what it copies, repeats and names.

* n-grams are of five words, lower-case runs of letters and digits, as ROUGE counts them but unstemmed.
* A *name* is a word of three or more letters with a capital that stands inside a sentence (a lower-case word
  or a comma before it) and never occurs in lower case in the same text. So months and nationalities are
  names, and one that only ever begins a sentence is missed.
* A book's *late* names stand at least twice so in its second half (of characters) and nowhere, in
  whatever place, in the first: who has not read behind the middle, and has not known the book before, cannot
  name them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

N = 5
METRICS = ("summary_words", "copied", "repeated", "names_in_book", "late_names", "late_name_recall", "empty")

_WORD = re.compile(r"[a-z0-9]+")
_CAPITALISED = re.compile(r"\b[A-Z][a-z]{2,}\b")
_INSIDE = re.compile(r"(?<=[a-z,]\s)[A-Z][a-z]{2,}\b")
_LOWER = re.compile(r"\b[a-z]{3,}\b")


def five_grams(text: str) -> Iterator[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return zip(*(words[i:] for i in range(N)), strict=False)


def names(text: str, times: int = 1) -> set[str]:
    """The text's names that stand at least ``times`` times inside a sentence."""
    lower = set(_LOWER.findall(text))
    counts = Counter(_INSIDE.findall(text))
    return {name for name, n in counts.items() if n >= times and name.lower() not in lower}


class Reader:
    """Measures summaries of one book; what it needs of the book is counted once.

    references: whose late names a summary is asked for.
    """

    def __init__(self, book: str, references: list[str]):
        middle = len(book) // 2
        self.grams = set(five_grams(book))
        self.capitalised = set(_CAPITALISED.findall(book))
        self.late = names(book[middle:], 2) - set(_CAPITALISED.findall(book[:middle]))
        told = set().union(*(_CAPITALISED.findall(text) for text in references))
        self.asked = self.late & told

    def measure(self, text: str) -> dict[str, float]:
        """METRICS of a summary; NaN where it, or the references, give nothing to count.

        copied: percent of its 5-grams that the book has; repeated: percent of those that it had already;
        names_in_book: percent of its names that occur in the book; late_names: how many of the book's late
        names it has; late_name_recall: percent of those in the references that it has; empty: 100 for a
        summary without any letter or digit, else 0.
        """
        grams, own = list(five_grams(text)), names(text)
        mentioned = set(_CAPITALISED.findall(text))
        words = len(_WORD.findall(text.lower()))
        return {
            "summary_words": words,
            "copied": _percent(sum(gram in self.grams for gram in grams), len(grams)),
            "repeated": _percent(len(grams) - len(set(grams)), len(grams)),
            "names_in_book": _percent(len(own & self.capitalised), len(own)),
            "late_names": len(mentioned & self.late),
            "late_name_recall": _percent(len(mentioned & self.asked), len(self.asked)),
            "empty": 0.0 if words else 100.0,
        }


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else math.nan
