"""What summaries copy, repeat and name, on texts where it can be counted by hand."""

import math

import pytest

from infini_bench.errors import UserError
from infini_bench.metrics.summaries import Reader, names
from infini_bench.summaries import read_summaries, save_summaries

FIRST = "In London the old Marlow met a man. Then he, Marlow, sailed away on a boat to the sea. "
SECOND = (
    "On the river he saw Kurtz and his friend Harlequin. They feared Kurtz, and Kurtz died. It was London."
)


def test_names_stand_inside_sentences_and_never_in_lower_case():
    assert names("He saw Rose and a rose. Then Bill ran to Ann, Bill and Ed.") == {"Ann", "Bill"}
    assert names("a Bill, a Bill and the Cat", 2) == {"Bill"}
    assert names("Bill ran. Bill fell.") == set()  # only ever at a sentence's start


def reader(*references):
    return Reader(FIRST + SECOND, list(references))


def test_late_names_are_the_second_halfs_own():
    book = reader("Marlow finds Kurtz.", "He goes to London.")
    assert book.late == {"Kurtz"}  # Harlequin once only, London in the first half too
    assert book.asked == {"Kurtz"}
    found = book.measure("The story of Kurtz and of Harlequin, told in Paris.")
    assert (found["late_names"], found["late_name_recall"]) == (1, 100)
    assert found["names_in_book"] == pytest.approx(200 / 3)
    assert math.isnan(reader("Nobody.").measure("Kurtz")["late_name_recall"])


def test_copied_and_repeated():
    found = reader().measure("A man, then he, Marlow, sailed, sailed away. A man then he Marlow sailed!")
    # runs of five: the first two and the last two are the book's, and the last two stood there before
    words = [
        "a",
        "man",
        "then",
        "he",
        "marlow",
        "sailed",
        "sailed",
        "away",
        "a",
        "man",
        "then",
        "he",
        "marlow",
        "sailed",
    ]
    grams = [tuple(words[i : i + 5]) for i in range(len(words) - 4)]
    assert found["summary_words"] == len(words) == 14 and len(grams) == 10
    assert found["copied"] == pytest.approx(100 * 4 / 10)
    assert found["repeated"] == pytest.approx(100 * 2 / 10)
    assert found["empty"] == 0


def test_an_empty_summary():
    found = reader().measure(" ... ")
    assert (found["empty"], found["summary_words"]) == (100, 0)
    assert all(math.isnan(found[key]) for key in ("copied", "repeated", "names_in_book"))


def test_summaries_are_named_by_their_content(tmp_path):
    lines = [{"book": "a", "text": "x\u00e9"}, {"book": "b", "text": ""}]
    saved = save_summaries(tmp_path, lines)
    assert saved == save_summaries(tmp_path, lines) and saved["lines"] == 2
    assert read_summaries(tmp_path, saved) == lines
    other = save_summaries(tmp_path, lines[:1])
    assert other["file"] != saved["file"]
    (tmp_path / saved["file"]).write_bytes((tmp_path / other["file"]).read_bytes())
    with pytest.raises(UserError, match="are not those of the record"):
        read_summaries(tmp_path, saved)
