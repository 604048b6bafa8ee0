"""Summaries without a model: some of the book's own sentences, in the book's order.

* ``lead``: the first k. ``random``: k at random, ``samples`` times.
* ``lexrank``: the k most central by LexRank (Erkan and Radev 2004, package sumy). A book has thousands of
  sentences and LexRank compares all pairs, so windows of `WINDOW` go first: the best of each, a tenth or what
  k needs, stay, until one window is left.
* ``oracle``: not a summary but a bound: greedily the sentence that raises the mean F1 of R-1 and R-2 over the
  references most, until none does.

k is the one of ``task.sentences`` with the best overall on the validation split, for each kind of reference
by itself: both kinds together, and each alone. The test split chooses nothing. The whole book is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from infini_bench.data import Document
from infini_bench.errors import UserError
from infini_bench.metrics import rouge
from infini_bench.workers import cores, process_pool

from .booksum_score import Scores, Written, kinds_of

if TYPE_CHECKING:
    from .booksum import Booksum

WINDOW = 100  # sentences that LexRank compares with one another
# number of sentences asked for (oracle: number of the kind of reference) -> sentences of each sample
Extract = dict[int, list[list[int]]]


@dataclass(frozen=True)
class Job:
    """One book; ``goals``: the references of each kind, for the oracle."""

    method: str
    text: str
    counts: tuple[int, ...]
    samples: int
    seed: tuple[int, ...]
    goals: tuple[tuple[str, ...], ...] = ()


def extracted(booksum: Booksum, books: list[Document], progress) -> list[Written]:
    """Summaries of the evaluated books, for each kind of reference its own."""
    task, cfg = booksum.task, booksum.cfg
    kinds = kinds_of(books, task.kind)
    if task.baseline == "oracle":
        made = extract_all(booksum, books, progress, kinds)
        return [written(booksum, books, kind, made, i) for i, kind in enumerate(kinds)]
    tuning = [book for _, book in booksum.asked("validation")]
    tried = extract_all(booksum, tuning, progress)
    made = tried if task.split == "validation" else extract_all(booksum, books, progress)
    scores = Scores(cfg, tuning, booksum.row)
    trials = {(kind, k): written(booksum, tuning, kind, tried, k) for kind in kinds for k in task.sentences}
    scores.warm(list(trials.values()))
    found = []
    for kind in kinds:
        each = {k: trials[kind, k] for k in task.sentences}
        reached = {k: rouge.overall(scores.rouge_of(one, kind)) for k, one in each.items() if one.texts}
        if not reached:
            raise UserError(
                f'Validation has no book with a "{kind}" summary to choose k on; use another split.'
            )
        best = max(reached, key=lambda k: reached[k])
        one = written(booksum, books, kind, made, best)
        one.extra |= {"sentences": best, "chosen_on": "validation", "validation_overall": reached}
        found.append(one)
    return found


def written(
    booksum: Booksum, books: list[Document], kind: str | None, made: list[Extract], k: int
) -> Written:
    """The summaries of k sentences of those books that have such a reference."""
    one = Written("pairwise", None, "extractive", booksum.cfg.seed, [kind])
    for number, (book, extract) in enumerate(zip(books, made, strict=True)):
        if kind in (None, *(summary.source for summary in book.summaries)):
            sentences = rouge.split_sentences(book.text)
            one.sentences[number] = extract[k]
            one.texts[number] = ["\n\n".join(sentences[i] for i in chosen) for chosen in extract[k]]
    return one


def extract_all(booksum: Booksum, books: list[Document], progress, kinds=()) -> list[Extract]:
    """Of every book, in processes of their own where the work is worth it. kinds: what the oracle knows."""
    task, seed = booksum.task, booksum.cfg.seed
    if task.baseline == "lexrank":
        import_lexrank()
    goals = [
        tuple(tuple(s.text for s in book.summaries if kind in (None, s.source)) for kind in kinds)
        for book in books
    ]
    samples = task.samples if task.baseline == "random" else 1
    jobs = [
        Job(str(task.baseline), book.text, tuple(task.sentences), samples, (seed, number), own)
        for number, (book, own) in enumerate(zip(books, goals, strict=True))
    ]
    heavy = task.baseline in ("lexrank", "oracle") and sum(len(book.text) for book in books) > 10_000_000
    found = []
    with progress.task(task.baseline, len(books)) as bar:
        for extract in _in_processes(jobs) if heavy else map(extract_one, jobs):
            found.append(extract)
            bar.advance()
    return found


def _in_processes(jobs: list[Job]) -> Iterator[Extract]:
    with process_pool(cores()) as pool:
        yield from pool.map(extract_one, jobs)


def extract_one(job: Job) -> Extract:
    """Which sentences of one book a method takes."""
    sentences = rouge.split_sentences(job.text)
    everything = range(len(sentences))
    if job.method == "oracle":
        words = [rouge.tokens(sentence) for sentence in sentences]
        return {kind: [oracle(words, goals) if goals else []] for kind, goals in enumerate(job.goals)}
    if job.method == "lead":
        return {k: [list(everything[:k])] for k in job.counts}
    if job.method == "random":
        rngs = [np.random.default_rng([*job.seed, sample]) for sample in range(job.samples)]
        orders = [rng.permutation(len(sentences)) for rng in rngs]
        return {k: [sorted(map(int, order[:k])) for order in orders] for k in job.counts}
    return {k: [chosen] for k, chosen in lexrank(sentences, job.counts).items()}


# LexRank -------------------------------------------------------------------------------------------------


def import_lexrank():
    """sumy's parts. Raises UserError if it is not installed."""
    try:
        from sumy.models.dom import ObjectDocumentModel, Paragraph, Sentence
        from sumy.summarizers.lex_rank import LexRankSummarizer
    except ImportError as error:
        raise UserError(
            f"--baseline lexrank needs sumy ({error}); pip install 'infini-bench[extract]'."
        ) from error
    return ObjectDocumentModel, Paragraph, Sentence, LexRankSummarizer()


def lexrank(sentences: list[str], counts: Iterable[int]) -> dict[int, list[int]]:
    """k -> numbers of the k most central sentences, in order."""
    ranks: dict[tuple[int, ...], list[int]] = {}  # windows meet again for another k

    def ranked(window: tuple[int, ...]) -> list[int]:
        if window not in ranks:
            ranks[window] = central([sentences[i] for i in window])
        return [window[i] for i in ranks[window]]

    found = {}
    for k in counts:
        left = [i for i, sentence in enumerate(sentences) if rouge.has_words(sentence)]
        while len(left) > max(k, WINDOW):
            share = max(0.1, k / len(left))
            windows = [tuple(left[a : a + WINDOW]) for a in range(0, len(left), WINDOW)]
            left = sorted(
                i for window in windows for i in ranked(window)[: max(1, round(share * len(window)))]
            )
        found[k] = sorted(ranked(tuple(left))[:k]) if len(left) > k else left
    return found


def central(sentences: list[str]) -> list[int]:
    """Numbers of the sentences, the most central first."""
    document, paragraph, sentence, summarizer = import_lexrank()

    class Words:
        def to_words(self, text: str) -> tuple[str, ...]:
            return tuple(rouge.tokens(text))

    # sumy's call gives sentences, and equal ones once; what it computes inside gives a score for each
    parts = [sentence(text, Words()) for text in sentences]
    words = [summarizer._to_words_set(part) for part in document([paragraph(parts)]).sentences]
    tf, idf = summarizer._compute_tf(words), summarizer._compute_idf(words)
    scores = summarizer.power_method(
        summarizer._create_matrix(words, summarizer.threshold, tf, idf), summarizer.epsilon
    )
    return [int(i) for i in np.argsort(-scores, kind="stable")]


# Oracle --------------------------------------------------------------------------------------------------


def oracle(words: list[list[str]], goals: Iterable[str]) -> list[int]:
    """Numbers of the sentences, given by their words, that greedy search takes, in order."""
    gauges = [Gauge(words, rouge.tokens(goal), n) for goal in goals for n in (1, 2)]
    chosen: list[int] = []
    best = 0.0
    while True:
        values = np.mean([gauge.values() for gauge in gauges], axis=0)
        values[chosen] = 0
        top = int(np.argmax(values))
        if values[top] <= best:
            break
        best = float(values[top])
        chosen.append(top)
        for gauge in gauges:
            gauge.take(top)
    return sorted(chosen)


class Gauge:
    """ROUGE-n F1 of the sentences taken so far with each further one, against one reference.

    n-grams across the border of two sentences are not counted here, as they are by ROUGE itself.
    """

    def __init__(self, sentences: list[list[str]], goal: list[str], n: int):
        wanted = Counter(grams(goal, n))
        column = {gram: i for i, gram in enumerate(wanted)}
        self.room = np.array([*wanted.values()], float)  # of each n-gram, how often it may still count
        self.asked, self.taken, self.hits = self.room.sum(), 0.0, 0.0
        self.sizes = np.array([max(0, len(words) - n + 1) for words in sentences], float)
        found = [
            (row, column[gram], count)
            for row, words in enumerate(sentences)
            for gram, count in Counter(g for g in grams(words, n) if g in column).items()
        ]
        self.rows, self.columns, self.counts = np.array(found, int).reshape(-1, 3).T

    def gains(self) -> np.ndarray:
        new = np.minimum(self.counts, self.room[self.columns])
        return np.bincount(self.rows, new, len(self.sizes))

    def values(self) -> np.ndarray:
        total = self.taken + self.sizes + self.asked
        return 2 * (self.hits + self.gains()) / np.maximum(total, 1)

    def take(self, sentence: int) -> None:
        self.hits += self.gains()[sentence]
        self.taken += self.sizes[sentence]
        own = self.rows == sentence
        self.room[self.columns[own]] -= np.minimum(self.counts[own], self.room[self.columns[own]])


def grams(words: list[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(n)), strict=False)
