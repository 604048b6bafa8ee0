"""Trainings repeated with the same settings and seed: further runs of that seed, none hides another."""

from __future__ import annotations

from dataclasses import replace

import pytest
from report_fakes import lm, pick, recall, sheet_text, training

from infini_bench.metrics.intervals import wilson
from infini_bench.report.records import current
from infini_bench.report.tidy import tidy

# variance of 0.70, 0.86 and 0.87 over that of 100 trials at 0.81 each
SPREAD = 0.0091 / (0.81 * 0.19 / 100)


def run(name: str, made, digest: str = "same", **changes):
    """An evaluation of the training called so."""
    train = {**made.train, "id": name, "config_hash": digest, "steps": 10}
    return replace(made, id=f"eval of {name} {made.id}", train=train, **changes)


def text(name: str, value: float, **changes):
    return run(name, recall(values={1024: value}), **changes)


def test_repeated_trainings_are_pooled_and_counted_beside_their_seed():
    runs = [text("a", 80.0), text("b", 96.0), text("c", 97.0)]
    cell = pick(tidy(runs), "exact_match", condition="text")
    assert (cell["value"], cell["n"], cell["seeds"]) == (81.0, 300, 1)
    alike = wilson(243 / SPREAD, 300 / SPREAD)
    assert (cell["ci_low"], cell["ci_high"]) == pytest.approx([100 * end for end in alike])
    titles, sheet = sheet_text(runs, "diag_recall")
    assert {line[titles.index("seeds")] for line in sheet.rows} == {"1 (3 runs)"}
    more = [*runs, run("d", recall(seed=1), "other")]
    assert {line[1] for line in sheet_text(more, "diag_recall")[1].rows} == {"2 (4 runs)"}


def test_an_evaluation_repeated_on_the_same_training_is_replaced():
    runs = [text("a", 80.0), text("a", 60.0, started="2026-01-02")]
    cell = pick(tidy(runs), "exact_match", condition="constant")
    assert (cell["value"], cell["n"]) == (60.0, 100)
    assert [r.started[:10] for r in current(runs)] == ["2026-01-02"]


def test_settings_that_came_later_do_not_make_a_repetition_another_seed():
    runs = [text("a", 80.0, digest="before"), text("b", 60.0, config_hash="after", digest="after")]
    assert pick(tidy(runs), "exact_match", condition="constant")["value"] == 70.0


def test_finished_trainings_are_all_current_and_failed_ones_until_one_is_done():
    runs = [training(id=name, started=f"2026-01-0{day}") for day, name in ((1, "a"), (3, "c"))]
    failed = training(norms=None, id="b", started="2026-01-02")
    assert [r.id for r in current([*runs, failed])] == ["a", "c"]
    again = replace(failed, id="d", started="2026-01-04")
    assert [r.id for r in current([failed, again])] == ["d"]


def test_a_repetition_is_in_the_plans_of_the_others():
    runs = [text("a", 80.0, plans=["diag_recall"]), text("b", 60.0, plans=["diag_gates"])]
    for table in ("diag_recall", "diag_gates"):
        cell = pick(tidy(runs), "exact_match", condition="constant", table=table)
        assert (cell["value"], cell["n"]) == (70.0, 200)
    alone = [runs[0], text("b", 60.0, plans=["diag_gates"], digest="other", config_hash="other")]
    assert pick(tidy(alone), "exact_match", condition="constant", table="diag_gates")["n"] == 100


def test_a_view_prints_the_distances_that_all_lines_have():
    gates = {"plans": ["diag_gates"]}
    runs = [
        recall(values={1: 90.0, 64: 80.0}, **gates),
        recall(values={1: 90.0, 8: 70.0, 64: 80.0}, config={"memory.gate_frozen": 0.5}, **gates),
    ]
    titles, _ = sheet_text(runs, "diag_gates")
    assert [title for title in titles if title.startswith("constant")] == ["constant 1", "constant 64"]


def test_repeated_runs_are_paired_in_their_order():
    own = [run(name, lm(nats=nats), "own") for name, nats in (("a", (110.0, 310.0)), ("b", (90.0, 290.0)))]
    floor = [
        run(name, lm("local_block", nats=(100.0, 300.0)), "floor", task_version="1") for name in ("c", "d")
    ]
    delta = pick(tidy([*own, *floor]), "delta_bits_per_byte")
    assert delta["value"] == pytest.approx(0.0) and (delta["seeds"], len(delta["parts"])) == (1, 2)
    assert delta["ci_low"] == pytest.approx(-0.1443, abs=1e-4)
    delta = pick(tidy([*own, floor[0]]), "delta_bits_per_byte")
    assert delta["value"] == pytest.approx(0.1443, abs=1e-4), "the first alone has a partner"
