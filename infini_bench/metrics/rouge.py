"""ROUGE by the ``rouge-score`` package: R-1, R-2, R-L and R-Lsum F1 x 100, Porter stemmer on.

R-Lsum needs sentences, and implementations disagree on them; ours are cut by one stated rule
(`split_sentences`), for predictions and references alike. A text without any word scores 0.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from hashlib import sha256
from multiprocessing import get_context

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
Pair = tuple[str, str]  # prediction, reference

_PARALLEL_FROM = 500_000_000  # characters x characters of all pairs: some ten seconds on one core
_SCORES: dict[str, np.ndarray] = {}  # by hash of the pair: the same pair is scored once a process

_OPENING, _CLOSING = "\"'\u201c\u2018([", "\"'\u201d\u2019)]"
_BORDER = re.compile(rf"[.!?]+[{re.escape(_CLOSING)}]*\s+(?=[{re.escape(_OPENING)}]*[A-Z0-9])")
_ABBREVIATIONS = re.compile("mr|mrs|ms|dr|st|prof|capt|col|gen|lt|rev|hon|jr|sr|esq|vs|no|vol|e\\.g|i\\.e")


def split_sentences(text: str) -> list[str]:
    """Sentences by rule: a blank line ends one; so does ``.``, ``!`` or ``?`` with any closing quotes or
    brackets, if white space and then a capital or a digit (behind any opening ones) follow, unless the word
    before a single ``.`` is a title or abbreviation (Mr, Dr, St, vs, e.g ...) or one capital letter.
    White space inside a sentence becomes single spaces.
    """
    sentences = []
    for paragraph in re.split(r"\n\s*\n", text):
        start = 0
        for border in _BORDER.finditer(paragraph):
            if not _abbreviated(paragraph[start : border.start() + 2]):
                sentences.append(paragraph[start : border.end()])
                start = border.end()
        sentences.append(paragraph[start:])
    return [" ".join(sentence.split()) for sentence in sentences if sentence.strip()]


def score_pairs(pairs: Sequence[Pair], processes: int | None = None) -> np.ndarray:
    """F1 x 100 of each (prediction, reference): (pairs, 4) float64 in the order of `KINDS`.

    processes: 1 = this one only; unset = all cores if the work is worth starting them. Pairs that were scored
    before in this process are looked up.
    """
    keys = [sha256("\0".join(pair).encode()).hexdigest() for pair in pairs]
    missing = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in _SCORES}
    if processes is None:
        work = sum(len(prediction) * len(reference) for prediction, reference in missing.values())
        processes = (os.cpu_count() or 1) if work > _PARALLEL_FROM else 1
    processes = min(processes, len(missing))
    if processes > 1:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            _SCORES.update(zip(missing, pool.map(score_pair, missing.values()), strict=True))
    else:
        _SCORES.update((key, score_pair(pair)) for key, pair in missing.items())
    return np.array([_SCORES[key] for key in keys]).reshape(-1, len(KINDS))


def score_documents(predictions: list[list[str]], references: list[list[str]]) -> list[list[np.ndarray]]:
    """For each document and each of its predictions, the scores against its references: (references, 4)."""
    documents = list(zip(predictions, references, strict=True))
    pairs = [(text, goal) for texts, goals in documents for text in texts for goal in goals]
    scores = iter(score_pairs(pairs))
    return [[np.stack([next(scores) for _ in goals]) for _ in texts] for texts, goals in documents]


def has_words(text: str) -> bool:
    """Whether ROUGE sees anything in a text."""
    return re.search(r"[a-z0-9]", text.lower()) is not None


def score_pair(pair: Pair) -> np.ndarray:
    """F1 x 100 of one (prediction, reference): (4,) float64 in the order of `KINDS`."""
    prediction, reference = ("\n".join(split_sentences(text)) for text in pair)
    scores = _scorer().score(reference, prediction)
    return np.array([100 * scores[kind].fmeasure for kind in KINDS])


def pairwise(scores_R4: np.ndarray) -> np.ndarray:
    """Mean over a document's R references: (4,)."""
    return scores_R4.mean(axis=0)


def best(scores_R4: np.ndarray) -> np.ndarray:
    """The best of a document's R references, each kind for itself: (4,)."""
    return scores_R4.max(axis=0)


def overall(scores_D4: np.ndarray) -> float:
    """Geometric mean of R-1, R-2 and R-L, each averaged over the D documents first (as SCROLLS does)."""
    return float(np.prod(scores_D4[:, :3].mean(axis=0)) ** (1 / 3))


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(list(KINDS), use_stemmer=True)


def _abbreviated(text: str) -> bool:
    """Does text, up to and with a candidate's first mark, end in an abbreviation's point?"""
    words = text.rstrip().rsplit(maxsplit=1)
    word = words[-1].lstrip(_OPENING) if words else ""
    if not word.endswith("."):
        return False
    stem = word[:-1]
    return bool(_ABBREVIATIONS.fullmatch(stem.lower()) or re.fullmatch("[A-Z]", stem))
