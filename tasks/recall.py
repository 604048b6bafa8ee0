"""Recall against compressions: one fact, k segments of filler, and the question.

Protocol, version 1. Ids only: the data config's text tokenizer, and behind its ids symbols of our own, which
no text can hold. The fact is ``WRITE key value``, the question ``ASK key`` and the answer the value; key and
value are ``task.key`` and ``task.value`` random symbols, each from an alphabet of ``task.symbols`` of its
own.

A trial starts with a segment that holds the fact at a random place (over the filler, which goes on behind
it). The question ends segment k, counted from there: of its N tokens the last are ``ASK key`` and the answer
but for its last symbol, which is only predicted. So k segments are written to the memory before the
question's own; at k = 0 fact and question share one. ``length``: tokens of all segments. ``position``: k.

Fillers. ``constant``: a cycle of `CYCLE` symbols. ``text``: the documents of a split end to end, again from
the first behind the last. Either starts at a random token of its own.

* ``exact_match``: percent of trials whose answer symbols all are the most probable ones, teacher-forced,
  which is the same as generating them greedily; chance is ``symbols ** -value``. Wilson intervals.
* ``token_accuracy``: percent of answer symbols, likewise; chance is ``1 / symbols``.
* ``gate``: mean sigmoid of all gates at the largest k, ``position`` = ``filler`` or ``question``, over the
  tokens of the last call that reads filler and of the one that reads ``ASK key``'s segment. Gates that depend
  on data are measured, others are the same everywhere; models without gates have no such row.

Conditions: the filler's name. With the first filler also the controls ``memory_off`` (nothing from before the
question's segment) and ``other_memory`` (the state of the next trial side by side; not at k = 0, nor with one
trial). Both are left out for models without a memory that could be switched off. Trials depend on seed,
filler and number alone: those of all k are the same.

Training: rows of exactly ``segments`` segments. The question ends the last of them in half of the rows and
any of them in the others, whose rest is filler: else short distances are unlearned at the long levels of a
curriculum. The fact's segment, up to the question's own, its place and one of ``train_fillers`` are uniform;
text is the train split's. Loss: mean over the answer + ``lm_weight`` x the mean over all other tokens.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from hashlib import sha256

import numpy as np
import torch

from infini_bench import data
from infini_bench.data import SymbolTokenizer
from infini_bench.errors import UserError
from infini_bench.metrics.intervals import Interval
from infini_bench.metrics.retrieval import exact_match, token_accuracy
from infini_bench.progress import NullProgress
from infini_bench.stream import feed, prefill

from .base import Batch, Row, Task, aligned, evaluating, forced, has_controls, mean_over_rows

WRITE, ASK = 0, 1  # symbols; the cycle, the keys' and the values' follow
CYCLE = 8

Hits = tuple[np.ndarray, np.ndarray]  # answer symbols (trials, A): asked for, most probable


@dataclass
class Trials:
    """Rows of endless filler, each with a fact. ids: what is repeated; the rest has one entry a row."""

    ids: np.ndarray
    phases: np.ndarray  # (R,) where each row starts in ids
    facts: np.ndarray  # (R, F) tokens
    places: np.ndarray  # (R,) of the fact, from the row's start
    questions: np.ndarray  # (R, Q) tokens
    answers: np.ndarray  # (R, A) tokens

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of all rows, (R, stop - start) int64, the fact among them, no question."""
        # not take's mode="wrap", which subtracts the length again and again: hours at a million tokens
        ids = self.ids[(self.phases[:, None] + np.arange(start, stop)) % len(self.ids)].astype(np.int64)
        columns = self.places[:, None] + np.arange(self.facts.shape[1]) - start
        rows, symbols = np.nonzero((columns >= 0) & (columns < stop - start))
        ids[rows, columns[rows, symbols]] = self.facts[rows, symbols]
        return ids

    def asked(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), of which the last are question and answer."""
        ending = np.concatenate([self.questions, self.answers], axis=1)
        return np.concatenate([self.tokens(start, stop - ending.shape[1]), ending], axis=1)


class Recall(Task):
    name = "recall"
    version = "1"
    score = ("exact_match", "token_accuracy")

    def __init__(self, cfg, tokenizer=None):
        super().__init__(cfg, tokenizer)
        self.filler = cache(self._filler)

    @cached_property
    def fingerprint(self) -> str:
        task = self.task
        parts = [self.version, task.symbols, task.key, task.value, task.train_fillers, task.fillers]
        if "text" in task.train_fillers:
            parts.append(data.fingerprint(self.documents("train")))
        if "text" in task.fillers:
            parts.append(data.fingerprint(self.documents(task.split)))
        return sha256(repr(parts).encode()).hexdigest()[:16]

    @property
    def symbols(self) -> SymbolTokenizer:
        """The vocabulary, which has a text's. Raises UserError if a checkpoint's is another."""
        known, wanted = self.tokenizer, 2 + CYCLE + 2 * self.task.symbols
        if not (isinstance(known, SymbolTokenizer) and known.text and known.symbols == wanted):
            raise UserError(
                f"The checkpoint's vocabulary, {known.name}, is not that of recall with "
                f"task.symbols={self.task.symbols}; evaluate a model trained on task=recall."
            )
        return known

    def _build_tokenizer(self):
        text = data.build_tokenizer(self.cfg.data, lambda: (d.text for d in self.documents("train")))
        return SymbolTokenizer(2 + CYCLE + 2 * self.task.symbols, text)

    def _filler(self, kind: str, split: str) -> np.ndarray:
        if kind == "constant":
            return self.symbols.first + 2 + np.arange(CYCLE)
        return self.all_tokens(split, "use another task.split", self.symbols.text)

    def trials(self, rngs: list[np.random.Generator], kind: str, split: str, segments: int = 1) -> Trials:
        """One row a generator; the fact lies in one of the first ``segments``, before any question."""
        task, first, segment = self.task, self.symbols.first, self.cfg.memory.segment
        ids = self.filler(kind, split)
        room = segment - (1 + task.key + task.value) - (task.key + task.value)
        if room < 0:
            raise UserError(
                f"Fact and question take {segment - room} tokens; give memory.segment at least as many."
            )
        key_of, value_of = first + 2 + CYCLE, first + 2 + CYCLE + task.symbols
        drawn = []
        for rng in rngs:
            phase = rng.integers(len(ids))
            key, value = (
                (key_of + rng.integers(task.symbols, size=task.key)),
                rng.integers(task.symbols, size=task.value),
            )
            place = rng.integers(segments) * segment + rng.integers(room + 1)
            drawn.append((phase, key, value_of + value, place))
        phases, keys, values, places = (np.stack(part) for part in zip(*drawn, strict=True))
        mark = np.ones((len(rngs), 1), np.int64)
        facts = np.concatenate([mark * (first + WRITE), keys, values], axis=1)
        questions = np.concatenate([mark * (first + ASK), keys], axis=1)
        return Trials(ids, phases, facts, places, questions, values)

    # Training ----------------------------------------------------------------------------------------------

    def batch(self, cursor: int, rows: int, segments: int | None = None, split: str = "train") -> Batch:
        """``segments`` segments of inputs."""
        count = segments or self.task.segments
        examples = [self._example(number, count, split) for number in range(cursor, cursor + rows)]
        tokens, answer = (torch.from_numpy(np.stack(part)) for part in zip(*examples, strict=True))
        weights = mean_over_rows(answer) + self.task.lm_weight * mean_over_rows(1 - answer)
        return Batch(tokens, weights, answer)

    def _example(self, number: int, segments: int, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (T + 1,), and the mask (T,) of the answer's targets."""
        rng = np.random.default_rng([self.cfg.seed, zlib.crc32(split.encode()), number])
        kind = self.task.train_fillers[rng.integers(len(self.task.train_fillers))]
        used = segments if rng.random() < 0.5 else int(rng.integers(1, segments + 1))
        trial, segment = self.trials([rng], kind, split, used), self.cfg.memory.segment
        end, length = used * segment + 1, segments * segment + 1
        tokens = np.concatenate([trial.asked(0, end), trial.tokens(end, length)], axis=1)[0]
        answer = np.zeros(length - 1, np.float32)
        answer[end - 1 - self.task.value : end - 1] = 1
        return tokens, answer

    # Evaluation --------------------------------------------------------------------------------------------

    def evaluate(self, model, progress=None) -> list[Row]:
        """All fillers and distances; each trial's filler is read once, its state asked at every distance."""
        groups = np.array_split(np.arange(self.task.trials), -(-self.task.trials // self.task.batch))
        longest = self.task.segments_after[-1] * model.segment * self.task.trials
        rows = []
        with evaluating(model):
            for kind in self.task.fillers:
                found: dict[tuple[str, int], list[Hits]] = defaultdict(list)
                gates: dict[str, list[float]] = defaultdict(list)
                with (progress or NullProgress()).task(f"recall, {kind}", longest) as bar:
                    for group in groups:
                        seeds = [[self.cfg.seed, zlib.crc32(kind.encode()), int(trial)] for trial in group]
                        rngs = [np.random.default_rng(seed) for seed in seeds]
                        trials = self.trials(rngs, kind, self.task.split)
                        for condition, k, hits in self._read(model, kind, trials, gates, bar):
                            found[condition, k].append(hits)
                for (condition, k), parts in found.items():
                    rows += self._rows(condition, k, *map(np.concatenate, zip(*parts, strict=True)))
                rows += self._gate_rows(kind, gates)
        return rows

    def _read(self, model, kind: str, trials: Trials, gates, bar) -> Iterator[tuple[str, int, Hits]]:
        """Condition, distance and answers of trials that run side by side, at each distance in turn."""
        segment, state, read = model.segment, None, 0
        controls = has_controls(self.cfg, model) and kind == self.task.fillers[0]
        size = aligned(self.task.chunk, segment, len(trials.phases))
        for k in self.task.segments_after:
            stops = range(read, k * segment, size)
            state = feed(model, (trials.tokens(a, min(a + size, k * segment)) for a in stops), state, bar)
            read, last = k * segment, k == self.task.segments_after[-1]
            if last and k:
                note_gate(model, gates, "filler")
            yield kind, k, self._answer(model, trials, k, state)
            if last:
                note_gate(model, gates, "question")
            if controls:
                with model.memory_off():
                    yield "memory_off", k, self._answer(model, trials, k, None)
            if controls and state is not None and len(trials.phases) > 1:
                other = state.select_rows(torch.arange(len(trials.phases)).roll(-1))
                yield "other_memory", k, self._answer(model, trials, k, other)

    def _answer(self, model, trials: Trials, k: int, state) -> Hits:
        """What the question in segment k gives when ``state`` stands at its start."""
        prompt = trials.asked(k * model.segment, (k + 1) * model.segment + 1)[:, : -self.task.value]
        logits, state = prefill(model, [prompt], state)
        return trials.answers, forced(model, logits, state, trials.answers)

    def _rows(self, condition: str, k: int, expected: np.ndarray, best: np.ndarray) -> list[Row]:
        columns = {"split": self.task.split, "length": (k + 1) * self.cfg.memory.segment}
        columns |= {"position": str(k), "condition": condition, "protocol": self.task.protocol}
        chances = 100 / self.task.symbols**self.task.value, 100 / self.task.symbols
        rows = []
        for measure, chance in zip((exact_match, token_accuracy), chances, strict=True):
            share, extra = measure(best, expected), {"chance": chance}
            bounds = Interval(share.low, share.high)
            rows.append(self.row(measure.__name__, share.value, bounds, n=share.n, extra=extra, **columns))
        return rows

    def _gate_rows(self, kind: str, gates: dict[str, list[float]]) -> list[Row]:
        columns = {"split": self.task.split, "condition": kind, "protocol": self.task.protocol}
        return [
            self.row("gate", float(np.mean(values)), position=place, n=self.task.trials, **columns)
            for place, values in gates.items()
        ]


def note_gate(model, gates: dict[str, list[float]], place: str) -> None:
    """Add the mean gate of the model's last call, if it has gates.

    A memory whose gate depends on the data keeps ``gate_values``, the sigmoids of its last call.
    """
    measured = [m.gate_values for m in model.memories if getattr(m, "gate_values", None) is not None]
    values = measured or ([] if model.gates() is None else [model.gates()])
    if values:
        gates[place].append(float(torch.cat([value.float().flatten() for value in values]).mean()))
