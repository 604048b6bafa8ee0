"""Embedded pairs: invented chronicles of towns with their true summaries, written by a seeded generator.

A chronicle tells the years of one town. A small world (a warden and the warden's family, offices,
neighbours, war and peace) is kept consistent and fills the years; about ten key facts are woven in, each told
only once, from the first line to the last pages. The summary is made of the key facts, so only who remembers
the whole text can write it: who founded the town and swore what, who hid what and where, who betrayed it and
for what price. People of key facts share their first names with nobody else in the chronicle.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from infini_bench.data import chronicle_words as words_of
from infini_bench.data.chronicle_world import Person, World, draw_person, pick
from infini_bench.data.documents import Document, Summary

SEED = 0
INDICES = {"train": range(200), "validation": range(200, 220), "test": range(220, 240)}
LENGTHS = (1500, 6000)  # words


class Fact(NamedTuple):
    """Something told once, at the share ``at`` of the text; it leaves the town at war with ``enemy``."""

    at: float
    told: str
    summed: str
    enemy: str | None = None


class Chronicle(NamedTuple):
    """A chronicle and what its summary rests on."""

    document: Document
    facts: list[Fact]


def load_chronicles(split: str) -> list[Document]:
    """200 chronicles for train, 20 for validation, 20 for test: 1,500 to 6,000 words, no two of one town."""
    lengths = {index: random.Random(f"{SEED}/{index}").randint(*LENGTHS) for index in INDICES[split]}
    return [chronicle(SEED, index, words).document for index, words in lengths.items()]


def chronicle(seed: int, index: int, words: int) -> Chronicle:
    """Chronicle number ``index``, of about ``words`` words: a pure function of its arguments."""
    rng = random.Random(f"{seed}/{index}/{words}")
    towns = [start + end for start in words_of.TOWN_STARTS for end in words_of.TOWN_ENDS]
    random.Random(f"towns/{seed}").shuffle(towns)
    town = towns.pop(index % len(towns))
    cast = rng.sample(words_of.WOMEN + words_of.MEN, len(words_of.WOMEN + words_of.MEN))
    origin, *neighbours = rng.sample(towns, 3)
    river = rng.choice(words_of.RIVERS)
    facts = _plot(rng, [draw_person(rng, name) for name in cast[:8]], town, river, origin, neighbours[0])
    text, last = _weave(World(rng, town, river, neighbours, cast[8:]), facts, words)
    facts.append(last)
    summary = Summary("chronicle", " ".join(fact.summed for fact in facts))
    title = f"The Chronicle of {town}"
    return Chronicle(Document(f"chronicle-{seed}-{index}", title, f"{title}\n\n{text}\n", (summary,)), facts)


def _plot(
    rng: random.Random, cast: list[Person], town: str, river: str, origin: str, enemy: str
) -> list[Fact]:
    """Key facts in the order in which they happen."""
    founder, keeper, traitor, saviour, builder, child, witness, finder = cast
    hidden = f"{keeper.name} hid {pick(rng, words_of.TREASURES)} {pick(rng, words_of.PLACES)}"
    works = _building(rng, builder) if rng.random() < 0.5 else _foundling(rng, builder, child)
    facts = [
        *_founding(rng, founder, town, river, origin),
        Fact(rng.uniform(0.05, 0.2), f"{hidden}, and only the priest knew of it.", f"{hidden}."),
        *works,
        *_war(rng, traitor, saviour, town, enemy),
        *_ending(rng, witness, finder),
    ]
    return sorted(facts, key=lambda fact: fact.at)


def _founding(rng: random.Random, founder: Person, town: str, river: str, origin: str) -> list[Fact]:
    founded = f"founded {town} {pick(rng, words_of.SITES)} the river {river}."
    families = rng.randint(2, 9) * 10
    oath = f"swore {pick(rng, words_of.OATHS)}."
    hand = f"{founder.pronoun} laid {founder.possessive} hand {pick(rng, words_of.HANDS)}"
    return [
        Fact(
            0.0,
            f"In the first year {founder.name} came from {origin} with {families} families and {founded}",
            f"{founder.name} from {origin} {founded}",
        ),
        Fact(0.0, f"On the first night {hand} and {oath}", f"{founder.pronoun.capitalize()} {oath}"),
    ]


def _building(rng: random.Random, builder: Person) -> list[Fact]:
    built = f"{builder.name} built {pick(rng, words_of.WORKS)} {pick(rng, words_of.PAYMENTS)}."
    return [Fact(rng.uniform(0.22, 0.34), built, built)]


def _foundling(rng: random.Random, parent: Person, child: Person) -> list[Fact]:
    found = f"{parent.name} took in a child found {pick(rng, words_of.FINDINGS)}."
    career = f"became {pick(rng, words_of.CAREERS)}"
    return [
        Fact(rng.uniform(0.22, 0.34), found, found),
        Fact(
            rng.uniform(0.6, 0.7),
            f"{child.name} {career}, who had come to the town as a lost child.",
            f"The child, {child.name}, {career}.",
        ),
    ]


def _war(rng: random.Random, traitor: Person, saviour: Person, town: str, enemy: str) -> list[Fact]:
    start = rng.uniform(0.38, 0.46)
    claim = pick(rng, words_of.CLAIMS)
    opened = f"{traitor.name} opened {pick(rng, words_of.DOORS)} for {pick(rng, words_of.PRICES)}"
    rescue = pick(rng, words_of.RESCUES)
    return [
        Fact(
            start,
            f"the lords of {enemy} claimed {claim}, and there was war between {enemy} and {town}.",
            f"In the war with {enemy} over {claim}",
            enemy,
        ),
        Fact(start + 0.05, f"{opened}, and the enemy came in.", f"{opened},", enemy),
        Fact(
            start + 0.09,
            f"{saviour.name} {rescue}. So the town was saved, and there was peace with {enemy}.",
            f"but {saviour.name} {rescue}.",
        ),
    ]


def _ending(rng: random.Random, witness: Person, finder: Person) -> list[Fact]:
    """What became of the oath and of the hidden thing; neither is named again, so they must be remembered."""
    if rng.random() < 0.5:
        told, summed = "broke the oath of the founder, and the town was ashamed.", "broke the oath."
    else:
        told, summed = "kept the oath of the founder, though the council was against it.", "kept the oath."
    fate = pick(rng, words_of.FATES)
    return [
        Fact(rng.uniform(0.76, 0.83), f"{witness.name} {told}", f"{witness.name} {summed}"),
        Fact(
            rng.uniform(0.85, 0.93),
            f"{finder.name} found what had been hidden in the old days and {fate}.",
            f"{finder.name} found what was hidden and {fate}.",
        ),
    ]


def _weave(world: World, facts: list[Fact], words: int) -> tuple[str, Fact]:
    """Years of the world with the facts in their places; the text, and the fact of its end."""
    lines = [fact.told for fact in facts[:2]]
    count, waiting = sum(len(line.split()) for line in lines), facts[2:]
    while waiting or count < words:
        world.year += 1
        if waiting and count >= waiting[0].at * words:
            fact = waiting.pop(0)
            world.enemy = fact.enemy
            line = f"In the year {world.year} {fact.told}"
        else:
            line = world.tell_year()
        lines.append(line)
        count += line.count(" ") + 1
    ruled = f"{world.warden.name} was warden."
    end = Fact(
        1.0,
        f"In the year {world.year + 1} the chronicle of {world.town} ends, when {ruled}",
        f"At the end {ruled}",
    )
    return "\n".join([*lines, end.told]), end
