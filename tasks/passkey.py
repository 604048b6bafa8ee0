"""Passkey retrieval (Table 3): a random number hidden in repeated text, asked for at the end.

Protocol, version 1. Prompt: tasks/haystack.py. Key: ``digits`` random digits, the first not 0. Prompt and
answer take at most the requested length, and fall short of it by less than one filler sentence.

Depths: a percentage p puts p % of the filler sentences (rounded) in front of the needle; ``start`` = 0,
``middle`` = 50; ``end``: directly before the question, which must leave needle and question in one segment;
``end_outside``: the last place where the needle lies wholly in the segment before the one in which the
question starts. Segments are the model's, counted from the prompt's start.

A length puts the question at one place of its segment, the same in all trials. With ``any_alignment`` the
filler of trial i of T breaks off s tokens early, s uniform over part i of the T equal parts of a segment:
questions start at all places of a segment evenly, and some, or their answers, run over its border. A needle
that would stand behind the filler's end stands there; ``end_outside`` is found for each trial; ``end`` is
refused (100 is directly before the question). ``any alignment`` is part of these rows' protocol, and their
``extra["crossing"]`` is [keys found, trials] where question and answer lie in two segments.

* ``exact_match``: percent of trials whose greedily generated answer tokens all are right.
* ``token_accuracy``: percent of answer tokens that are the most probable one, teacher-forced; chance is 10 %
  (11 % for the first digit).

Training: the needle's depth is uniform over the filler, except in a share ``own_segment`` of the rows: there
it starts in the segment in which the prompt ends, at a uniform place in front of the question. Without such a
share one row in S of S segments shows this, and a model may never learn to look there. Whole filler sentences
put the question at few places of a segment (27 of 128, which ones depends on the length); with
``train_any_alignment`` the filler is cut to any number of tokens, and all places are equally frequent. In a
share ``crossing`` question and answer lie in two segments (rows of one have no border), in the others as
often as chance has it. In documents' text all places are equally frequent at all times. In a share
``straddling`` a border of segments falls within the needle, in text, too: by chance that is so in one row of
40 at segments of 1,024, but at depth ``middle`` of every length that is a power of two, where half of the
prompt ends at a border.

* ``write_strength`` (memories with a write gate): mean strength of the keys of one prompt's needle
  (``position``) and of its ``filler``, at the shortest length; ``extra["heads"]``: by layer and KV head.

Wilson intervals. ``extra["segments"]``: segment of the question's start minus that of the needle's end;
``extra["straddling"]``: trials whose needle lies in two segments.
``extra["memory_norm"]`` (associative memories): of what is held at the prompt's end (tasks/writing.py).
Condition ``constant``: the needle's kind. ``memory_off``: nothing from before the segment is used, so only
the prompt's last segment is read; left out for models without a memory that could be switched off.
Keys depend on seed, length, depth and trial alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from hashlib import sha256
from statistics import median_low
from typing import Any

import numpy as np
import torch

from infini_bench import data
from infini_bench.data import build_tokenizer
from infini_bench.errors import UserError
from infini_bench.metrics.intervals import Interval
from infini_bench.metrics.retrieval import exact_match, token_accuracy
from infini_bench.progress import NullProgress
from infini_bench.schema import ANY_ALIGNMENT, PASSKEY_KINDS
from infini_bench.stream import feed, generate, prefill_rows
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
from .writing import memory_norms, write_strengths

VOCAB_SIZE = 512  # 256 bytes and merges enough to make every word of the prompt one token


@dataclass(frozen=True)
class Cell:
    """One length and depth of the grid, for a model's segment; filler sentences of its longest prompt."""

    length: int
    depth: str
    segment: int
    sentences: int


class Passkey(Task):
    name = "passkey"
    version = "1"
    score = ("exact_match", "token_accuracy")

    def __init__(self, cfg, tokenizer=None):
        super().__init__(cfg, tokenizer)
        self.texts: dict[str, np.ndarray] = {}
        self.forms = cache(self._forms)

    @property
    def fingerprint(self) -> str:
        wording = "\n".join([TASK_LINE, *FILLER, NEEDLE, QUESTION, str(self.task.digits), self.version])
        read = [data.fingerprint(self.documents(split)) for split in self.texts]  # as training's filler
        return sha256("\n".join([wording, *read]).encode()).hexdigest()[:16]

    def text(self, split: str) -> np.ndarray:
        """All tokens of the documents of ``split``, one after another."""
        if split not in self.texts:
            self.texts[split] = self.all_tokens(split, "set task.text_share=0")
        return self.texts[split]

    @property
    def protocol(self) -> str:
        return f"{self.task.protocol}, {ANY_ALIGNMENT}" if self.task.any_alignment else self.task.protocol

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

        The number of filler sentences (``train_any_alignment``: of filler tokens) is uniform among those with
        which the answer ends in the last segment, and with which needle or question stand as they have to.
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
        if self.task.text_share and rng.random() < self.task.text_share:
            return training_row(self._in_text(rng, length, segment, split), length, self.tokenizer.eos_id)
        kind = self._kind(rng, borders=length > segment + 1)
        forms = self.forms(kind, length, segment)
        sentences, shorter = forms[rng.integers(len(forms))]
        earliest = self.haystack.earliest(sentences, segment, shorter) if kind == "own_segment" else 0
        key = self.haystack.key(rng)
        if kind == "straddling":
            filler = self.haystack.filler_tokens(sentences) - shorter
            places = self.haystack.filler_places(np.arange(sentences + 1))
            before = int(rng.choice(self.haystack.straddling(filler, segment, places)))
        else:
            before = int(rng.integers(earliest, sentences + 1))
        prompt = self.haystack.prompt(key, before, sentences, shorter)
        return training_row(prompt, length, self.tokenizer.eos_id)

    def check_training(self) -> None:
        """Of rows without text every kind that has a share, at every length of the curriculum."""
        super().check_training()
        if self.task.text_share < 1:
            segment = self.cfg.memory.segment
            for segments in self.cfg.trainer.curriculum or [self.task.segments]:
                for kind in (kind for kind, share in self._shares(segments > 1).items() if share):
                    self.forms(kind, segments * segment + 1, segment)

    def _shares(self, borders: bool) -> dict[str, float]:
        """Of the rows, of each kind but ``any``; borders: whether rows have any."""
        return {kind: getattr(self.task, kind) for kind in PASSKEY_KINDS if borders or kind == "own_segment"}

    def _kind(self, rng: np.random.Generator, borders: bool) -> str:
        if not any(getattr(self.task, kind) for kind in PASSKEY_KINDS):
            return "any"  # draws nothing: its rows are those of old runs
        shares = self._shares(borders)
        drawn, below = rng.random(), np.cumsum(list(shares.values()))
        return next((kind for kind, most in zip(shares, below, strict=True) if drawn < most), "any")

    def _in_text(self, rng: np.random.Generator, length: int, segment: int, split: str) -> Prompt:
        """A prompt in documents' text, which ends with its answer anywhere in the last segment."""
        text, hay, share = self.text(split), self.haystack, self.task.straddling
        straddling = length > segment + 1 and bool(share) and rng.random() < share
        least, most = max(length - segment + 1 - hay.shortest, 0), length - hay.shortest
        if straddling:  # a prompt that ends soon after its first border may have its question there
            least = max(least, hay.reaching(segment))
        filler = int(rng.integers(least, most + 1))
        key, place = hay.key(rng), int(rng.integers(len(text)))
        if straddling:
            first = int(rng.choice(hay.straddling(filler, segment, np.arange(filler + 1))))
        else:
            first = int(rng.integers(filler + 1))
        return hay.hidden(key, text, place, first, filler)

    def _forms(self, kind: str, length: int, segment: int) -> list[tuple[int, int]]:
        """(Filler sentences, tokens they break off early) of the rows of a kind."""
        hay, shortest = self.haystack, self.haystack.shortest
        before = length - segment  # prompts and answers up to this length end before the last segment
        if self.task.train_any_alignment:
            forms = [hay.exactly(size) for size in range(max(before + 1, shortest), length + 1)]
        else:
            most = hay.sentences(length)
            least = hay.sentences(before) + 1 if before >= shortest else 0
            forms = [(count, 0) for count in range(min(least, most), most + 1)]
        if kind == "own_segment":
            forms = [form for form in forms if hay.earliest(form[0], segment, form[1]) <= form[0]]
        if kind == "crossing":
            forms = [form for form in forms if hay.prompt("1" * hay.digits, 0, *form).crosses(segment)]
        if kind == "straddling":
            places = hay.filler_places(np.arange(max(count for count, _ in forms) + 1))
            forms = [
                (count, shorter)
                for count, shorter in forms
                if len(hay.straddling(hay.filler_tokens(count) - shorter, segment, places[: count + 1]))
            ]
        if not forms:
            raise self._impossible(kind, segment)
        return forms

    def _impossible(self, kind: str, segment: int) -> UserError:
        if kind == "crossing":
            return UserError(
                "Set task.crossing=0, or task.train_any_alignment=true: whole filler sentences never put the "
                f"question over a border of segments of {segment} tokens."
            )
        if kind == "straddling":
            return UserError(
                f"Set task.straddling=0: no prompt has a border of segments of {segment} tokens in the key."
            )
        needed = self.haystack.bare - len(self.haystack.head)
        return UserError(
            f"Set task.own_segment=0, or memory.segment to more than {needed}: both together take "
            f"{needed} tokens and never stand in one segment of {segment}."
        )

    # Evaluation --------------------------------------------------------------------------------------------

    def evaluate(self, model, progress=None) -> list[Row]:
        """All lengths and depths; what prompts have in common is read once for all of them."""
        made = {cell: self.prompts(cell) for cell in self.cells(model.segment)}  # misfits are told first
        starts = {cell: min(prompt.needle[0] for prompt in prompts) for cell, prompts in made.items()}
        rows: dict[Cell, list[Row]] = {}
        with evaluating(model), (progress or NullProgress()).task("passkey", _work(made, starts)) as bar:
            state, read = None, 0
            for cell in sorted(made, key=starts.__getitem__):
                size = aligned(self.task.chunk, model.segment)
                state = feed(model, side_by_side(made[cell][:1], read, starts[cell], size), state, bar)
                read = starts[cell]
                rows[cell] = self._rows(cell, made[cell], model, state, read, bar)
            written = self._written(min(made, key=lambda cell: cell.length), model)
        return [*(row for cell in made for row in rows[cell]), *written]

    def _written(self, cell: Cell, model) -> list[Row]:
        """What a write gate makes of a cell's first prompt."""
        prompt = self.prompts(cell)[0]
        found = write_strengths(model, prompt, aligned(self.task.chunk, model.segment))
        columns: dict[str, Any] = {"length": cell.length, "condition": "constant", "n": 1}
        columns["protocol"] = self.protocol
        return [
            self.row(
                "write_strength", float(w.mean()), position=place, extra={"heads": w.tolist()}, **columns
            )
            for place, w in found.items()
        ]

    def cells(self, segment: int) -> list[Cell]:
        """The grid in the order asked for."""
        lengths, depths = map(parse_length, self.task.lengths), [*map(parse_depth, self.task.depths)]
        grid = [(length, depth) for length in lengths for depth in depths]
        return [
            Cell(length, depth, segment, self.haystack.sentences(length))
            for length, depth in dict.fromkeys(grid)
        ]

    def prompts(self, cell: Cell) -> list[Prompt]:
        """The trials of a cell, which differ in the key, and with ``any_alignment`` in their ends.

        A cell that cannot be made is a UserError.
        """
        prompts = []
        for trial in range(self.task.trials):
            rng = np.random.default_rng([self.cfg.seed, cell.length, zlib.crc32(cell.depth.encode()), trial])
            key = self.haystack.key(rng)
            shorter = self._shorter(cell, trial, rng) if self.task.any_alignment else 0
            before = self.haystack.place(cell.depth, cell.sentences, cell.segment, shorter)
            prompts.append(self.haystack.prompt(key, before, cell.sentences, shorter))
        return prompts

    def _shorter(self, cell: Cell, trial: int, rng: np.random.Generator) -> int:
        if cell.depth == "end":
            raise UserError(
                'Ask for depth 100 in place of "end", or leave out task.any_alignment: a question that runs '
                "over a border shares no segment with a needle."
            )
        if self.haystack.filler_tokens(cell.sentences) < cell.segment - 1:
            raise UserError(
                f"Ask for passkey prompts longer than {cell.length} tokens, or leave out task.any_alignment: "
                f"it cuts their filler by up to a segment, {cell.segment} tokens."
            )
        return int((trial + rng.random()) * cell.segment / self.task.trials)

    def _rows(self, cell: Cell, prompts: list[Prompt], model, state, start: int, bar) -> list[Row]:
        """Rows of one cell; ``state`` has read the tokens before ``start``, which all its prompts share."""
        n, batch = model.segment, self.task.batch
        extra = {
            "segments": median_low(each.question // n - (each.needle[1] - 1) // n for each in prompts),
            "tokens": max(len(each) + len(each.answer) for each in prompts),
            "digits": self.task.digits,
            "straddling": sum(each.needle[0] // n < (each.needle[1] - 1) // n for each in prompts),
        }
        groups = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
        crossing = np.array([each.crosses(n) for each in prompts])
        norms: list[float] = []

        def read(group: list[Prompt]):
            logits, after = self._read(model, group, state, start, bar)
            norms.extend(memory_norms(after))
            return logits, after

        answers = self._answers(model, groups, read)
        held = {"memory_norm": float(np.mean(norms))} if norms else {}
        rows = self._score(cell, "constant", extra | held, crossing, *answers)
        if has_controls(self.cfg, model):
            with model.memory_off():
                answers = self._answers(model, groups, lambda group: self._read_ends(model, group))
            rows += self._score(cell, "memory_off", extra, crossing, *answers)
        return rows

    def _read(self, model, prompts: list[Prompt], state, start: int, bar):
        """Logits and state after prompts, read from token ``start``, where ``state``, of one row, stands."""
        copies = state.select_rows(torch.zeros(len(prompts), dtype=torch.long, device=model.device))
        size = aligned(self.task.chunk, model.segment, len(prompts))
        even = len(set(map(len, prompts))) == 1  # else the last call, which is padded, is kept short
        step = size if even else model.segment
        last = max(start, (min(map(len, prompts)) - 1) // step * step)
        copies = feed(model, side_by_side(prompts, start, last, size), copies, bar)
        return prefill_rows(model, [prompt.tokens(last) for prompt in prompts], copies, bar)

    def _read_ends(self, model, prompts: list[Prompt]):
        """As `_read`, of nothing but the segment in which each prompt ends."""
        return prefill_rows(model, [prompt.tokens(prompt.border(model.segment)) for prompt in prompts])

    def _answers(self, model, groups: list[list[Prompt]], read: Callable) -> list[np.ndarray]:
        """Answer tokens (trials, A): asked for, generated, most probable under teacher forcing."""
        parts = []
        for group in groups:
            logits, state = read(group)
            expected = np.stack([prompt.answer for prompt in group])
            generated = generate(model, logits, state, expected.shape[1])
            parts.append((expected, generated, forced(model, logits, state, expected)))
        return [np.concatenate(part) for part in zip(*parts, strict=True)]

    def _score(self, cell: Cell, condition: str, extra: dict, crossing, expected, generated, best):
        """Rows of one condition. crossing: (trials,), where question and answer lie in two segments."""
        if self.task.any_alignment:
            found = (generated == expected).all(1)[crossing]
            extra = {**extra, "crossing": [int(found.sum()), len(found)]}
        columns = {"length": cell.length, "position": cell.depth}
        columns |= {"condition": condition, "protocol": self.protocol}
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


def _work(made: dict[Cell, list[Prompt]], starts: dict[Cell, int]) -> int:
    """Tokens to read, controls left out."""
    return max(starts.values()) + sum(len(each) - starts[cell] for cell in made for each in made[cell])
