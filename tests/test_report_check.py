"""What the demo must show, on made-up records."""

from __future__ import annotations

import pytest
from report_fakes import lm, passkey

from infini_bench.report.check import demo_checks
from infini_bench.report.tidy import tidy

BOTH = ("infini_linear", "infini_delta")


def misses(*records, models=BOTH) -> list[str]:
    return [check.text for check in demo_checks(tidy(records), models) if not check.ok]


def good() -> list:
    return [run(model) for run in (lm, passkey) for model in BOTH]


def test_a_good_demo_passes():
    checks = demo_checks(tidy(good()), BOTH)
    # for 2 memories at 2 lengths: 2 far positions on, and off; then 2 language models
    assert len(checks) == 14
    assert all(check.ok for check in checks)


def test_forgetting_is_a_miss():
    missed = misses(*good()[:2], passkey("infini_linear", on=75.0), passkey("infini_delta"))
    assert len(missed) == 4
    assert missed[0] == "infini_linear, 512 tokens, start (8 segments back): 75 %, at least 80 %"


@pytest.mark.parametrize(("off", "missed"), [(0.0, 0), (5.0, 0), (20.0, 0), (25.0, 2), (100.0, 2)])
def test_memory_off_must_not_beat_chance_by_much(off, missed):
    assert len(misses(*good()[:3], passkey("infini_delta", off=off))) == missed


def test_near_needles_do_not_count():
    found = misses(*good()[:3], passkey("infini_delta", segments=3))
    assert found == ["infini_delta: no needle 4 segments back, on and off"]


def test_a_missing_result_is_a_miss():
    assert len(misses()) == 4


def test_a_loss_that_is_no_number_is_a_miss():
    broken = lm("local_block")
    for row in broken.metrics:
        row["value"] = None if row["metric"] == "bits_per_token" else row["value"]
    assert len(misses(broken, models=("local_block",))) == 1


def test_a_language_model_must_beat_the_unigram_model():
    weak = lm("local_block")
    for row in weak.metrics:
        row["value"] = 7.6 if row["metric"] == "bits_per_token" else row["value"]
    assert misses(weak, models=("local_block",)) == [
        "local_block: 0.90 bits a token better than a unigram model, at least 1"
    ]
