"""Multi-query associative recall (MQAR): many pairs are written, and segments later all are asked for.

Protocol, version 1. The recipe is that of Zoology (Arora et al. 2023, arXiv 2312.04927), laid out in
segments. Tokens are ids below ``task.vocabulary``: keys from the lower half, values from the upper. A trial
writes ``key value`` for each of P pairs, keys all different; then come filler and the questions, each a key
with its value behind it (the next token is what our loss predicts; a key is asked once, so nothing leaks).
Questions stand at even places of the asking zone, the i-th of which has a probability in proportion to i ^
(power - 1), power 0.01. All other places are random tokens, but never a key of the trial: over thousands of
filler tokens each key would be written over.

Distance d: 0 = the asking zone follows the pairs directly, as in Zoology; else it starts d segments behind
the segment in which the last pair ends, which d segments then are written to the memory after the last pair.
The zone has as many segments as the questions need, so late ones are further away. ``position``: d.
``length``: tokens up to the zone's end.

* ``token_accuracy``: percent of questions whose value is the most probable token; chance is 2 / vocabulary.
  Wilson intervals, over the questions of all trials; those of one trial are not quite independent.
  ``extra["by_segment"]``: of the pairs that stand in the first segment, the second and so on, which tells a
  full memory from one that only some segments are written to or read from.

Conditions: ``<P> pairs``, and ``<P> pairs, memory_off``: nothing from before a question's segment; left out
for models without a memory that could be switched off. Trials depend on seed, P and number; the questions
also on d.

Training: rows of ``segments`` segments; P is one of ``train_pairs`` that fit, the start of the asking zone
one of those possible, both uniform, and the zone takes the rest of the row. Loss: mean over the answers,
nothing else. Pairs start each row, as in Zoology, so a model may learn by place what is a pair: with more
pairs than in training, those behind the trained ones stand where none ever stood, and fewer right answers
are not yet a full memory.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import cached_property
from hashlib import sha256

import numpy as np
import torch

from infini_bench.data import SymbolTokenizer
from infini_bench.errors import UserError
from infini_bench.metrics.intervals import Interval
from infini_bench.metrics.retrieval import token_accuracy
from infini_bench.progress import NullProgress
from infini_bench.stream import feed

from .base import Batch, Row, Task, evaluating, has_controls, mean_over_rows


class Trial:
    """One row: P different keys and their values, and endless filler that holds none of the keys."""

    def __init__(self, seed: list[int], vocabulary: int, pairs: int):
        self.rng, self.half, self.vocabulary = np.random.default_rng(seed), vocabulary // 2, vocabulary
        self.keys = self.rng.choice(self.half, pairs, replace=False)
        self.values = self.half + self.rng.integers(vocabulary - self.half, size=pairs)
        self.gaps = np.sort(self.keys) - np.arange(pairs)

    def written(self) -> np.ndarray:
        """The pairs, (2P,)."""
        return np.stack([self.keys, self.values], axis=1).ravel()

    def filler(self, size: int, rng: np.random.Generator | None = None) -> np.ndarray:
        """Random tokens (size,), from the trial's own generator or another: every id but its keys."""
        drawn = (rng or self.rng).integers(self.vocabulary - len(self.keys), size=size)
        return drawn + np.searchsorted(self.gaps, drawn, side="right")

    def zone(self, size: int, power: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The asking zone, (size,), and the places of the values in it, (P,), in the order of the pairs."""
        chance = np.arange(1, size // 2 + 1) ** (power - 1)
        places = 2 * rng.choice(size // 2, len(self.keys), replace=False, p=chance / chance.sum())
        tokens = self.filler(size, rng)
        tokens[places], tokens[places + 1] = self.keys, self.values
        return tokens, places + 1


class MQAR(Task):
    name = "mqar"
    version = "1"
    score = ("token_accuracy",)

    @cached_property
    def fingerprint(self) -> str:
        task = self.task
        return sha256(repr([self.version, task.vocabulary, task.power]).encode()).hexdigest()[:16]

    def _build_tokenizer(self):
        return SymbolTokenizer(self.task.vocabulary)

    def segments_of(self, pairs: int) -> int:
        """Segments that the pairs, or the questions, take."""
        return -(-2 * pairs // self.cfg.memory.segment)

    # Training ----------------------------------------------------------------------------------------------

    def batch(self, cursor: int, rows: int, segments: int | None = None, split: str = "train") -> Batch:
        """``segments`` segments of inputs."""
        length = (segments or self.task.segments) * self.cfg.memory.segment
        examples = [self._example(number, length, split) for number in range(cursor, cursor + rows)]
        tokens, answer = (torch.from_numpy(np.stack(part)) for part in zip(*examples, strict=True))
        return Batch(tokens, mean_over_rows(answer), answer)

    def _example(self, number: int, length: int, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (length + 1,), and the mask (length,) of the answers' targets."""
        seed = [self.cfg.seed, zlib.crc32(split.encode()), number]
        rng, segment = np.random.default_rng([*seed, 1]), self.cfg.memory.segment
        least = self.task.train_pairs[0]
        fitting = [pairs for pairs in self.task.train_pairs if 4 * pairs <= length]
        if not fitting:
            raise UserError(
                f"Set task.segments and trainer.curriculum to {-(-4 * least // segment)} or more: {least} "
                "pairs and their questions take that many segments."
            )
        trial = Trial(seed, self.task.vocabulary, fitting[rng.integers(len(fitting))])
        pairs, needed = trial.written(), self.segments_of(len(trial.keys))
        starts = [len(pairs), *range(needed * segment, length - needed * segment + 1, segment)]
        start = starts[rng.integers(len(starts))]
        zone, places = trial.zone(length + 1 - start, self.task.power, rng)
        answer = np.zeros(length, np.float32)
        answer[start + places - 1] = 1
        return np.concatenate([pairs, trial.filler(start - len(pairs)), zone]), answer

    # Evaluation --------------------------------------------------------------------------------------------

    def evaluate(self, model, progress=None) -> list[Row]:
        """The grid; each trial's pairs and filler are read once, and its state asked at every distance."""
        task, known = self.task, self.tokenizer
        if not (isinstance(known, SymbolTokenizer) and known.symbols == task.vocabulary and not known.text):
            raise UserError(
                f"The checkpoint's vocabulary, {known.name}, is not that of mqar with "
                f"task.vocabulary={task.vocabulary}; evaluate a model trained on task=mqar."
            )
        groups = np.array_split(np.arange(task.trials), -(-task.trials // task.batch))
        rows = []
        with evaluating(model):
            for pairs in task.pairs:
                total = self._start(pairs, task.segments_after[-1]) * task.trials
                found: dict[tuple[str, int], list[tuple]] = {}
                with (progress or NullProgress()).task(f"mqar, {pairs} pairs", total) as bar:
                    for group in groups:
                        for condition, d, hits in self._read(model, pairs, group, bar):
                            found.setdefault((condition, d), []).append(hits)
                for (condition, d), parts in found.items():
                    rows.append(
                        self._row(pairs, condition, d, *map(np.concatenate, zip(*parts, strict=True)))
                    )
        return rows

    def _start(self, pairs: int, distance: int) -> int:
        """Tokens in front of the asking zone."""
        segment = self.cfg.memory.segment
        return (self.segments_of(pairs) - 1 + distance) * segment if distance else 2 * pairs

    def _read(self, model, pairs: int, group: np.ndarray, bar) -> Iterator[tuple[str, int, tuple]]:
        """Condition, distance, and values (trials, P) asked for and most probable, distance by distance."""
        seeds = [[self.cfg.seed, zlib.crc32(b"evaluation"), pairs, int(trial)] for trial in group]
        trials = [Trial(seed, self.task.vocabulary, pairs) for seed in seeds]
        written = np.stack([trial.written() for trial in trials])
        segment = model.segment
        state, read = feed(model, [written], None, bar), written.shape[1]
        tail = written[:, read // segment * segment :]  # of the segment that reading has reached
        for d in self.task.segments_after:
            start = self._start(pairs, d)
            while read < start:
                size = segment - read % segment
                filler = np.stack([trial.filler(size) for trial in trials])
                state, read, tail = feed(model, [filler], state, bar), read + size, filler[:, :0]
            zones = [
                trial.zone(
                    self.segments_of(pairs) * segment, self.task.power, np.random.default_rng([*seed, d])
                )
                for trial, seed in zip(trials, seeds, strict=True)
            ]
            tokens, places = (np.stack(part) for part in zip(*zones, strict=True))
            expected = np.take_along_axis(tokens, places, 1)
            yield f"{pairs} pairs", d, (expected, self._answer(model, tokens, places, state))
            if has_controls(self.cfg, model):
                with model.memory_off():
                    own = feed(model, [tail], None) if tail.size else None
                    yield (
                        f"{pairs} pairs, memory_off",
                        d,
                        (expected, self._answer(model, tokens, places, own)),
                    )

    def _answer(self, model, tokens: np.ndarray, places: np.ndarray, state) -> np.ndarray:
        """The most probable token at each place, (trials, P), read segment by segment: logits are large."""
        best = []
        for a in range(0, tokens.shape[1], model.segment):
            with torch.no_grad():
                ids = torch.from_numpy(tokens[:, a : a + model.segment]).to(model.device)
                logits, state = model.step(ids, state)
            best.append(logits.argmax(-1).cpu().numpy())
        return np.take_along_axis(np.concatenate(best, axis=1), places - 1, 1)

    def _row(self, pairs: int, condition: str, d: int, expected: np.ndarray, best: np.ndarray) -> Row:
        share = token_accuracy(best, expected)
        length = self._start(pairs, d) + self.segments_of(pairs) * self.cfg.memory.segment
        columns = {"dataset": "synthetic", "length": length, "position": str(d), "condition": condition}
        extra = {"pairs": pairs, "segments_after": d, "chance": 100 / (self.task.vocabulary / 2)}
        ends = range(self.cfg.memory.segment // 2, pairs, self.cfg.memory.segment // 2)
        parts = np.split(expected == best, ends, axis=1)
        extra["by_segment"] = [100 * float(part.mean()) for part in parts]
        bounds = Interval(share.low, share.high)
        columns |= {"protocol": self.task.protocol, "n": share.n, "extra": extra}
        return self.row("token_accuracy", share.value, bounds, **columns)
