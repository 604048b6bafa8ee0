"""ROUGE as the ``rouge-score`` package has it: R-1, R-2, R-L and R-Lsum F1 x 100, Porter stemmer on.

R-Lsum needs sentences, and implementations disagree on them; ours are cut by one stated rule
(`split_sentences`), for predictions and references alike. A text without any word scores 0.
"""

from __future__ import annotations

import re
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import cache, lru_cache
from hashlib import sha256
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np
from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.scoring import fmeasure
from rouge_score.tokenize import tokenize

from infini_bench.files import writing
from infini_bench.workers import cores, process_pool

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
Pair = tuple[str, str]  # prediction, reference
SENTENCES = "blank lines; . ! ? before a capital or digit, titles and initials excepted"
SETTINGS = {  # for the record
    "package": f"rouge-score {version('rouge-score')}",
    "stemmer": "Porter",
    "score": "F1 x 100",
    "sentences": SENTENCES,
}
RULE = "1"  # of `split_sentences` and what is around it: part of the keys of scores on disk

_BATCH = 64  # pairs
_PARALLEL_FROM = 10_000_000_000  # characters x characters of all pairs: some six seconds on one core
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


def score_pairs(
    pairs: Sequence[Pair], processes: int | None = None, folder: Path | None = None
) -> np.ndarray:
    """F1 x 100 of each (prediction, reference): (pairs, 4) float64 in the order of `KINDS`.

    processes: 1 = this one only; unset = all cores if the work is worth starting them. folder: of a file that
    keeps the scores. Pairs that were scored before in this process, or are in the file, are looked up.
    """
    keys = [sha256("\0".join((SETTINGS["package"], RULE, *pair)).encode()).hexdigest() for pair in pairs]
    missing = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in _SCORES}
    if folder is not None and missing:
        _SCORES.update(kept := _kept(folder, list(missing)))
        missing = {key: pair for key, pair in missing.items() if key not in kept}
    if processes is None:
        work = sum(len(prediction) * len(reference) for prediction, reference in missing.values())
        processes = cores() if work > _PARALLEL_FROM else 1
    processes = min(processes, len(missing))
    if processes > 1:
        with process_pool(processes) as pool:
            _take(zip(missing, pool.map(score_pair, missing.values()), strict=True), folder)
    else:
        _take(((key, score_pair(pair)) for key, pair in missing.items()), folder)
    return np.array([_SCORES[key] for key in keys]).reshape(-1, len(KINDS))


def _take(scored: Iterator[tuple[str, np.ndarray]], folder: Path | None) -> None:
    """Remember scores as they come, on disk a batch at a time, so that who is stopped loses little."""
    while new := dict(islice(scored, _BATCH)):
        _SCORES.update(new)
        if folder is not None:
            _keep(folder, new)


def _open(folder: Path) -> closing[sqlite3.Connection]:
    folder.mkdir(parents=True, exist_ok=True)
    file = sqlite3.connect(folder / "rouge.sqlite", timeout=60)  # of several processes one writes at a time
    columns = ", ".join(f"{kind} REAL" for kind in KINDS)
    file.execute(f"CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, {columns})")
    return closing(file)


def _kept(folder: Path, keys: list[str]) -> dict[str, np.ndarray]:
    with writing(folder), _open(folder) as file:
        rows = (file.execute("SELECT * FROM scores WHERE key = ?", (key,)).fetchone() for key in keys)
        return {row[0]: np.array(row[1:]) for row in rows if row is not None}


def _keep(folder: Path, new: dict[str, np.ndarray]) -> None:
    with writing(folder), _open(folder) as file, file:  # the last: one transaction
        rows = [(key, *map(float, scores)) for key, scores in new.items()]
        file.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?, ?, ?, ?)", rows)


def score_documents(
    predictions: list[list[str]], references: list[list[str]], folder: Path | None = None
) -> list[list[np.ndarray]]:
    """For each document and each of its predictions, the scores against its references: (references, 4).

    folder: as in `score_pairs`.
    """
    documents = list(zip(predictions, references, strict=True))
    pairs = [(text, goal) for texts, goals in documents for text in texts for goal in goals]
    scores = iter(score_pairs(pairs, folder=folder))
    return [[np.stack([next(scores) for _ in goals]) for _ in texts] for texts, goals in documents]


def has_words(text: str) -> bool:
    """Whether ROUGE sees anything in a text."""
    return re.search(r"[a-z0-9]", text.lower()) is not None


def score_pair(pair: Pair) -> np.ndarray:
    """F1 x 100 of one (prediction, reference): (4,) float64 in the order of `KINDS`.

    The package counts n-grams. It would fill a table for each two sentences and for the two texts, which is
    nearly all of its work: what R-L and R-Lsum need of these tables is found here from rows of bits.
    """
    sentences = [_sentence_tokens(text) for text in pair]
    own, goal = ([word for sentence in text for word in sentence] for text in sentences)
    counted = _scorer().score(" ".join(goal), " ".join(own))
    common = {"rougeL": lcs_length(own, goal), "rougeLsum": union_lcs(*sentences)}
    sizes = max(len(own), 1), max(len(goal), 1)
    scores = {name: fmeasure(*(hits / size for size in sizes)) for name, hits in common.items()}
    scores |= {name: score.fmeasure for name, score in counted.items()}
    return np.array([100 * scores[kind] for kind in KINDS])


def lcs_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    return len(first) - _free(_places(first), len(first), second)[-1].bit_count()


def union_lcs(own: Sequence[Sequence[str]], goal: Sequence[Sequence[str]]) -> int:
    """Words of the reference's sentences ``goal`` that are in the longest common subsequence with one of the
    prediction's sentences ``own``; of each word no more than the prediction has (as in ROUGE 1.5.5).
    """
    left, hits = Counter(word for sentence in own for word in sentence), 0
    for sentence in goal:
        places, found = _places(sentence), 0
        for other in own:
            found |= _lcs(sentence, other, places)
        for i, word in enumerate(sentence):
            if found >> i & 1 and left[word] > 0:
                left[word] -= 1
                hits += 1
    return hits


def _lcs(first: Sequence[str], second: Sequence[str], places: dict[str, int]) -> int:
    """Bits of ``first`` that are in a longest common subsequence: the one that the package reads from its
    table, from the end, going back in ``second`` only where going back in ``first`` would lose a word.
    """
    free, found = _free(places, len(first), second), 0
    i, j = len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            found |= 1 << i - 1
            i, j = i - 1, j - 1
        elif free[j] >> i - 1 & 1:
            i -= 1
        else:
            j -= 1
    return found


def _places(words: Sequence[str]) -> dict[str, int]:
    """The bits at which each word stands."""
    places: dict[str, int] = {}
    for i, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << i
    return places


def _free(places: dict[str, int], length: int, second: Sequence[str]) -> list[int]:
    """After none, one, ... all of the words of ``second``: the bits of the first text at which the length of
    the longest common subsequence does not grow, by the bit-parallel algorithm of Hyyro (2004).
    """
    everything = (1 << length) - 1
    rows = [everything]
    for word in second:
        hit = rows[-1] & places.get(word, 0)
        rows.append((rows[-1] + hit | rows[-1] - hit) & everything)
    return rows


def pairwise(scores_R4: np.ndarray) -> np.ndarray:
    """Mean over a document's R references: (4,)."""
    return scores_R4.mean(axis=0)


def best(scores_R4: np.ndarray) -> np.ndarray:
    """The best of a document's R references, each kind for itself: (4,)."""
    return scores_R4.max(axis=0)


def overall(scores_D4: np.ndarray) -> float:
    """Geometric mean of R-1, R-2 and R-L, each averaged over the D documents first (as SCROLLS does)."""
    return float(np.prod(scores_D4[:, :3].mean(axis=0)) ** (1 / 3))


class _Stemmer(PorterStemmer):
    """A book has few words, many times."""

    @cache  # noqa: B019 - one instance, as long as the process
    def stem(self, word: str) -> str:
        return str(super().stem(word))


@cache
def _stemmer() -> _Stemmer:
    return _Stemmer()


def tokens(text: str) -> list[str]:
    """What ROUGE counts: lower-case words of letters and digits, those of four or more characters stemmed."""
    return list(tokenize(text, _stemmer()))


@lru_cache(64)  # a book's references meet all of its summaries
def _sentence_tokens(text: str) -> list[list[str]]:
    return [tokens(sentence) for sentence in split_sentences(text)]


class _Blanks:
    """A tokenizer, to the package, of tokens with blanks between them."""

    tokenize = staticmethod(str.split)


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rouge1", "rouge2"], tokenizer=_Blanks())


def _abbreviated(text: str) -> bool:
    """Does text, up to and with a candidate's first mark, end in an abbreviation's point?"""
    words = text.rstrip().rsplit(maxsplit=1)
    word = words[-1].lstrip(_OPENING) if words else ""
    if not word.endswith("."):
        return False
    stem = word[:-1]
    return bool(_ABBREVIATIONS.fullmatch(stem.lower()) or re.fullmatch("[A-Z]", stem))
