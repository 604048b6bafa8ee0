"""Lengths and depths as people type them."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infini_bench.errors import UserError
from infini_bench.units import K, M, counted, format_length, parse_depth, parse_length, suggest


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("512", 512),
        ("4K", 4096),
        ("4k", 4096),
        ("1M", 1048576),
        ("1.5K", 1536),
        ("0.5M", 512 * K),
        (" 7 ", 7),
        (7, 7),
    ],
)
def test_lengths(text, tokens):
    assert parse_length(text) == tokens


@pytest.mark.parametrize(
    "text", ["1Mb", "0", "0K", "-4K", "", "K", "1e3", "4 K", "1.3", "0.0001K", "nan", "٤", 0, -1]
)
def test_no_lengths(text):
    with pytest.raises(UserError, match="length"):
        parse_length(text)


@settings(deadline=None)
@given(st.integers(1, 10**12))
def test_every_length_survives_the_round_trip(tokens):
    assert parse_length(format_length(tokens)) == tokens


@settings(deadline=None)
@given(st.integers(1, 4096), st.sampled_from([("K", K), ("M", M)]))
def test_suffixes_multiply(number, suffix):
    assert parse_length(f"{number}{suffix[0]}") == number * suffix[1]


@settings(deadline=None)
@given(st.text(max_size=12))
def test_any_text_is_a_length_or_a_user_error(text):
    try:
        assert parse_length(text) >= 1
    except UserError as error:
        assert "\n" not in str(error).replace(text, "")


def test_length_formats():
    assert [format_length(n) for n in (1000, 1024, 4096, 1536, M, 3 * M, 0)] == [
        "1000",
        "1K",
        "4K",
        "1536",
        "1M",
        "3M",
        "0",
    ]


@pytest.mark.parametrize(
    ("text", "depth"),
    [
        ("start", "start"),
        ("end_outside", "end_outside"),
        ("50%", "50"),
        ("050", "50"),
        ("12.50", "12.5"),
        (0, "0"),
        ("100.0", "100"),
    ],
)
def test_depths(text, depth):
    assert parse_depth(text) == depth


@pytest.mark.parametrize("text", ["101", "100.1", "-1", "midle", "", "50%%", "1e1", "nan"])
def test_no_depths(text):
    with pytest.raises(UserError, match="depth"):
        parse_depth(text)


@settings(deadline=None)
@given(st.floats(0, 100).map(lambda x: round(x, 3)))
def test_depths_are_canonical(percent):
    once = parse_depth(f"{percent:.3f}%")
    assert float(once) == percent
    assert parse_depth(once) == once


@settings(deadline=None)
@given(st.text(max_size=12))
def test_any_text_is_a_depth_or_a_user_error(text):
    with suppress(UserError):
        assert parse_depth(parse_depth(text)) == parse_depth(text)


def test_one_is_not_many():
    assert [counted(number, "job") for number in (0, 1, 2)] == ["0 jobs", "1 job", "2 jobs"]


def test_suggestions():
    assert suggest("midle", ["start", "middle"]) == ' (did you mean "middle"?)'
    assert suggest("xyz", ["start", "middle"]) == ""
