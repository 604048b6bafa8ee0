"""The small world behind a chronicle: who is warden, who holds an office, who is away, who is at war.

It tells one year after the other, each in one line, and never contradicts itself: the dead do not act,
children grow up before they rule, nobody trades with the enemy.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from infini_bench.data import chronicle_words as words_of

Item = TypeVar("Item")

GROWN = 16  # years


class Person(NamedTuple):
    """Somebody of the chronicle; ``she`` chooses the pronoun."""

    name: str
    she: bool

    @property
    def pronoun(self) -> str:
        return "she" if self.she else "he"

    @property
    def possessive(self) -> str:
        return "her" if self.she else "his"


def pick(rng: random.Random, options: Sequence[Item]) -> Item:
    """Like ``rng.choice``, at a fraction of its cost."""
    return options[int(rng.random() * len(options))]


def draw_person(rng: random.Random, first: str, bynames: Sequence[str] = words_of.TRADES) -> Person:
    """Somebody called ``first``, with a byname."""
    return Person(f"{first} the {pick(rng, bynames)}", first in words_of.WOMEN)


class World:
    """A town from its second year on. ``first_names`` are those that may be given to its people."""

    def __init__(
        self, rng: random.Random, town: str, river: str, neighbours: Sequence[str], first_names: Sequence[str]
    ) -> None:
        self.rng, self.town, self.river = rng, town, river
        self.neighbours, self.first_names = neighbours, first_names
        self.year = 1
        self.enemy: str | None = None
        self._known: set[str] = set()
        self.warden = self._stranger()
        self.spouse: Person | None = None
        self.child: tuple[Person, int] | None = None  # with the year of birth
        self.offices = {office: self._stranger() for office in words_of.OFFICES}
        self.traveller: tuple[Person, str, int] | None = None  # whereto, and the year of the return

    def tell_year(self) -> str:
        """What happened in the current year, in one line."""
        quality = "good" if self.rng.random() < 0.7 else "poor"
        start = f"In the year {self.year} the harvest of {pick(self.rng, words_of.GRAINS)} was {quality}."
        events = [self._return()] if self.traveller and self.traveller[2] <= self.year else []
        events += [event(self) for event in self.rng.sample(self._EVENTS, 1 + int(self.rng.random() * 3))]
        return " ".join([start, *events])

    def _stranger(self, bynames: Sequence[str] = words_of.TRADES, she: bool | None = None) -> Person:
        """Somebody whose name nobody has had before, as long as there are names."""
        for _ in range(50):
            person = draw_person(self.rng, pick(self.rng, self.first_names), bynames)
            if person.name not in self._known and she in (None, person.she):
                break
        self._known.add(person.name)
        return person

    def _friend(self) -> str:
        """A neighbouring town at peace."""
        return pick(self.rng, [town for town in self.neighbours if town != self.enemy])

    def _family(self) -> str:
        """What comes next in the warden's house: a wedding, a birth, years of youth, a death."""
        if self.spouse is None:
            self.spouse = self._stranger(she=not self.warden.she)
            return f"The warden {self.warden.name} married {self.spouse.name} of {self._friend()}."
        if self.child is None:
            child = self._stranger(words_of.BYNAMES)
            self.child = (child, self.year)
            kind = "daughter" if child.she else "son"
            return f"A {kind} was born to the warden and called {child.name}."
        child, born = self.child
        if self.rng.random() < 0.7:
            lesson = pick(self.rng, words_of.LESSONS)
            return f"{child.name} was {self.year - born} years old and learned {lesson}."
        return self._succession()

    def _succession(self) -> str:
        assert self.child is not None
        child, born = self.child
        death = f"The warden {self.warden.name} died of {pick(self.rng, words_of.CAUSES)}"
        age = self.year - born
        if age >= GROWN:
            kind = "daughter" if child.she else "son"
            line = f"{death}, and {self.warden.possessive} {kind} {child.name} became warden."
            self.warden = child
        else:
            self.warden = self._stranger()
            line = f"{death}. {child.name} was a child, and the council chose {self.warden.name} as warden."
        self.spouse = self.child = None
        return line

    def _office(self) -> str:
        office = pick(self.rng, words_of.OFFICES)
        old, new = self.offices[office], self._stranger()
        self.offices[office] = new
        cause, grave = pick(self.rng, words_of.CAUSES), pick(self.rng, words_of.GRAVES)
        death = f"The {office} {old.name} died of {cause} and was buried {grave}"
        return f"{death}, and {new.name} was made {office}."

    def _journey(self) -> str:
        if self.traveller:
            return f"There was no word of {self.traveller[0].name}, who was away in {self.traveller[1]}."
        person, place = self._stranger(), self._friend()
        self.traveller = (person, place, self.year + 1 + int(self.rng.random() * 3))
        return f"{person.name} went to {place} to buy {pick(self.rng, words_of.GOODS)}."

    def _return(self) -> str:
        assert self.traveller is not None
        person, place, _ = self.traveller
        self.traveller = None
        if place == self.enemy:
            return f"{person.name} fled home from {place} because of the war."
        return f"{person.name} came home from {place} with {pick(self.rng, words_of.GOODS)}."

    def _trade(self) -> str:
        bought, sold = self.rng.sample(words_of.GOODS, 2)
        return f"Carts came from {self._friend()} with {bought} and went home with {sold}."

    def _quarrel(self) -> str:
        one, other = self._stranger(), self._stranger()
        thing, winner = pick(self.rng, words_of.QUARRELS), pick(self.rng, (one, other))
        return (
            f"{one.name} and {other.name} quarrelled over {thing}, "
            f"and the warden {self.warden.name} gave it to {winner.name}."
        )

    def _feast(self) -> str:
        day, steward = pick(self.rng, words_of.DAYS), self.offices["steward"].name
        return f"There was dancing {day}, and the steward {steward} paid for the beer."

    def _weather(self) -> str:
        return pick(self.rng, words_of.WEATHER).format(river=self.river, town=self.town)

    def _beasts(self) -> str:
        line = pick(self.rng, words_of.BEASTS)
        return line.format(number=self.rng.randint(2, 30), person=self._stranger().name)

    def _defence(self) -> str:
        captain = self.offices["captain"].name
        if self.enemy is None:
            day = pick(self.rng, words_of.DAYS)
            return f"The captain {captain} let the young people ride and shoot {day}."
        return pick(self.rng, words_of.WAR_TIMES).format(enemy=self.enemy, person=self._stranger().name)

    _EVENTS: tuple[Callable[[World], str], ...] = (
        _family, _office, _journey, _trade, _quarrel, _feast, _weather, _weather, _beasts, _defence,
    )  # fmt: skip
