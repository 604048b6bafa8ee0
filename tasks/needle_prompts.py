"""Prompts of tasks/needles.py: sentences with a key and a value, hidden in the text of books.

A prompt is ``[announcement] filler needle filler ... question``, made lazily from token pieces: however
long it is, only the tokens that are asked for exist.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass

import numpy as np

from infini_bench.data import Tokenizer
from infini_bench.errors import UserError

from .haystack import FILLER, Prompt

NEEDLE = " The secret code for the {key} is {value}."
QUESTION = " What is the secret code for the {key}? The secret code for the {key} is"
QUESTIONS = " What are all secret codes for the {key}, in their order? The secret codes for the {key} are"
BEFORE = "Find the secret code for the {key}, which stands in this text."
COLOURS = (
    *("amber", "azure", "black", "bronze", "copper", "coral", "crimson", "golden", "green", "grey", "indigo"),
    *("ivory", "olive", "orange", "pink", "purple", "red", "scarlet", "silver", "teal", "violet", "white"),
)
THINGS = (
    *("anchor", "badger", "basket", "bridge", "candle", "castle", "cellar", "clock", "falcon", "garden"),
    *("hammer", "island", "ladder", "lantern", "market", "mirror", "needle", "oven", "palace", "pillar"),
    *("river", "saddle", "temple", "tunnel", "valley", "violin", "wagon", "window"),
)
ENDS = (".", "!", "?")  # of a sentence
QUOTES = " \n\"'\u201d\u2019)_"  # and what may stand behind it in the same token


@dataclass(frozen=True)
class Kind:
    """``keys`` needles of different keys, of which one is asked, or ``values`` needles of the one key."""

    keys: int
    values: int
    uuid: bool = False


class Text:
    """Endless filler: token ids (T,), read again from the start, and the places behind its sentences."""

    def __init__(self, ids: np.ndarray, tokenizer: Tokenizer):
        words = (tokenizer.decode([i]) for i in range(tokenizer.vocab_size))
        closing = [word.rstrip(QUOTES).endswith(ENDS) for word in words]
        closes, step = np.array(closing), 1 << 24  # of a corpus on disk only so much is read at a time
        found = [a + 1 + np.flatnonzero(closes[ids[a : a + step]]) for a in range(0, len(ids), step)]
        self.ids, self.ends = ids, np.concatenate([[0], *found])

    @classmethod
    def constant(cls, tokenizer: Tokenizer) -> Text:
        """The sentences of the passkey task."""
        return cls(tokenizer.encode("".join(f" {sentence}" for sentence in FILLER)), tokenizer)

    def border(self, place: int) -> int:
        """The last place at or before ``place``, counted from the text's start, where a sentence begins."""
        laps, rest = divmod(place, len(self.ids))
        return laps * len(self.ids) + int(self.ends[np.searchsorted(self.ends, rest, side="right") - 1])


@dataclass(frozen=True)
class Trial:
    """What is hidden and asked, as tokens. asked: the needle that is; None = all, in this order."""

    before: np.ndarray
    needles: list[np.ndarray]
    asked: int | None
    question: np.ndarray
    answer: np.ndarray

    @property
    def size(self) -> int:
        """Tokens but for filler."""
        return sum(map(len, [self.before, *self.needles, self.question, self.answer]))

    @property
    def near(self) -> int:
        """Tokens of a needle and the question."""
        return len(self.needles[self.asked or 0]) + len(self.question)


class Needles:
    """Makes trials for one tokenizer. Raises UserError if it does not keep a value apart from a question."""

    def __init__(self, tokenizer: Tokenizer, digits: int):
        self.tokenizer, self.digits = tokenizer, digits

    def trial(self, rng: np.random.Generator, kind: Kind, before: bool) -> Trial:
        """Keys and values drawn from ``rng``; before: the prompt starts by saying what will be asked."""
        drawn = rng.choice(len(COLOURS) * len(THINGS), kind.keys, replace=False)
        keys = [f"{COLOURS[i % len(COLOURS)]} {THINGS[i // len(COLOURS)]}" for i in drawn] * kind.values
        values = [self._value(rng, kind) for _ in keys]
        asked = int(rng.integers(kind.keys))
        wording, answer = (QUESTIONS, ", ".join(values)) if kind.values > 1 else (QUESTION, values[asked])
        encode, key = self.tokenizer.encode, keys[asked]
        return Trial(
            encode(BEFORE.format(key=key)) if before else np.zeros(0, np.int32),
            [encode(NEEDLE.format(key=k, value=v)) for k, v in zip(keys, values, strict=True)],
            None if kind.values > 1 else asked,
            *self._asked(wording.format(key=key), answer),
        )

    def _value(self, rng: np.random.Generator, kind: Kind) -> str:
        if kind.uuid:
            return str(uuid.UUID(bytes=rng.bytes(16)))
        low = 10 ** (self.digits - 1)
        return str(rng.integers(low, 10 * low))

    def _asked(self, question: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
        """Question and answer tokens. The answer is the shortest tail that spells it, so that a space of its
        own belongs to the question."""
        both = self.tokenizer.encode(f"{question} {answer}")
        for border in range(len(both) - 1, 0, -1):
            if self.tokenizer.decode(both[border:]).strip() == answer:
                return both[:border], both[border:]
        raise UserError(f"Use another tokenizer: {self.tokenizer.name} merges a question with its answer.")


def prompt(
    trial: Trial, text: Text, length: int, depth: float, rng: np.random.Generator, earliest: int = 0
) -> Prompt:
    """The prompt whose tokens and answer are exactly ``length``.

    The asked needle, or one of them, stands behind a share ``depth`` of the filler, the others anywhere; all
    move back to the end of a sentence, but at depth 1. earliest: it does not start before this token.
    """
    room = length - trial.size
    start = text.border(int(rng.integers(len(text.ids))))
    wanted = [round(depth * room), *rng.integers(0, room + 1, len(trial.needles) - 1).tolist()]
    places = [place if place == room else max(text.border(start + place) - start, 0) for place in wanted]
    places[0] = max(places[0], min(max(earliest - len(trial.before), 0), room))
    ordered, needles = sorted(places), [*trial.needles]
    turn = ordered.index(places[0])
    if trial.asked is not None:
        needles.insert(turn, needles.pop(trial.asked))
    pieces, at, used, spans = [(trial.before, 0, len(trial.before))], len(trial.before), 0, []
    for place, needle in zip(ordered, needles, strict=True):
        pieces += [(text.ids, start + used, place - used), (needle, 0, len(needle))]
        at, used = at + place - used + len(needle), place
        spans.append((at - len(needle), at))
    pieces += [(text.ids, start + used, room - used), (trial.question, 0, len(trial.question))]
    return Prompt(tuple(pieces), spans[turn], at + room - used, trial.answer)
