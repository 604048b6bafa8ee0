"""Needles in the text of books, harder than the passkey: RULER's first four tasks (Hsieh et al. 2024,
arXiv 2404.06654), in words of our own.

Protocol, version 1. Prompt: tasks/needle_prompts.py. ``The secret code for the KEY is VALUE.`` stands in the
text of documents, which go on from a random sentence, end to end; KEY is a colour and a thing.

* ``number`` (RULER: niah_single_2): one needle, its value ``digits`` random digits, the first not 0.
* ``uuid`` (niah_single_3): one needle, its value 32 random hexadecimal digits in five groups.
* ``multikey`` (niah_multikey_1): the asked needle, and ``distractors`` needles of other keys.
* ``multivalue`` (niah_multivalue): ``values`` needles of one key; all are asked, in their order in the text.

Prompt and answer take exactly the requested length. Depth p: the asked needle (of ``multivalue`` one of them)
stands behind p % of the filler, the others at uniform random places; all move back to the end of a sentence,
but at 100, which is directly before the question. ``start`` = 0, ``middle`` = 50.

Fillers: ``text``, of ``task.split``, which training did not see; ``constant``, the passkey's sentences.
Questions: ``after`` the text; ``before``: the prompt also starts with what will be asked.

* ``exact_match``: percent of trials whose answer tokens all are the most probable ones, teacher-forced,
  which is the same as generating them greedily. ``token_accuracy``: percent of answer tokens, likewise.

Wilson intervals. ``extra["segments"]``: median of question's start minus needle's end, in segments.
Conditions: every kind with the first filler and question; the first kind with each other filler and question;
and of all ``memory_off``: nothing from before a token's segment, unless there is no memory to switch off.
Trials depend on seed, condition, length, depth and number alone.

Training: rows of ``segments`` segments; the answer ends anywhere in the last. Kind (of those that fit),
filler, question and depth are uniform, text is the train split's; but in a share ``own_segment`` of the rows
the asked needle starts in the segment in which the prompt ends, or if that is too short directly before the
question. Loss: mean over the answer + ``lm_weight`` x the mean over the rest.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cache, cached_property
from hashlib import sha256
from statistics import median

import numpy as np
import torch

from infini_bench import data
from infini_bench.errors import UserError
from infini_bench.metrics.intervals import Interval
from infini_bench.metrics.retrieval import percent
from infini_bench.progress import NullProgress
from infini_bench.stream import feed
from infini_bench.units import parse_length

from .base import Batch, Row, Task, aligned, evaluating, has_controls
from .haystack import FILLER, Example, Prompt, side_by_side, training_batch, training_row
from .needle_prompts import BEFORE, NEEDLE, QUESTION, QUESTIONS, Kind, Needles, Text, prompt


@dataclass(frozen=True)
class Condition:
    """What is hidden in what, and where it is asked."""

    kind: str
    filler: str
    question: str

    @property
    def name(self) -> str:
        parts = [self.kind, "constant filler" if self.filler == "constant" else ""]
        return ", ".join(filter(None, [*parts, "asked before" if self.question == "before" else ""]))


class NeedlesTask(Task):
    name = "needles"
    version = "1"
    score = ("exact_match", "token_accuracy")

    def __init__(self, cfg, tokenizer=None):
        super().__init__(cfg, tokenizer)
        self.text = cache(self._text)
        self.kinds = {
            "number": Kind(1, 1),
            "uuid": Kind(1, 1, uuid=True),
            "multikey": Kind(1 + self.task.distractors, 1),
            "multivalue": Kind(1, self.task.values),
        }

    @cached_property
    def fingerprint(self) -> str:
        task = self.task
        parts = [self.version, NEEDLE, QUESTION, QUESTIONS, BEFORE, *FILLER]
        parts += [task.digits, task.distractors, task.values]
        parts += [task.train_kinds, task.train_fillers, task.train_questions]
        for split, fillers in (("train", task.train_fillers), (task.split, task.fillers)):
            if "text" in fillers:
                parts.append(data.fingerprint(self.documents(split)))
        return sha256(repr(parts).encode()).hexdigest()[:16]

    @cached_property
    def needles(self) -> Needles:
        return Needles(self.tokenizer, self.task.digits)

    def _text(self, filler: str, split: str) -> Text:
        if filler == "constant":
            return Text.constant(self.tokenizer)
        return Text(self.all_tokens(split, "use another one"), self.tokenizer)

    # Training ----------------------------------------------------------------------------------------------

    def batch(self, cursor: int, rows: int, segments: int | None = None, split: str = "train") -> Batch:
        """``segments`` segments of inputs, padded behind the answer."""
        length = (segments or self.task.segments) * self.cfg.memory.segment + 1
        examples = [self._example(number, length, split) for number in range(cursor, cursor + rows)]
        return training_batch(examples, self.task.lm_weight)

    def _example(self, number: int, length: int, split: str) -> Example:
        task, segment = self.task, self.cfg.memory.segment
        rng = np.random.default_rng([self.cfg.seed, zlib.crc32(split.encode()), number])
        text = self.text(task.train_fillers[rng.integers(len(task.train_fillers))], split)
        before = task.train_questions[rng.integers(len(task.train_questions))] == "before"
        sizes: list[int] = []
        for name in rng.permutation(task.train_kinds):  # the first that fits, as tokenizing all takes long
            trial = self.needles.trial(rng, self.kinds[name], before)
            sizes.append(trial.size)
            if trial.size <= length:
                break
        else:
            raise UserError(
                f"Set task.segments and trainer.curriculum to {-(-(min(sizes) - 1) // segment)} or more: the "
                f"shortest prompt fills that many segments of {segment} tokens."
            )
        near, border = rng.random() < task.own_segment, length - 1 - segment
        least = max(trial.size, border + 2 + (trial.near + len(trial.answer) if near else 0))
        end = int(rng.integers(min(least, length), length + 1))
        made = prompt(trial, text, end, rng.random(), rng, border if near else 0)
        return training_row(made, length, self.tokenizer.eos_id)

    # Evaluation --------------------------------------------------------------------------------------------

    def conditions(self) -> list[Condition]:
        task = self.task
        kind, filler, question = task.kinds[0], task.fillers[0], task.questions[0]
        return [
            *(Condition(name, filler, question) for name in task.kinds),
            *(Condition(kind, name, question) for name in task.fillers[1:]),
            *(Condition(kind, filler, name) for name in task.questions[1:]),
        ]

    def evaluate(self, model, progress=None) -> list[Row]:
        lengths = [parse_length(length) for length in self.task.lengths]
        cells = [(c, n, depth) for c in self.conditions() for n in lengths for depth in self.task.depths]
        made = {cell: self.prompts(*cell) for cell in cells}  # misfits are told before hours of work
        rows = []
        with evaluating(model), (progress or NullProgress()).task("needles", self._work(lengths)) as bar:
            for (condition, length, depth), prompts in made.items():
                columns = {"length": length, "position": depth, "condition": condition.name}
                rows += self._rows(prompts, columns, model, self._hits(model, prompts, bar))
                if has_controls(self.cfg, model):
                    columns |= {"condition": f"{condition.name}, memory_off"}
                    with model.memory_off():
                        rows += self._rows(prompts, columns, model, self._hits(model, prompts, alone=True))
        return rows

    def prompts(self, condition: Condition, length: int, depth: str) -> list[Prompt]:
        """The trials of a cell."""
        share = {"start": 0.0, "middle": 0.5}.get(depth)
        share = float(depth) / 100 if share is None else share
        text, prompts = self.text(condition.filler, self.task.split), []
        for number in range(self.task.trials):
            words = f"{condition.name} {depth}"
            rng = np.random.default_rng([self.cfg.seed, zlib.crc32(words.encode()), length, number])
            trial = self.needles.trial(rng, self.kinds[condition.kind], condition.question == "before")
            if trial.size > length:
                raise UserError(
                    f"Needles ({condition.kind}) do not fit in {length} tokens; take {trial.size} or more."
                )
            prompts.append(prompt(trial, text, length, share, rng))
        return prompts

    def _work(self, lengths: list[int]) -> int:
        """Tokens to read, controls left out."""
        return sum(lengths) * len(self.conditions()) * len(self.task.depths) * self.task.trials

    def _hits(self, model, prompts: list[Prompt], bar=None, alone: bool = False) -> list[np.ndarray]:
        """Of each trial, which answer tokens are the most probable. alone: read the last segments only."""
        hits = []
        for group in (prompts[i : i + self.task.batch] for i in range(0, len(prompts), self.task.batch)):
            longest = max(len(each.answer) for each in group)
            cut = len(group[0]) + len(group[0].answer) - 1 - longest  # all prompts but for their last tokens
            start = cut // model.segment * model.segment if alone else 0
            size = aligned(self.task.chunk, model.segment, len(group))
            state = feed(model, side_by_side(group, start, cut, size), None, bar)
            ends = np.stack([np.concatenate([each.tokens(cut), each.answer]) for each in group])
            with torch.no_grad():
                ids = torch.from_numpy(ends[:, :-1].astype(np.int64)).to(model.device)
                best = model.step(ids, state)[0].argmax(-1).cpu().numpy()
            right = best == ends[:, 1:]
            hits += [row[-len(each.answer) :] for row, each in zip(right, group, strict=True)]
        return hits

    def _rows(self, prompts: list[Prompt], columns: Row, model, hits: list[np.ndarray]) -> list[Row]:
        n = model.segment
        back = median(each.question // n - (each.needle[1] - 1) // n for each in prompts)
        columns = {**columns, "protocol": self.task.protocol, "split": self.task.split}
        rows = []
        whole = np.array([hit.all() for hit in hits])
        for metric, right in {"exact_match": whole, "token_accuracy": np.concatenate(hits)}.items():
            share = percent(right)
            bounds, extra = Interval(share.low, share.high), {"segments": back}
            rows.append(self.row(metric, share.value, bounds, n=share.n, extra=extra, **columns))
        return rows
