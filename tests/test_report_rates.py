"""Learning rates: the table of Table 2's sweep, and models compared each at its own best rate."""

from __future__ import annotations

import pytest
from report_fakes import lm, pick, sheet_text

from infini_bench.report import rates
from infini_bench.report.layouts import sheets
from infini_bench.report.tidy import tidy

VALIDATION = {"name": "lm", "split": "validation"}


def run(model, lr, nats=(100.0, 300.0), split="validation", **changes):
    config = {"task": {"name": "lm", "split": split}, "trainer.lr": lr, **changes.pop("config", {})}
    made = lm(model, nats=nats, config=config, **changes)
    for metric in made.metrics:
        metric["split"] = split
    return made


def deltas(records, split) -> dict[tuple, float]:
    found = [row for row in tidy(records) if row["metric"] == "delta_bits_per_byte" and row["split"] == split]
    return {(row["model"], row["config"]["trainer"]["lr"], row["condition"]): row["value"] for row in found}


def nats(bits):
    """Of two documents of 100 bytes, so many bits a byte more than 2.885."""
    return (100.0, 300.0 + bits * 200 * 0.6931471805599453)


SWEEP = [
    run("infini_linear", 1e-3, nats(0.2)),
    run("infini_linear", 2e-3, nats(0.1)),
    run("local_block", 1e-3, nats(0.3)),
    run("local_block", 2e-3, nats(0.4)),
]


def test_the_least_loss_of_each_model_is_chosen():
    lone = run("rmt", 4e-3, nats(0.0), device="GPU Y", config={"data.path": "/elsewhere"})
    titles, sheet = sheet_text([*SWEEP, lone], rates.LANGUAGE)
    assert titles[2:5] == ["0.001", "0.002", "0.004"] and "CPU model X, 2 cores and GPU Y" in sheet.title
    cells = {
        row[0]: [cell.split("\n")[0] + "*" * ("chosen" in cell) for cell in row[2:5]] for row in sheet.rows
    }
    assert cells == {
        "infini_linear": ["3.085", "2.985*", "—"],
        "local_block": ["3.185*", "3.285", "—"],
        "rmt": ["—", "—", "2.885"],
    }
    assert not [row for row in tidy([lone]) if row["table"] == rates.LANGUAGE], "one rate is no sweep"
    tests = [run(r.config["model"], r.config["trainer"]["lr"], split="test") for r in SWEEP]
    assert not [row for row in tidy(tests) if row["table"] == rates.LANGUAGE], (
        "nothing is chosen on the test split"
    )


def test_models_meet_at_their_own_best_rates():
    found = deltas(SWEEP, "validation")
    assert found["infini_linear", 2e-3, "local_block"] == pytest.approx(-0.2, abs=1e-9)
    assert found["infini_linear", 1e-3, "local_block"] == pytest.approx(-0.1, abs=1e-9), "at one rate"
    tests = [run("infini_linear", 2e-3, nats(0.1), "test"), run("local_block", 1e-3, nats(0.15), "test")]
    found = deltas([*SWEEP, *tests], "test")
    assert found == {("infini_linear", 2e-3, "local_block"): pytest.approx(-0.05, abs=1e-9)}
    assert deltas(tests, "test") == {}, "without a sweep other rates are other budgets"


def test_a_worse_rate_is_never_compared_with_the_others_best():
    tests = [run("infini_linear", 1e-3, nats(0.1), "test"), run("local_block", 2e-3, nats(0.3), "test")]
    assert deltas([*SWEEP, *tests], "test") == {}
    same = [run("infini_linear", 2e-3, nats(0.1), "test"), run("local_block", 2e-3, nats(0.3), "test")]
    assert deltas([*SWEEP, *same], "test")["infini_linear", 2e-3, "local_block"] == pytest.approx(-0.2)
    longer = [run("infini_linear", 2e-3, nats(0.1), "test"), run("local_block", 1e-3, nats(0.3), "test")]
    longer[1].config["trainer"]["steps"] = 20
    assert deltas([*SWEEP, *longer], "test") == {}, "all else of the budget is equal"


def test_what_was_tried_is_counted_and_every_reading_of_the_test_split():
    other = run(
        "infini_linear", 1e-3, config={"memory": {"kind": "compressive", "segment": 32, "features": "exp"}}
    )
    once = run("infini_linear", 2e-3, split="test", train={"config_hash": "a", "seed": 0})
    seed = run("infini_linear", 2e-3, split="test", seed=1, train={"config_hash": "b", "seed": 1})
    again = run("infini_linear", 2e-3, split="test", seed=2, train={"config_hash": "b", "seed": 1})
    for records, said in (
        ([*SWEEP, SWEEP[0], once], "2 configurations, of 1 different Infini memories. All weights"),
        ([*SWEEP, other, once, seed], "3 configurations, of 2 different Infini memories. All weights read"),
        ([once, seed, again], "0 configurations, of 0 different Infini memories. Weights that read the test"),
    ):
        (sheet,) = (s for s in sheets(tidy(records), records, ["table2_lm"]) if "test" in s.title)
        assert said in sheet.caption
    assert sheet.caption.endswith("more than once: infini_linear seed 1: 2.")
    (sheet,) = sheets(tidy(SWEEP), SWEEP, ["table2_lm"])
    assert "2 configurations" in sheet.caption and "weights" not in sheet.caption.split("Tried")[1]


def test_seeds_are_averaged_and_another_memory_is_another_line():
    again = run("infini_linear", 2e-3, nats(0.5), seed=1)
    other = run(
        "infini_linear", 4e-3, config={"memory": {"kind": "compressive", "segment": 32, "features": "exp"}}
    )
    rows = [row for row in tidy([*SWEEP, again, other]) if row["table"] == rates.LANGUAGE]
    line = [row for row in rows if row["variant"] == "memory.features=elu1"]
    assert pick(line, "bits_per_byte", condition="0.002")["value"] == pytest.approx(3.1854, abs=1e-3)
    assert pick(line, rates.CHOSEN)["value"] == 1e-3, "two seeds have a worse mean at the other"
    (alone,) = (row for row in rows if row["variant"] == "memory.features=exp")
    assert alone["condition"] == "0.004"
