"""Records -> tidy rows: seeds put together, settings kept apart, models compared in pairs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from report_fakes import lm, passkey, pick, record, row, sheet_text

from infini_bench.report.compare import paired_delta
from infini_bench.report.layouts import sheets
from infini_bench.report.records import config_hash
from infini_bench.report.seeds import mean_interval, over_seeds
from infini_bench.report.tables import to_csv
from infini_bench.report.tidy import COLUMNS, rank, tidy
from infini_bench.report.variants import variants_of

DESIGN_COLUMNS = (
    "table,model,variant,protocol,condition,dataset,split,length,position,metric,value,ci_low,ci_high,n,seeds,"
    "params,train_tokens,state_floats,device,scale,commit,paper_value"
)


# --- tidy rows ------------------------------------------------------------------------------------------


def test_columns_are_the_designs():
    assert ",".join(COLUMNS) == DESIGN_COLUMNS
    assert to_csv([]) == DESIGN_COLUMNS + "\n"


def test_one_seed_keeps_its_own_interval():
    ppl = pick(tidy([lm(ppl=20.0)]), "token_ppl")
    assert (ppl["value"], ppl["ci_low"], ppl["ci_high"], ppl["n"], ppl["seeds"]) == (20.0, 19.0, 21.0, 2, 1)
    assert (ppl["table"], ppl["params"], ppl["train_tokens"], ppl["commit"]) == (
        "table2_lm",
        100_000,
        2_000_000,
        "0123456789",
    )


def test_seeds_are_averaged_with_a_student_interval():
    rows = tidy(
        [lm(seed=seed, nats=(value * 100 * math.log(2),) * 2) for seed, value in enumerate((1.8, 2.0, 2.2))]
    )
    bits = pick(rows, "bits_per_byte")
    half = 4.303 * 0.2 / math.sqrt(3)
    assert bits["value"] == pytest.approx(2.0) and bits["seeds"] == 3 and len(bits["records"]) == 3
    assert (bits["ci_low"], bits["ci_high"]) == pytest.approx((2 - half, 2 + half))


def test_seeds_far_apart_have_a_geometric_mean_and_no_impossible_interval():
    ppl = pick(tidy([lm(seed=seed, ppl=value) for seed, value in enumerate((10.0, 40.0))]), "token_ppl")
    half = 12.706 * math.log(2)  # of logarithms, which are log 2 from their mean
    assert ppl["value"] == pytest.approx(20.0)
    assert (ppl["ci_low"], ppl["ci_high"]) == pytest.approx((20 * math.exp(-half), 20 * math.exp(half)))
    assert over_seeds("gradient_norm", [1e12, 1e14])[:2] == pytest.approx((1e13, 1e13 * 10**-12.706))
    assert over_seeds("gradient_norm", [0.0, 2.0])[:2] == (1.0, 0.0)
    assert over_seeds("loss", [1.0, 2.0]) == pytest.approx((1.5, 0.0, 1.5 + 12.706 / 2))
    assert over_seeds("gate", [0.8, 0.9])[1:] == pytest.approx((0.85 - 12.706 / 20, 1.0))
    assert over_seeds("local_layers", [0.0, 100.0]) == (50.0, 0.0, 100.0)


@pytest.mark.parametrize(("n", "t"), [(2, 12.706), (11, 2.228), (12, 2.201), (31, 2.042)])
def test_student_quantiles(n, t):
    values = [0.0] * (n - 1) + [1.0]
    middle, low, _ = mean_interval(values)
    assert (middle - low) / (np.std(values, ddof=1) / math.sqrt(n)) == pytest.approx(t, abs=3e-3)


def test_proportions_are_pooled_over_seeds():
    rows = tidy([passkey(seed=0, on=100.0), passkey(seed=1, on=90.0)])
    cell = pick(rows, "exact_match", length=512, position="start", condition="constant")
    assert (cell["value"], cell["n"], cell["seeds"]) == (95.0, 40, 2)
    # the seeds' variance, 0.005, is 2.1 times that of 20 independent trials: Wilson, 18.05 of 19
    assert (cell["ci_low"], cell["ci_high"]) == pytest.approx((75.72, 99.14), abs=0.01)
    rows = tidy([passkey(seed=0, on=95.0), passkey(seed=1, on=95.0)])
    cell = pick(rows, "exact_match", length=512, position="start", condition="constant")
    assert (cell["ci_low"], cell["ci_high"]) == pytest.approx((83.50, 98.62), abs=0.01)  # Wilson, 38 of 40


def test_seeds_are_those_of_the_training():
    rows = tidy(
        [lm(seed=0, train={"seed": seed, "tokens": 5}) for seed in (3,)]
        + [lm(seed=0, id="b", train={"seed": 4, "tokens": 5}, config_hash="b")]
    )
    assert pick(rows, "token_ppl")["seeds"] == 2


def test_a_newer_measurement_of_the_same_run_replaces_the_older():
    old, new = lm(ppl=30.0, id="a", started="2026-01-01"), lm(ppl=20.0, id="b", started="2026-01-02")
    assert pick(tidy([new, old]), "token_ppl")["value"] == 20.0


def test_a_newer_measurement_of_fewer_trials_does_not():
    many = passkey(id="a", started="2026-01-01")
    few = passkey(id="b", started="2026-01-02", config={"task.trials": 2})
    for metric in few.metrics:
        metric["n"] = 2
    shown = [row for row in tidy([many, few]) if row["metric"] == "exact_match"]
    assert {row["n"] for row in shown} == {20} and {*shown[0]["records"]} == {"a"}


def test_lengths_measured_in_two_runs_share_a_line():
    rows = tidy([passkey(lengths=(512,)), passkey(lengths=(4096,))])
    assert {r["variant"] for r in rows} == {None}
    _, sheet = sheet_text([passkey(lengths=(512,)), passkey(lengths=(4096,))], "table3_passkey")
    assert len(sheet.rows) == 1


def test_settings_that_differ_become_the_variant():
    rows = tidy([lm(), lm(seed=1), lm(config={"trainer.lr": 0.01})])
    assert {(r["variant"], r["seeds"]) for r in rows} == {("trainer.lr=0.003", 2), ("trainer.lr=0.01", 1)}


def asked(model="infini_delta_token", on=100.0, floor=None, trained=0.05, **changes):
    """Keys asked of one training, with another floor of writing than its own if ``floor`` is set."""
    gate = {"memory.write_gate": True, "memory.write_floor": trained}
    found = passkey(model, on=on, config={**gate, **changes.pop("config", {})}, **changes)
    if floor is not None:
        found.config["task"]["memory"] = {"write_floor": floor}
    found.config_hash = config_hash(found.config)
    found.id, found.train = f"{found.id}-{found.config_hash}", {"id": f"train-{model}", "tokens": 5}
    return found


def test_what_an_evaluation_changes_in_the_memory_is_a_row_of_its_own():
    """The other one of the same training has the value that it was trained with; neither replaces it."""

    def shown(*runs):
        rows = [row for row in tidy(runs) if (row["metric"], row["length"]) == ("exact_match", 512)]
        cells = {
            (row["model"], row["variant"], row["value"]) for row in rows if row["condition"] == "constant"
        }
        return {(model, (variant or "").partition(" task.")[2], value) for model, variant, value in cells}

    with_, without = asked(), asked(on=20.0, floor=0.0, started="2026-01-02")
    named = {
        ("infini_delta_token", "memory.write_floor=0.05", 100.0),
        ("infini_delta_token", "memory.write_floor=0.0", 20.0),
    }
    assert shown(with_, without) == shown(without, with_) == named
    assert shown(with_, without, rival := asked("infini_delta", on=50.0)) == {
        *named,
        ("infini_delta", "", 50.0),
    }
    assert shown(without, rival) == {("infini_delta_token", "", 20.0), ("infini_delta", "", 50.0)}
    again = asked(on=40.0, floor=0.0, started="2026-01-03")
    assert {value for _, _, value in shown(with_, without, again)} == {100.0, 40.0}
    same = asked(on=60.0, floor=0.05, started="2026-01-03")  # said again as it was trained
    assert {value for _, _, value in shown(with_, without, same)} == {60.0, 20.0}
    backend = asked(started="2026-01-03")
    backend.config["task"]["memory"] = {"backend": "eager"}
    assert shown(with_, backend) == {("infini_delta_token", "", 100.0)}


def test_trainings_know_nothing_of_what_an_evaluation_changes():
    task = {"name": "lm", "memory": {"write_floor": 0.5}}
    runs = [record(kind="train"), record(kind="train", config={"task": task})]
    assert len({variant for variant in variants_of([(run, "diag_gates") for run in runs]).values()}) == 1


@pytest.mark.parametrize(
    "change", [{"device": "CPU Y"}, {"config": {"scale": "gpu"}}, {"config": {"data.name": "books"}}]
)
def test_scale_device_and_corpus_never_mix(change):
    other = lm(seed=1, **change)
    for metric in other.metrics:
        metric["dataset"] = other.config["data"]["name"]
    rows = tidy([lm(), other])
    assert all(r["seeds"] == 1 for r in rows)
    assert len(sheets(rows, [], ["table2_lm"])) == 2


def test_other_tests_and_protocols_never_mix():
    changed = lm(seed=1, data_fingerprint="ffff")
    assert {r["variant"] for r in tidy([lm(), changed])} == {"data_fingerprint=null", "data_fingerprint=ffff"}


def test_no_path_and_nothing_that_follows_from_a_setting_names_a_row():
    numbers = itertools.count()

    def run(steps, folder, **changes):
        places = {"data.path": f"{folder}/books", "data.tokenizer": f"{folder}/smol.gguf"}
        config = {**places, "base": {"model": f"{folder}/smol.gguf"}, "trainer.steps": steps}
        found = passkey(config=config, data_fingerprint="f0", **changes)
        found.config_hash = found.id = f"run{next(numbers)}"
        found.config["task"] = {**found.config["task"], "protocol": "curriculum"}
        found.train = {"id": f"{folder}/x", "steps": steps, "path": f"{folder}/books", "tokens": 5}
        return found

    variants = {r["variant"] for r in tidy([run(10, "/here"), run(10, "/there", seed=1)])}
    assert variants == {None}
    variants = {r["variant"] for r in tidy([run(10, "/here"), run(20, "/there", tokenizer_fingerprint="t")])}
    assert variants == {"trainer.steps=10", "trainer.steps=20"}  # not also trained.steps and the tokenizer's
    paper = run(10, "/here")
    paper.config["task"]["protocol"] = "paper, scaled down"
    for metric in paper.metrics:
        metric["protocol"] = "paper, scaled down"
    assert {(r["variant"], r["protocol"]) for r in tidy([run(10, "/here"), paper])} == {
        (None, "curriculum"),
        (None, "paper, scaled down"),
    }
    early = run(10, "/here")
    early.train["steps"] = 5
    assert {r["variant"] for r in tidy([run(10, "/here"), early])} == {"trained.steps=10", "trained.steps=5"}
    other = run(10, "/here")
    other.train["path"] = "/here/plays"
    names = {"trained.corpus=books", "trained.corpus=plays"}
    assert {r["variant"] for r in tidy([run(10, "/here"), other])} == names


def test_a_number_that_is_none_stays_none():
    broken = record(metrics=[row("token_ppl", None, {"not_finite": "inf"}, split="test", n=1)])
    assert pick(tidy([broken, lm(seed=1)]), "token_ppl")["value"] is None


def test_positions_go_to_their_own_table():
    rows = [r for r in tidy([lm()]) if r["table"] == "lm_position"]
    assert [(r["position"], r["condition"]) for r in rows] == [
        ("1", None),
        ("1024", None),
        ("1024", "memory_off"),
    ]
    assert sorted(["900", "end", "start", "2", "x"], key=lambda name: rank(("start", "end"), name)) == [
        "start",
        "end",
        "2",
        "900",
        "x",
    ]


# --- pairs ----------------------------------------------------------------------------------------------


def test_delta_is_that_of_the_same_documents():
    rows = tidy([lm(nats=(100.0, 300.0)), lm("local_block", nats=(120.0, 310.0))])
    delta = pick(rows, "delta_bits_per_byte")
    assert (delta["model"], delta["condition"], delta["n"], delta["seeds"]) == (
        "infini_linear",
        "local_block",
        2,
        1,
    )
    assert delta["value"] == pytest.approx(-30 / 200 / math.log(2))
    assert delta["ci_low"] == pytest.approx(-20 / 100 / math.log(2))
    assert delta["ci_high"] == pytest.approx(-10 / 100 / math.log(2))
    assert len(delta["records"]) == 2


def test_delta_takes_seeds_that_both_have():
    infini = [lm(seed=0, nats=(100.0, 300.0)), lm(seed=1, nats=(90.0, 300.0)), lm(seed=2, nats=(1.0, 2.0))]
    local = [lm("local_block", seed=0, nats=(110.0, 300.0)), lm("local_block", seed=1, nats=(110.0, 300.0))]
    delta = pick(tidy(infini + local), "delta_bits_per_byte")
    assert delta["seeds"] == 2
    assert delta["value"] == pytest.approx(-(10 + 20) / 2 / 200 / math.log(2))


@pytest.mark.parametrize(
    "other",
    [
        lm("local_block", nats=(1.0, 2.0, 3.0)),  # other documents
        lm("local_block", train={"tokens": 1}),  # another budget
        lm("local_block", device="CPU Y"),
        lm("local_block", seed=1),
        lm("full"),
    ],
)
def test_no_delta_without_a_fair_partner(other):
    assert not [r for r in tidy([lm(), other]) if r["metric"] == "delta_bits_per_byte"]


def test_bootstrap_covers_the_truth():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        right = rng.normal(100, 30, 40)
        left = right - rng.normal(5, 10, 40)
        sizes = [100] * 40
        _, low, high = paired_delta([({"nats": left, "bytes": sizes}, {"nats": right, "bytes": sizes})], 300)
        hits += low <= -5 / 100 / math.log(2) <= high
    assert 180 <= hits <= 199


def test_one_document_of_one_seed_has_no_interval():
    one = {"nats": [10.0], "bytes": [10]}
    assert paired_delta([(one, {"nats": [20.0], "bytes": [10]})]) == (
        pytest.approx(-1 / math.log(2)),
        None,
        None,
    )


def test_only_for_a_clock_is_a_compiled_run_another_one():
    def ran(task, seed, compiled):
        metric = row("forward_ms" if task == "efficiency" else "token_ppl", 5.0, {"variant": "b1"})
        config = {"task": {"name": task}, "trainer.compile": compiled}
        return record(seed=seed, config=config, metrics=[metric])

    def variants(task):
        return {found["variant"] for found in tidy([ran(task, 0, False), ran(task, 1, True)])}

    assert variants("lm") == {"b1"}
    assert variants("efficiency") == {"b1 trainer.compile=false", "b1 trainer.compile=true"}
