"""Passkey retrieval (Table 3): a random number hidden in repeated text, asked for at the end.

Protocol, version 1. Prompt: tasks/haystack.py. Key: ``digits`` random digits, the first not 0. Prompt and
answer take at most the requested length, and fall short of it by less than one filler sentence.

Depths: a percentage p puts p % of the filler sentences (rounded) in front of the needle; ``start`` = 0,
``middle`` = 50; ``end``: directly before the question, which must leave needle and question in one segment;
``end_outside``: the last place where the needle lies wholly in the segment before the one in which the
question starts. Segments are the model's, counted from the prompt's start.

* ``exact_match``: percent of trials whose greedily generated answer tokens all are right.
* ``token_accuracy``: percent of answer tokens that are the most probable one, teacher-forced; chance is 10 %
  (11 % for the first digit).

Training: the needle's depth is uniform over the filler, except in a share ``own_segment`` of the rows: there
it starts in the segment in which the prompt ends, at a uniform place in front of the question. Without such a
share one row in S of S segments shows this, and a model may never learn to look there.

Wilson intervals. ``extra["segments"]``: segment of the question's start minus that of the needle's end.
Condition ``constant``: the needle's kind. ``memory_off``: nothing from before the segment is used, so only
the prompt's last segment is read; left out for models without a memory that could be switched off.
Keys depend on seed, length, depth and trial alone.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256

import numpy as np
import torch

from infini_bench import data
from infini_bench.data import build_tokenizer
from infini_bench.errors import UserError
from infini_bench.metrics.intervals import Interval
from infini_bench.metrics.retrieval import exact_match, token_accuracy
from infini_bench.progress import NullProgress
from infini_bench.stream import feed, generate, prefill
from infini_bench.units import parse_depth, parse_length

from .base import Batch, Row, Task, aligned, evaluating, forced, has_controls
from .haystack import (
    FILLER,
    NEEDLE,
    QUESTION,
    TASK_LINE,
    Example,
    Haystack,
    Prompt,
    prompt_text,
    side_by_side,
    training_batch,
    training_row,
)

VOCAB_SIZE = 512  # 256 bytes and merges enough to make every word of the prompt one token


@dataclass(frozen=True)
class Cell:
    """One length and depth of the grid; ``before`` of ``sentences`` filler sentences precede the needle."""

    length: int
    depth: str
    sentences: int
    before: int


class Passkey(Task):
    name = "passkey"
    version = "1"
    score = ("exact_match", "token_accuracy")

    def __init__(self, cfg, tokenizer=None):
        super().__init__(cfg, tokenizer)
        self.texts: dict[str, np.ndarray] = {}

    @property
    def fingerprint(self) -> str:
        wording = "\n".join([TASK_LINE, *FILLER, NEEDLE, QUESTION, str(self.task.digits), self.version])
        read = [data.fingerprint(self.documents(split)) for split in self.texts]  # as training's filler
        return sha256("\n".join([wording, *read]).encode()).hexdigest()[:16]

    def text(self, split: str) -> np.ndarray:
        """All tokens of the documents of ``split``, one after another."""
        if split not in self.texts:
            store = data.token_store(self.cfg.data, self.documents(split), self.tokenizer)
            if not len(store.all_tokens):
                raise UserError(f'Split "{split}" has no text for task.text_share; set that to 0.')
            self.texts[split] = store.all_tokens
        return self.texts[split]

    @cached_property
    def haystack(self) -> Haystack:
        return Haystack(self.tokenizer, self.task.digits)

    def _build_tokenizer(self):
        small = replace(self.cfg.data, vocab_size=min(self.cfg.data.vocab_size, VOCAB_SIZE))
        texts = [prompt_text(digit * self.task.digits, 2, 5) for digit in "0123456789"]
        return build_tokenizer(small, lambda: texts)

    # Training ----------------------------------------------------------------------------------------------

    def batch(self, cursor: int, rows: int, segments: int | None = None, split: str = "train") -> Batch:
        """Prompt and answer in exactly ``segments`` segments of inputs, padded behind the answer.

        The number of filler sentences is uniform among those with which the answer ends in the last segment,
        and with which the needle fits there where it has to be.
        In a share ``text_share`` of the rows, documents' text takes the filler's place: with a loss on it
        (``lm_weight``) a pretrained model stays a language model while it learns to retrieve.
        Loss: mean over answer tokens + ``lm_weight`` x the mean over the others.
        """
        segment = self.cfg.memory.segment
        length = (segments or self.task.segments) * segment + 1
        if length < self.haystack.shortest:
            needed = -(-(self.haystack.shortest - 1) // segment)
            raise UserError(
                f"Set task.segments and trainer.curriculum to {needed} or more: the shortest passkey prompt "
                f"fills that many segments of {segment} tokens."
            )
        examples = [self._example(number, length, segment, split) for number in range(cursor, cursor + rows)]
        return training_batch(examples, self.task.lm_weight)

    def _example(self, number: int, length: int, segment: int, split: str) -> Example:
        rng = np.random.default_rng([self.cfg.seed, zlib.crc32(split.encode()), number])
        most = self.haystack.sentences(length)
        shorter = length - segment  # prompts up to this length end before the last segment
        least = self.haystack.sentences(shorter) + 1 if shorter >= self.haystack.shortest else 0
        if self.task.text_share and rng.random() < self.task.text_share:
            return training_row(self._in_text(rng, length, segment, split), length, self.tokenizer.eos_id)
        counts, earliest, share = range(min(least, most), most + 1), 0, self.task.own_segment
        if share and rng.random() < share:  # share 0 draws nothing: its rows are those of old runs
            sentences = int(rng.choice(self._near(counts, segment)))
            earliest = self.haystack.earliest(sentences, segment)
        else:
            sentences = int(rng.integers(counts.start, counts.stop))
        key = self.haystack.key(rng)
        prompt = self.haystack.prompt(key, int(rng.integers(earliest, sentences + 1)), sentences)
        return training_row(prompt, length, self.tokenizer.eos_id)

    def _in_text(self, rng: np.random.Generator, length: int, segment: int, split: str) -> Prompt:
        """A prompt in documents' text, which ends with its answer anywhere in the last segment."""
        text, shortest = self.text(split), self.haystack.shortest
        filler = int(rng.integers(max(length - segment + 1, shortest), length + 1)) - shortest
        key, place = self.haystack.key(rng), int(rng.integers(len(text)))
        return self.haystack.hidden(key, text, place, int(rng.integers(filler + 1)), filler)

    def _near(self, counts: range, segment: int) -> list[int]:
        """Numbers of filler sentences with which the needle can stand in the segment of the prompt's end."""
        fitting = [count for count in counts if self.haystack.earliest(count, segment) <= count]
        if not fitting:
            needed = self.haystack.bare - len(self.haystack.head)
            raise UserError(
                f"Set task.own_segment=0, or memory.segment to more than {needed}: both together take "
                f"{needed} tokens and never stand in one segment of {segment}."
            )
        return fitting

    # Evaluation --------------------------------------------------------------------------------------------

    def evaluate(self, model, progress=None) -> list[Row]:
        """All lengths and depths; what prompts have in common is read once for all of them."""
        cells = self.cells(model.segment)
        rows: dict[Cell, list[Row]] = {}
        with evaluating(model), (progress or NullProgress()).task("passkey", self._work(cells)) as bar:
            state, read = None, 0
            for cell in sorted(cells, key=lambda cell: cell.before):
                prompts = self.prompts(cell)
                start = prompts[0].needle[0]
                size = aligned(self.task.chunk, model.segment)
                state = feed(model, side_by_side(prompts[:1], read, start, size), state, bar)
                read = start
                rows[cell] = self._rows(cell, prompts, model, state, bar)
        return [row for cell in cells for row in rows[cell]]

    def cells(self, segment: int) -> list[Cell]:
        """The grid in the order asked for; a cell that cannot be made is a UserError before anything runs."""
        cells = []
        for length in map(parse_length, self.task.lengths):
            sentences = self.haystack.sentences(length)
            for depth in map(parse_depth, self.task.depths):
                cells.append(Cell(length, depth, sentences, self.haystack.place(depth, sentences, segment)))
        return list(dict.fromkeys(cells))

    def prompts(self, cell: Cell) -> list[Prompt]:
        """The trials of a cell; they differ in the key only."""
        prompts = []
        for trial in range(self.task.trials):
            seed = [self.cfg.seed, cell.length, zlib.crc32(cell.depth.encode()), trial]
            key = self.haystack.key(np.random.default_rng(seed))
            prompts.append(self.haystack.prompt(key, cell.before, cell.sentences))
        return prompts

    def _work(self, cells: list[Cell]) -> int:
        """Tokens to read, controls left out."""
        starts = [self.prompts(cell)[0].needle[0] for cell in cells]
        behind = sum(len(self.prompts(cell)[0]) - start for cell, start in zip(cells, starts, strict=True))
        return max(starts) + self.task.trials * behind

    def _rows(self, cell: Cell, prompts: list[Prompt], model, state, bar) -> list[Row]:
        """Rows of one cell; ``state`` has read what stands in front of the needle."""
        first, segment = prompts[0], model.segment
        extra = {
            "segments": first.question // segment - (first.needle[1] - 1) // segment,
            "tokens": len(first) + len(first.answer),
            "digits": self.task.digits,
        }
        answers = self._answer(model, prompts, state, first.needle[0], bar)
        rows = self._score(cell, "constant", extra, *answers)
        if has_controls(self.cfg, model):
            border = (len(first) - 1) // segment * segment
            with model.memory_off():
                rows += self._score(cell, "memory_off", extra, *self._answer(model, prompts, None, border))
        return rows

    def _answer(self, model, prompts: list[Prompt], state, start: int, bar=None) -> tuple[np.ndarray, ...]:
        """Read prompts from token ``start``, where one row's ``state`` stands, ``task.batch`` side by side.

        Returns answer tokens (trials, A): asked for, generated, most probable under teacher forcing.
        """
        parts = []
        for group in (prompts[i : i + self.task.batch] for i in range(0, len(prompts), self.task.batch)):
            rows = torch.zeros(len(group), dtype=torch.long, device=model.device)
            copies = None if state is None else state.select_rows(rows)
            size = aligned(self.task.chunk, model.segment, len(group))
            logits, read = prefill(model, side_by_side(group, start, len(group[0]), size), copies, bar)
            expected = np.stack([prompt.answer for prompt in group])
            generated = generate(model, logits, read, expected.shape[1])
            parts.append((expected, generated, forced(model, logits, read, expected)))
        return tuple(np.concatenate(part) for part in zip(*parts, strict=True))

    def _score(self, cell: Cell, condition: str, extra: dict, expected, generated, best) -> list[Row]:
        columns = {"length": cell.length, "position": cell.depth}
        columns |= {"condition": condition, "protocol": self.task.protocol}
        exact, tokens = exact_match(generated, expected), token_accuracy(best, expected)
        digits = self.task.digits
        chance = 100 / (9 * 10 ** (digits - 1))
        by_token = 100 * (1 / 9 + (digits - 1) / 10) / digits
        rows = []
        for metric, share, by_chance in (
            ("exact_match", exact, chance),
            ("token_accuracy", tokens, by_token),
        ):
            columns |= {"n": share.n, "extra": {**extra, "chance": by_chance}}
            rows.append(self.row(metric, share.value, Interval(share.low, share.high), **columns))
        return rows
