"""How a model reads books and writes their summaries: many books side by side, each from its own state.

Shapes: B rows of a batch (books, or samples of books), t tokens of a prompt's end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from infini_bench.errors import UserError
from infini_bench.memory.retrieval import RetrievalMemory
from infini_bench.stream import chunked, feed, generate, prefill_rows

from .base import aligned, has_controls

if TYPE_CHECKING:
    from .booksum import Booksum

Summaries = list[np.ndarray]  # token ids of one book's samples, without the end
Asked = tuple[int | None, str, int, Summaries]  # input length, condition, number of the book
Made = Iterator[Asked]
OWN = "pairwise"  # the condition of what is no control
SHUFFLE = 7  # sets the order of shuffled segments apart from what samples are drawn with


@dataclass
class Prompt:
    """What a summary follows: the state at the last segment's border of what was read, and the rest."""

    length: int | None
    condition: str
    place: int  # of the book in its group
    state: Any
    tail: np.ndarray


class Writer:
    """One evaluation of one model. Bars: tokens read, and books written."""

    def __init__(self, booksum: Booksum, model, progress):
        self.booksum, self.task, self.cfg, self.model = booksum, booksum.task, booksum.cfg, model
        self.progress = progress
        if self.task.gates and model.gates() is None:
            raise UserError(f"task.gates: {self.cfg.model} has no gates; leave it out.")
        if self.task.compile:
            if not getattr(model, "steady", False):
                raise UserError(f"task.compile: {self.cfg.model} has no steps of one shape; leave it out.")
            model.compile_steps()

    def write_all(self, books: Sequence[np.ndarray], lengths: Sequence[int | None]) -> Made:
        """Summaries at each input length, and the controls at the longest."""
        groups = max(
            1, min(-(-len(books) // self.task.batch), len(books) // 2)
        )  # of two or more, if possible
        controlled = has_controls(self.cfg, self.model)
        passes = 1 + controlled + len(self.task.gates)
        read = passes * sum(len(book[: lengths[-1]]) for book in books)
        count = len(books) * (len(lengths) + len(self.task.gates) + 3 * controlled)
        with self.progress.task("books", read) as self.reading, self.progress.task("summaries", count) as bar:
            for numbers in np.array_split(np.arange(len(books)), groups):
                group = [books[i] for i in numbers]
                for length, condition, place, summaries in self._group(numbers, group, lengths, controlled):
                    bar.advance()
                    yield length, condition, int(numbers[place]), summaries

    def _group(self, numbers, books: list[np.ndarray], lengths, controlled: bool) -> Made:
        """Books that are written side by side, at all lengths and controls at once: a step of many rows takes
        hardly longer than one of few. Each book is read once, and its state kept at every length."""
        states: list[Any] = [None] * len(books)
        read = [0] * len(books)
        own: list[Prompt] = []
        for length in lengths:
            cuts = [book[:length] for book in books]
            borders = [len(cut) // self.model.segment * self.model.segment for cut in cuts]
            parts = [cut[a:b] for cut, a, b in zip(cuts, read, borders, strict=True)]
            states, read = [self._read(*each) for each in zip(parts, states, strict=True)], borders
            tails = [
                np.concatenate([c[b:], self.booksum.separator]) for c, b in zip(cuts, borders, strict=True)
            ]
            own += prompts(length, OWN, states, tails)
        wholes = [cut[:border] for cut, border in zip(cuts, borders, strict=True)]
        if controlled and len(books) > 1:
            own += prompts(length, "other_memory", [*states[1:], states[0]], tails)
        if controlled:
            shuffled = [self._shuffled(*each) for each in zip(numbers, wholes, strict=True)]
            own += prompts(length, "shuffled", list(map(self._read, shuffled)), tails)
        yield from self._write(numbers, own)
        if controlled:
            with self.model.memory_off():
                made = self._write(numbers, prompts(length, "memory_off", [None] * len(books), tails))
            yield from made
        for gate in self.task.gates:
            with fixed_gates(self.model, gate):
                states = list(map(self._read, wholes))
                made = self._write(numbers, prompts(length, f"gate_{gate:g}", states, tails))
            yield from made

    def _shuffled(self, number: int, whole: np.ndarray) -> np.ndarray:
        segments = whole.reshape(-1, self.model.segment)
        order = np.random.default_rng([self.cfg.seed, int(number), SHUFFLE]).permutation(len(segments))
        return segments[order].ravel()

    def _read(self, tokens: np.ndarray, state=None):
        """The state after more whole segments of one book."""
        chunks = chunked(tokens[None], aligned(self.task.chunk, self.model.segment))
        with encoding(self.model):
            return feed(self.model, chunks, state, self.reading) if len(tokens) else state

    def _write(self, numbers, asked: list[Prompt]) -> list[Asked]:
        """What is written for each of the prompts, side by side."""
        keys = [[self.cfg.seed, int(numbers[each.place])] for each in asked]
        states, tails = stack([each.state for each in asked]), [each.tail for each in asked]
        made = self._generate(keys, states, tails, self.task.max_new_tokens, self.task.samples)
        return [
            (each.length, each.condition, each.place, summaries)
            for each, summaries in zip(asked, made, strict=True)
        ]

    def _generate(self, keys, state, tails: list[np.ndarray], most: int, samples: int) -> list[Summaries]:
        """What follows each row's state and the end of its prompt. keys: seeds of the rows' draws."""
        task, eos_id = self.task, self.booksum.tokenizer.eos_id
        logits, state = prefill_rows(self.model, tails, state)
        samples = 1 if task.greedy else samples
        rows = torch.arange(len(tails), device=logits.device).repeat_interleave(samples)
        draws = [np.random.default_rng([*key, i]).random(most) for key in keys for i in range(samples)]
        options = {"greedy": task.greedy, "temperature": task.temperature, "top_p": task.top_p}
        ids = generate(
            self.model,
            logits[rows],
            state.select_rows(rows),
            most,
            eos_id=eos_id,
            draws_BT=torch.from_numpy(np.stack(draws)).to(logits.device),
            **options,
        )
        ended = [row[: int(np.argmax(row == eos_id))] if eos_id in row else row for row in ids]
        return [ended[a : a + samples] for a in range(0, len(ended), samples)]

    # Map and reduce ----------------------------------------------------------------------------------------

    def map_reduce(self, books: Sequence[np.ndarray], lengths: Sequence[int | None]) -> Made:
        """Hierarchical summaries: parts of ``map_tokens``, each a document of its own, are summarised in up
        to ``map_new_tokens``; the summaries, end to end, are cut into parts again until there is one.

        Its summary, of up to ``max_new_tokens``, is the book's. Parts of all books and samples are written
        side by side, ``batch`` of them. The level and number of a part belong to the seed of its draws,
        behind the sample's.
        """
        self.reading, samples = None, range(1 if self.task.greedy else self.task.samples)
        with self.progress.task("summaries", len(books) * len(lengths)) as bar:
            for length in lengths:
                texts = {(n, i): book[:length] for n, book in enumerate(books) for i in samples}
                found = self._reduced(texts)
                for number in range(len(books)):
                    bar.advance()
                    yield length, OWN, number, [found[number, i] for i in samples]

    def _reduced(self, texts: dict[tuple[int, int], np.ndarray]) -> dict[tuple[int, int], np.ndarray]:
        """The summary of each book (by number and sample), a level of all of them after the other."""
        size, border, level = self.task.map_tokens, self.booksum.tokenizer.encode("\n\n"), 0
        found: dict[tuple[int, int], np.ndarray] = {}
        while texts:
            whole = {key: [text] for key, text in texts.items() if len(text) <= size}
            rest = {
                key: list(np.split(text, range(size, len(text), size)))
                for key, text in texts.items()
                if key not in whole
            }
            made = self._parts(whole, level, self.task.max_new_tokens)
            found |= {key: summary for key, (summary,) in made.items()}
            made = self._parts(rest, level, self.task.map_new_tokens)
            texts = {
                key: np.concatenate([ids for part in parts for ids in (part, border)])
                for key, parts in made.items()
            }
            level += 1
        return found

    def _parts(self, texts: dict[tuple[int, int], Summaries], level: int, most: int):
        """A summary of each part of each text; those of one length are read side by side."""
        segment = self.model.segment
        parts = [
            (len(ids) // segment * segment, [self.cfg.seed, *key, level, i], ids)
            for key, text in texts.items()
            for i, ids in enumerate(text)
        ]
        order = sorted(range(len(parts)), key=lambda i: parts[i][0])
        made: dict[int, np.ndarray] = {}
        for a in range(0, len(order), self.task.batch):
            group = order[a : a + self.task.batch]
            states: list[Any] = []
            for border, same in groupby(group, lambda i: parts[i][0]):
                rows = [parts[i][2][:border] for i in same]
                size = aligned(self.task.chunk, segment, len(rows))
                read = chunked(np.stack(rows), size)
                states += [feed(self.model, read)] if border else [None] * len(rows)
            tails = [np.concatenate([parts[i][2][parts[i][0] :], self.booksum.separator]) for i in group]
            written = self._generate([parts[i][1] for i in group], stack(states), tails, most, 1)
            made |= {i: samples[0] for i, samples in zip(group, written, strict=True)}
        each = (made[i] for i in range(len(parts)))
        return {key: [next(each) for _ in text] for key, text in texts.items()}


def prompts(length: int | None, condition: str, states: list[Any], tails: list[np.ndarray]) -> list[Prompt]:
    """Of all books of a group."""
    pairs = zip(states, tails, strict=True)
    return [Prompt(length, condition, place, *each) for place, each in enumerate(pairs)]


def stack(states: list[Any]):
    """One batch of states at segment borders; None where a document starts, or where all do."""
    known = next((state for state in states if state is not None), None)
    return None if known is None else type(known).stack(states)


@contextmanager
def encoding(model) -> Iterator[None]:
    """Inside, retrieval reads its window alone: what is fed is found later, when a summary is written."""
    memories = [m for m in model.modules() if isinstance(m, RetrievalMemory)]
    for memory in memories:
        memory.searching = False
    try:
        yield
    finally:
        for memory in memories:
            memory.searching = True


@contextmanager
def fixed_gates(model, gate: float) -> Iterator[None]:
    """Inside, every gate of the model's memories has this value, whatever it learned or depends on."""
    gates = {"memory_gate": math.inf, "memory_gate_input": 0.0}
    if 0 < gate < 1:
        gates["memory_gate"] = math.log(gate / (1 - gate))
    elif gate == 0:
        gates["memory_gate"] = -math.inf
    own = [(p, gates[n]) for m in model.memories for n, p in m.named_parameters(recurse=False) if n in gates]
    kept = [p.detach().clone() for p, _ in own]
    try:
        for parameter, value in own:
            parameter.data.fill_(value)
        yield
    finally:
        for (parameter, _), before in zip(own, kept, strict=True):
            parameter.data.copy_(before)
