"""Records -> tidy rows -> tables: seeds, variants, pairs, layouts and the files in results/."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest
from report_fakes import booksum, lm, passkey, record, row
from rich.console import Console

from infini_bench.errors import UserError
from infini_bench.report import paper
from infini_bench.report.compare import mean_interval, paired_delta
from infini_bench.report.layouts import sheets
from infini_bench.report.records import write_record
from infini_bench.report.tables import FORMATS, print_tables, to_csv, write_report
from infini_bench.report.tidy import COLUMNS, NAMES, rank, tidy

RESULTS = Path(__file__).resolve().parents[1] / "results"
DESIGN_COLUMNS = (
    "table,model,variant,protocol,condition,dataset,split,length,position,metric,value,ci_low,ci_high,n,seeds,"
    "params,train_tokens,state_floats,device,scale,commit,paper_value"
)


def pick(rows, metric, **match):
    found = [
        r for r in rows if r["metric"] == metric and all(r[key] == value for key, value in match.items())
    ]
    assert len(found) == 1, found
    return found[0]


def sheet_text(records, name):
    (sheet,) = sheets(tidy(records), records, [name])
    return [column.title for column in sheet.columns], sheet


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
    ppl = pick(tidy([lm(seed=seed, ppl=value) for seed, value in enumerate((18.0, 20.0, 22.0))]), "token_ppl")
    half = 4.303 * 2 / math.sqrt(3)
    assert ppl["value"] == 20.0 and ppl["seeds"] == 3 and len(ppl["records"]) == 3
    assert (ppl["ci_low"], ppl["ci_high"]) == pytest.approx((20 - half, 20 + half))


@pytest.mark.parametrize(("n", "t"), [(2, 12.706), (11, 2.228), (12, 2.201), (31, 2.042)])
def test_student_quantiles(n, t):
    values = [0.0] * (n - 1) + [1.0]
    middle, low, _ = mean_interval(values)
    assert (middle - low) / (np.std(values, ddof=1) / math.sqrt(n)) == pytest.approx(t, abs=3e-3)


def test_proportions_are_pooled_over_seeds():
    rows = tidy([passkey(seed=0, on=100.0), passkey(seed=1, on=90.0)])
    cell = pick(rows, "exact_match", length=512, position="start", condition="constant")
    assert (cell["value"], cell["n"], cell["seeds"]) == (95.0, 40, 2)
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


def test_lengths_measured_in_two_runs_share_a_line():
    rows = tidy([passkey(lengths=(512,)), passkey(lengths=(4096,))])
    assert {r["variant"] for r in rows} == {None}
    _, sheet = sheet_text([passkey(lengths=(512,)), passkey(lengths=(4096,))], "table3_passkey")
    assert len(sheet.rows) == 1


def test_settings_that_differ_become_the_variant():
    rows = tidy([lm(), lm(seed=1), lm(config={"trainer.lr": 0.01})])
    assert {(r["variant"], r["seeds"]) for r in rows} == {("trainer.lr=0.003", 2), ("trainer.lr=0.01", 1)}


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


# --- the paper ------------------------------------------------------------------------------------------


def test_the_papers_numbers_are_consistent_with_themselves():
    for scores in paper.TABLE4.values():
        geometric = (scores["rouge1"] * scores["rouge2"] * scores["rougeL"]) ** (1 / 3)
        assert geometric == pytest.approx(scores["overall"], abs=0.06)
    assert all(len(cells) == len(paper.TABLE3_LENGTHS) for cells in paper.TABLE3.values())
    assert max(paper.FIGURE4, key=lambda length: paper.FIGURE4[length]) == 128 * 1024


def test_paper_values_stand_beside_the_same_measurement_only():
    def value(table, **columns):
        return paper.value(
            table, {"model": "infini_linear", "condition": None, "protocol": "curriculum", **columns}
        )

    assert value("table2_lm", metric="token_ppl", dataset="pg19") == 9.65
    assert value("table2_lm", metric="token_ppl", dataset="embedded") is None
    assert value("table2_lm", metric="word_ppl", dataset="pg19") is None
    cell = {"metric": "token_accuracy", "length": 1024 * 1024, "condition": "constant"}
    assert value("table3_passkey", position="middle", **cell) == 94
    assert value("table3_passkey", position="middle", **cell | {"protocol": "zero_shot"}) == 6
    assert value("table3_passkey", position="end_outside", **cell) is None
    assert value("table3_passkey", position="start", **cell | {"condition": "memory_off"}) is None
    assert value("table4_booksum", metric="overall", condition="pairwise") == 18.0


# --- layouts --------------------------------------------------------------------------------------------


def test_table2_layout():
    titles, sheet = sheet_text([lm(), lm("local_block", nats=(120.0, 310.0))], "table2_lm")
    assert titles == [
        *("model", "seeds", "memory floats", "segment", "token ppl", "word ppl", "bits/byte", "memory off"),
        *("other memory", "Δ vs local_block", "params", "train tokens"),
        "paper (other data, tokenizer, scale): token ppl, PG19 / Arxiv-math",
    ]
    local, infini = sheet.rows
    assert infini[:6] == ["infini_linear", "1", "8,448", "32", "20.00\n[19.00, 21.00]", "400.0"]
    assert infini[9:] == ["-0.216\n[-0.289, -0.144]", "100,000", "2,000,000", "9.65 / 2.24"]
    assert local[9] == local[8] == "—"
    assert "not the architecture" in sheet.caption and "unigram model needs 8.50 bits" in sheet.caption


def test_table3_layout_has_on_and_off_beside_each_other():
    titles, sheet = sheet_text([passkey(on=95.0, off=10.0)], "table3_passkey")
    assert titles[4:6] == ["512*", "4K"]  # trained at 16 segments of 32 tokens
    assert sheet.rows[0][3:5] == ["512", "95/95/95\n[76-99/76-99/76-99]\noff 10/10/10"]
    assert sheet.rows[0][-1] == "100/100/100 … 96/94/100"
    assert "1-digit key" in sheet.caption and "start/middle/end_outside, 20 trials" in sheet.caption
    assert "architecture" not in sheet.caption


def test_table4_layout():
    titles, sheet = sheet_text([booksum()], "table4_booksum")
    line = dict(zip(titles, sheet.rows[0], strict=True))
    assert line["R-1"] == "30.0" and line["overall"] == "16.9" and line["overall, memory off"] == "12.0"
    assert line["summary tokens"] == "70"


@pytest.mark.parametrize("name", NAMES)
def test_smoke_says_so(name):
    config = {"scale": "smoke"}
    found = [lm(config=config), passkey(config=config), booksum()]
    found[2].config["scale"] = "smoke"
    _, sheet = sheet_text(found, name)
    assert sheet.caption.startswith("Trained for seconds")


def test_failed_runs_are_listed_until_they_are_done():
    failed = lm(
        "full", status="failed", error="Traceback\nUserError: the loss is no number", started="2026-01-02"
    )
    _, sheet = sheet_text([lm(), failed], "table2_lm")
    assert sheet.failures == [
        f"eval full, laptop, seed 0: failed (UserError: the loss is no number) [{failed.id}]"
    ]
    assert sheet_text([lm(), failed], "table4_booksum")[1].failures == []
    assert sheet_text([failed, lm("full", id="again")], "table2_lm")[1].failures == []


# --- files ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    failed = lm("full", status="failed", error="too | large & <odd> 100 %")
    for each in [lm(), lm("local_block", nats=(120.0, 310.0)), passkey(), booksum(), failed]:
        write_record(tmp_path / "records", each)
    return tmp_path


def test_report_writes_every_format(folder):
    paths = write_report(folder / "records", folder / "out", FORMATS)
    assert sorted(p.name for p in paths) == sorted(
        [*(f"{name}.{suffix}" for name in NAMES for suffix in ("csv", "md", "tex")), "report.html"]
    )
    markdown = (folder / "out" / "table2_lm.md").read_text()
    assert "| model | seeds |" in markdown and "| :-- | --: |" in markdown
    assert r"too \| large & <odd> 100 %" in markdown
    latex = (folder / "out" / "table2_lm.tex").read_text()
    assert r"\toprule" in latex and r"infini\_linear & 1" in latex and r"$\Delta$" in latex
    page = (folder / "out" / "report.html").read_text()
    assert lm().id in page and "&lt;odd&gt;" in page and "http" not in page


def test_csv_reads_back_as_numbers(folder):
    write_report(folder / "records", folder, ["csv"])
    rows = list(csv.DictReader(io.StringIO((folder / "table2_lm.csv").read_text())))
    ppl = pick(rows, "token_ppl", model="infini_linear")
    assert (float(ppl["value"]), ppl["train_tokens"], ppl["protocol"]) == (20.0, "2000000", "")


def test_unknown_format_is_told(folder):
    with pytest.raises(UserError, match="latx"):
        write_report(folder / "records", folder, ["latx"])


def test_the_terminal_shows_three_tables(capsys):
    print_tables([lm(), passkey(), booksum()])
    shown = capsys.readouterr().out
    assert [shown.count(f"Table {n}:") for n in (2, 3, 4)] == [1, 1, 1]
    assert "off 10/10/10" in shown and "paper" not in shown
    narrow = Console(width=60, file=io.StringIO())
    print_tables([lm()], narrow)
    assert "infini_linear" in narrow.file.getvalue()


def test_committed_tables_are_those_of_the_committed_records(tmp_path):
    write_report(RESULTS / "records", tmp_path)
    made, kept = ({p.name: p.read_bytes() for p in each.glob("*")} for each in (tmp_path, RESULTS / "tables"))
    assert made == kept, "run `infini-bench report` and commit results/tables"
