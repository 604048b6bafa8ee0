"""Book summaries (Table 4): a whole book is read, its summary written from the carried state.

Protocol, version 4. Prompt: the book's tokens (the first ``input_tokens`` and, of them, each of ``lengths``),
then `SEPARATOR`. The state is carried from the first token to the last (a memory that retrieves reads whole
segments with its window alone, as Unlimiformer encodes; version 3 searched there, too, in the square of a
book's time); then up to ``max_new_tokens`` are generated, ended by the end-of-text token: greedily, or by
nucleus sampling with ``temperature`` and ``top_p``, ``samples`` a book. Token t of a sample is drawn with
number t of numpy's ``default_rng([seed, book, sample])``.

* ``rouge1``, ``rouge2``, ``rougeL``, ``rougeLsum``: F1 x 100 (metrics/rouge.py), mean over books.
* ``overall``: geometric mean of the books' mean R-1, R-2 and R-L. ``overall_gain``: of a length over the next
  shorter one, on the books that the shorter one cuts.
* ``summary_tokens``: mean number generated; and what metrics/summaries.py measures, against the whole book.

``position`` names the kind of reference (`Summary.source`) if a split has several; without one, all count. A
row's books are those with a reference of its kind; with ``kind`` no others are read and no other kind counts.
Conditions: ``pairwise`` = mean over a book's references, ``best`` = the best of them, kind of ROUGE by kind;
the controls, at the longest input, are scored pairwise.
``memory_off``: nothing from before a segment is used. ``other_memory``: the prompt's end (the book's
unfinished segment and the separator) follows on the state of the batch's next book at its own last border.
``shuffled``: the whole segments of the book are read in random order. ``gate_G``: all gates have the value G.
The first three are left out for models without a memory that could be switched off, the second also if there
is only one book. A book's scores are means over its samples. Intervals: percentile bootstrap over books.

``baseline``: other summaries, see booksum_extract.py and, of a model, `Writer.map_reduce`.

Training: book, separator, one of the book's summaries (another each epoch), end-of-text token; the loss is
the mean over the summary and its end + ``lm_weight`` x the mean over what else has a gradient. A summary of
more than ``train_summary_tokens`` is cut there and has no end (version 2 put one behind the cut). With
``train_kind``, on summaries of this kind and the books that have one, in training and validation. ``prefix``:
of the book the first ``train_input_tokens``. ``whole_book``: all of it (or ``input_tokens``); the last
``gradient_segments`` of book and separator, and the summary, have a gradient; what is before is only read.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch

from infini_bench import data
from infini_bench.errors import UserError
from infini_bench.progress import NullProgress
from infini_bench.summaries import save_summaries
from infini_bench.units import parse_length

from .base import Batch, Row, Task, evaluating, mean_over_rows
from .booksum_extract import extracted
from .booksum_score import Scores, Written
from .booksum_write import Writer

SEPARATOR = "\n\nSummary of the text above:\n\n"


class Booksum(Task):
    name = "booksum"
    version = "4"
    score = ("overall", "rouge1", "rouge2", "rougeL", "rougeLsum")

    def __init__(self, cfg, tokenizer=None):
        super().__init__(cfg, tokenizer)
        self.store, self.taught = cache(self._store), cache(self._taught)

    @cached_property
    def fingerprint(self) -> str:
        """A baseline without weights learns nothing from the train split, and sees validation."""
        others = "validation" if self.task.weightless else "train"
        return data.fingerprint([*self.books(others), *self.books(self.task.split)])

    @cached_property
    def separator(self) -> np.ndarray:
        return self.tokenizer.encode(SEPARATOR)

    def books(self, split: str) -> list[data.Document]:
        return self.documents(split, pairs=True)

    def _build_tokenizer(self):
        def texts():
            for book in self.books("train"):
                yield book.text
                yield from (summary.text for summary in book.summaries)

        return data.build_tokenizer(self.cfg.data, texts)

    def _store(self, split: str) -> data.TokenStore:
        return data.token_store(self.cfg.data, self.books(split), self.tokenizer)

    def tokens(self, split: str, index: int) -> np.ndarray:
        """Of a book, as far as it is ever read."""
        return self.store(split).tokens(index)[: self.task.input_tokens]

    # Training ----------------------------------------------------------------------------------------------

    def check_training(self) -> None:
        for split in ("train", *(["validation"] if self.cfg.trainer.validate_every else [])):
            self.taught(split)

    def batch(self, cursor: int, rows: int, segments: int | None = None, split: str = "train") -> Batch:
        """Books in a new order each epoch.

        ``segments``: of the book instead of ``train_input_tokens``, or instead of ``gradient_segments``.
        """
        make = self._prefix if self.task.protocol == "prefix" else self._whole_book
        examples = [make(number, segments, split) for number in range(cursor, cursor + rows)]
        before, *parts = zip(*examples, strict=True)
        tokens, answer, rest = (torch.from_numpy(np.stack(part)) for part in parts)
        weights = mean_over_rows(answer) + self.task.lm_weight * mean_over_rows(rest)
        read = None if self.task.protocol == "prefix" else [torch.from_numpy(ids) for ids in before]
        return Batch(tokens, weights, answer, read)

    def _prefix(self, number: int, segments: int | None, split: str) -> tuple[np.ndarray, ...]:
        index, summary, whole = self._pair(number, split)
        room = segments * self.cfg.memory.segment if segments else self.task.train_input_tokens
        prompt = np.concatenate([self.tokens(split, index)[:room], self.separator])
        return prompt[:0].astype(np.int64), *self._example(prompt, summary, whole, room + len(self.separator))

    def _whole_book(self, number: int, segments: int | None, split: str) -> tuple[np.ndarray, ...]:
        index, summary, whole = self._pair(number, split)
        prompt = np.concatenate([self.tokens(split, index), self.separator])
        segment, kept = self.cfg.memory.segment, segments or self.task.gradient_segments
        border = max(0, -(-len(prompt) // segment) - kept) * segment
        return prompt[:border].astype(np.int64), *self._example(
            prompt[border:], summary, whole, kept * segment
        )

    def _taught(self, split: str) -> list[tuple[int, list[str]]]:
        """Numbers of the books that are trained on, and their summaries."""
        kind, books = self.task.train_kind, self.books(split)
        texts = [[s.text for s in book.summaries if kind in (None, s.source)] for book in books]
        if not any(texts):
            there = ", ".join(sorted({s.source for book in books for s in book.summaries})) or "none"
            raise UserError(f'Split "{split}" has no summary of task.train_kind={kind}; its kinds: {there}.')
        return [(index, each) for index, each in enumerate(texts) if each]

    def _pair(self, number: int, split: str) -> tuple[int, np.ndarray, bool]:
        """The book, the summary's tokens of an example, and whether they are all of it."""
        books = self.taught(split)
        epoch, place = divmod(number, len(books))
        rng = np.random.default_rng([self.cfg.seed, zlib.crc32(split.encode()), epoch])
        index, texts = books[int(rng.permutation(len(books))[place])]
        tokens = self.tokenizer.encode(texts[epoch % len(texts)])
        most = self.task.train_summary_tokens
        return index, tokens[:most], len(tokens) <= most

    def _example(
        self, prompt: np.ndarray, summary: np.ndarray, whole: bool, room: int
    ) -> tuple[np.ndarray, ...]:
        """Tokens (T + 1,), and masks (T,) of the summary's targets and of all others; padded at the end.

        The end-of-text token is a target behind a whole summary only: behind a cut one it would teach to
        stop in the middle of a sentence.
        """
        length = room + self.task.train_summary_tokens + 1
        end = len(prompt) + len(summary)
        tokens = np.full(length, self.tokenizer.eos_id, np.int64)
        tokens[:end] = np.concatenate([prompt, summary])
        answer, rest = np.zeros((2, length - 1), np.float32)
        rest[: len(prompt) - 1] = 1
        answer[len(prompt) - 1 : end - 1 + whole] = 1
        return tokens, answer, rest

    # Evaluation --------------------------------------------------------------------------------------------

    def evaluate(self, model, progress=None) -> list[Row]:
        """model: None for a baseline without weights."""
        books = [book for _, book in self.asked()]
        shown = progress or NullProgress()
        if self.task.weightless:
            written = extracted(self, books, shown)
        else:
            with evaluating(model):
                written = self._write(model, [place for place, _ in self.asked()], shown)
        scores = Scores(self.cfg, books, self.row)
        file = save_summaries(Path(self.cfg.records), (line for w in written for line in w.lines(books)))
        return scores.rows(written, {"summaries": file})

    def asked(self, split: str | None = None) -> list[tuple[int, data.Document]]:
        """The books that are summarised, by their places in the split, with the references that count.

        split: another one than the evaluation's, whole.
        """
        kind, place = self.task.kind, split or self.task.split
        books = [
            (index, replace(book, summaries=tuple(s for s in book.summaries if kind in (None, s.source))))
            for index, book in enumerate(self.books(place))
        ]
        found = [(index, book) for index, book in books if book.summaries]
        if not found:
            wanted = f"of task.kind={kind} " if kind else ""
            raise UserError(f'Add a book with a summary {wanted}to split "{place}": it has none.')
        return found if split else found[: self.task.max_books]

    def _write(self, model, places: list[int], progress) -> list[Written]:
        """The model's summaries of the books at these places, by input length and condition."""
        tokens = [self.tokens(self.task.split, place) for place in places]
        lengths = [parse_length(length) for length in self.task.lengths] or [self.task.input_tokens]
        how = "greedy" if self.task.greedy else "sampled"
        writer = Writer(self, model, progress)
        if self.task.baseline == "map_reduce":
            parts = f"{self.task.map_tokens} to {self.task.map_new_tokens}"
            made, how = writer.map_reduce(tokens, lengths), f"map_reduce {parts}, {how}"
        else:
            made = writer.write_all(tokens, lengths)
        found: dict[tuple[int | None, str], Written] = {}
        for length, condition, number, ids in made:
            cut = length is not None and len(self.store(self.task.split).tokens(places[number])) > length
            one = found.setdefault((length, condition), Written(condition, length, how, self.cfg.seed))
            one.add(number, [self.tokenizer.decode(each) for each in ids], cut, list(map(len, ids)))
        return list(found.values())
