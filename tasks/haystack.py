"""Passkey prompts of any length, made lazily from a few tokenised pieces.

A prompt is ``task line, filler sentences, needle, filler sentences, question`` joined by single spaces; the
five filler sentences run in a cycle that starts with the first and goes on behind the needle. The wording is
the paper's (appendix, version 2) with "ack again" put right.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from infini_bench.data import Tokenizer
from infini_bench.errors import UserError

from .base import Batch, mean_over_rows

TASK_LINE = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"


def prompt_text(key: str, before: int, sentences: int) -> str:
    """The prompt as text: ``before`` of the filler sentences stand in front of the needle."""
    filler = [FILLER[i % len(FILLER)] for i in range(sentences)]
    return " ".join([TASK_LINE, *filler[:before], NEEDLE.format(key=key), *filler[before:], QUESTION])


@dataclass(frozen=True)
class Prompt:
    """One prompt as pieces (array, phase, length), of which token j is ``array[(phase + j) % size]``.

    needle: where it starts and stops, question: where it starts, all in tokens from the prompt's start.
    """

    pieces: tuple[tuple[np.ndarray, int, int], ...]
    needle: tuple[int, int]
    question: int
    answer: np.ndarray

    def __len__(self) -> int:
        return sum(length for _, _, length in self.pieces)

    def tokens(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop), int32; only these are made."""
        stop = len(self) if stop is None else stop
        parts, offset = [np.empty(0, np.int32)], 0
        for array, phase, length in self.pieces:
            a, b = max(start - offset, 0), min(stop - offset, length)
            if a < b:
                parts.append(array[np.arange(phase + a, phase + b) % len(array)])
            offset += length
        return np.concatenate(parts)

    def border(self, segment: int) -> int:
        """Where the segment starts in which the prompt ends."""
        return (len(self) - 1) // segment * segment

    def crosses(self, segment: int) -> bool:
        """Whether question and answer, but for its last token, which is never read, lie in two segments."""
        return self.question // segment != (len(self) + len(self.answer) - 2) // segment


def side_by_side(prompts: list[Prompt], start: int, stop: int, size: int) -> Iterator[np.ndarray]:
    """Chunks (prompts, t <= size) of prompts of one length, from token start to stop.

    Cut at multiples of ``size``: chunks of whole segments go from border to border, and nothing is padded.
    """
    while start < stop:
        end = min((start // size + 1) * size, stop)
        yield np.stack([prompt.tokens(start, end) for prompt in prompts])
        start = end


Example = tuple[np.ndarray, np.ndarray, np.ndarray]


def training_row(prompt: Prompt, length: int, eos_id: int) -> Example:
    """Prompt and answer padded to (length,), and masks (length - 1,) of the answer's targets and others."""
    end = len(prompt) + len(prompt.answer)
    tokens = np.full(length, eos_id, np.int64)
    tokens[:end] = np.concatenate([prompt.tokens(), prompt.answer])
    answer, rest = np.zeros((2, length - 1), np.float32)
    rest[: len(prompt) - 1] = 1
    answer[len(prompt) - 1 : end - 1] = 1
    return tokens, answer, rest


def training_batch(rows: list[Example], lm_weight: float) -> Batch:
    """Loss: mean over the answers' tokens + ``lm_weight`` x the mean over the others."""
    tokens, answer, rest = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    return Batch(tokens, mean_over_rows(answer) + lm_weight * mean_over_rows(rest), answer)


class Haystack:
    """Makes prompts for one tokenizer and one number of digits.

    Raises UserError if the tokenizer merges across the pieces' borders, or gives keys of equal length
    different numbers of tokens: then no prompt could be made in pieces.
    """

    def __init__(self, tokenizer: Tokenizer, digits: int):
        self.tokenizer, self.digits = tokenizer, digits
        self.head = tokenizer.encode(TASK_LINE)
        sentences = [self._piece(sentence) for sentence in FILLER]
        self.cycle = np.concatenate(sentences)
        self.ends = np.cumsum([0, *map(len, sentences)])
        self._check()

    def key(self, rng: np.random.Generator) -> str:
        """A random key; its first digit is not 0."""
        low = 10 ** (self.digits - 1)
        return str(rng.integers(low, 10 * low))

    def prompt(self, key: str, before: int, sentences: int, shorter: int = 0) -> Prompt:
        """The prompt with ``before`` of ``sentences`` filler sentences in front of the needle.

        The filler breaks off ``shorter`` tokens early; a needle that would stand behind its end stands there.
        """
        filler = self.filler_tokens(sentences) - shorter
        return self.hidden(key, self.cycle, 0, min(self.filler_tokens(before), filler), filler)

    def hidden(self, key: str, text: np.ndarray, place: int, first: int, filler: int) -> Prompt:
        """The prompt with ``filler`` tokens of endless text from ``place`` on, ``first`` before the key."""
        needle = self._piece(NEEDLE.format(key=key))
        question, answer = self._question(key)
        start = len(self.head) + first
        pieces = (
            (self.head, 0, len(self.head)),
            (text, place % len(text), first),
            (needle, 0, len(needle)),
            (text, (place + first) % len(text), filler - first),
            (question, 0, len(question)),
        )
        asked = len(self.head) + filler + len(needle)
        return Prompt(pieces, (start, start + len(needle)), asked, answer)

    def filler_tokens(self, sentences: int) -> int:
        """Tokens of the first ``sentences`` filler sentences."""
        return int(self.filler_places(np.array(sentences)))

    def filler_places(self, sentences: np.ndarray) -> np.ndarray:
        """`filler_tokens` of several numbers of sentences."""
        return sentences // len(FILLER) * len(self.cycle) + self.ends[sentences % len(FILLER)]

    @cached_property
    def bare(self) -> int:
        """Tokens of a prompt without filler."""
        return len(self.prompt("1" * self.digits, 0, 0))

    @cached_property
    def needle_tokens(self) -> int:
        """Of the sentence with the key."""
        return len(self._piece(NEEDLE.format(key="1" * self.digits)))

    @cached_property
    def shortest(self) -> int:
        """Tokens of a prompt without filler, and its answer."""
        return self.bare + len(self.prompt("1" * self.digits, 0, 0).answer)

    def sentences(self, length: int) -> int:
        """Filler sentences that fit when prompt and answer may take ``length`` tokens."""
        room = length - self.shortest
        if room < 0:
            raise UserError(
                f"The passkey prompt does not fit in {length} tokens; ask for {self.shortest} or more."
            )
        cycles, rest = divmod(room, len(self.cycle))
        return cycles * len(FILLER) + int(np.searchsorted(self.ends, rest, side="right")) - 1

    def exactly(self, length: int) -> tuple[int, int]:
        """The fewest filler sentences, and by how many tokens they break off, that give ``length`` tokens."""
        sentences = self.sentences(length)
        if self.shortest + self.filler_tokens(sentences) < length:
            sentences += 1
        return sentences, self.shortest + self.filler_tokens(sentences) - length

    def earliest(self, sentences: int, segment: int, shorter: int = 0) -> int:
        """The fewest filler sentences with which the needle starts in the segment in which the prompt ends.

        More than ``sentences`` where the needle, directly before the question, would start before it.
        """
        filler = self.filler_tokens(sentences) - shorter
        needed = max((self.bare + filler - 1) // segment * segment - len(self.head), 0)
        cycles, rest = divmod(needed, len(self.cycle))
        found = cycles * len(FILLER) + int(np.searchsorted(self.ends, rest))
        return found if needed <= filler else max(found, sentences + 1)

    def straddling(self, filler: int, segment: int, places: np.ndarray) -> np.ndarray:
        """Of places, each so many tokens of ``filler`` in front of the needle, which split it by a border."""
        start = len(self.head) + np.minimum(places, filler)
        return np.flatnonzero(start // segment != (start + self.needle_tokens - 1) // segment)

    def reaching(self, segment: int) -> int:
        """The fewest tokens of filler that, all in front, put the needle's last token behind a border."""
        return max(segment - len(self.head) - self.needle_tokens + 1, 0)

    def place(self, depth: str, sentences: int, segment: int, shorter: int = 0) -> int:
        """Filler sentences in front of the needle at a depth, as tasks/passkey.py defines it."""
        prompt = self.prompt("1" * self.digits, sentences, sentences, shorter)
        if depth == "end":
            if prompt.needle[0] // segment != (len(prompt) - 1) // segment:
                raise self._impossible("end", "needle and question in one segment", prompt, segment)
            return sentences
        if depth == "end_outside":
            return self._outside(prompt, sentences, segment)
        percent = {"start": 0.0, "middle": 50.0}.get(depth)
        return round(sentences * (float(depth) if percent is None else percent) / 100)

    def _outside(self, prompt: Prompt, sentences: int, segment: int) -> int:
        """The last place where the needle lies wholly in the segment before that of the question's start."""
        start, stop = prompt.needle
        wanted = prompt.question // segment - 1
        for before in range(sentences, -1, -1):
            back = max(start - len(self.head) - self.filler_tokens(before), 0)
            first, last = (start - back) // segment, (stop - 1 - back) // segment
            if first == last == wanted:
                return before
            if last < wanted:
                break
        raise self._impossible("end_outside", "needle in the segment before the question", prompt, segment)

    def _impossible(self, depth: str, what: str, prompt: Prompt, segment: int) -> UserError:
        needle, question = prompt.needle[1] - prompt.needle[0], len(prompt) - prompt.question
        return UserError(
            f'Choose another length or leave out depth "{depth}" ({what}): a prompt of {len(prompt)} tokens '
            f"in segments of {segment}, a needle of {needle} and a question of {question}, has no such place."
        )

    def _piece(self, sentence: str) -> np.ndarray:
        """Tokens of `` sentence`` behind another sentence."""
        return self._after(self.tokenizer.encode(FILLER[-1]), f"{FILLER[-1]} {sentence}")

    def _question(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Question and answer tokens. The answer is the shortest tail that spells the key, so that a space of
        its own belongs to the question."""
        both = self._piece(f"{QUESTION} {key}")
        tails = (i for i in range(len(both) - 1, 0, -1) if self.tokenizer.decode(both[i:]).strip() == key)
        border = next(tails, None)
        if border is None:
            raise self._unfit("does not keep the key apart from the question")
        return both[:border], both[border:]

    def _after(self, head: np.ndarray, text: str) -> np.ndarray:
        ids = self.tokenizer.encode(text)
        if not np.array_equal(ids[: len(head)], head):
            raise self._unfit("merges tokens across sentences")
        return ids[len(head) :]

    def _check(self) -> None:
        """A small prompt in pieces equals the tokenised text, and keys have one length."""
        rng, shapes = np.random.default_rng(0), set()
        for key in {self.key(rng) for _ in range(32)}:
            prompt = self.prompt(key, 3, 7)
            whole = self.tokenizer.encode(f"{prompt_text(key, 3, 7)} {key}")
            if not np.array_equal(np.concatenate([prompt.tokens(), prompt.answer]), whole):
                raise self._unfit("merges tokens across sentences")
            shapes.add((len(prompt), len(prompt.answer)))
        if len(shapes) > 1:
            raise self._unfit("gives keys of equal length different numbers of tokens")

    def _unfit(self, reason: str) -> UserError:
        return UserError(f"Use another tokenizer for passkey: {self.tokenizer.name} {reason}.")
