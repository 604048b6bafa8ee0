"""Tables: the paper's numbers beside ours, the layouts, and the files in results/."""

from __future__ import annotations

import csv
import io
import re
import subprocess
from pathlib import Path

import pytest
from report_fakes import booksum, booksum_lengths, lead, lm, passkey, pick, sheet_text, taught
from rich.console import Console

from infini_bench.errors import UserError
from infini_bench.report import paper
from infini_bench.report.cells import settings
from infini_bench.report.figures import svg
from infini_bench.report.layouts import sheets
from infini_bench.report.record_files import record_files
from infini_bench.report.records import write_record
from infini_bench.report.tables import FORMATS, print_tables, write_report
from infini_bench.report.tidy import NAMES, tidy

RESULTS = Path(__file__).resolve().parents[1] / "results"
KINDS = ("tables/*", "figures/*")


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
        *("model", "seeds", "memory floats", "times smaller than memorizing", "segment", "gradient span"),
        *("read", "token ppl", "word ppl", "bits/byte", "memory off", "other memory", "Δ vs local_block"),
        *("tokens/s", "GPU seconds", "ffn", "params", "train tokens"),
        "paper (other data, tokenizer, scale): token ppl, PG19 / Arxiv-math",
    ]
    infini, local = (dict(zip(titles, row, strict=True)) for row in sheet.rows)
    assert infini["model"] == "infini_linear" and infini["token ppl"] == "20.00\n[19.00, 21.00]"
    assert infini["Δ vs local_block"] == "-0.216\n[-0.289, -0.144]"
    assert sheet.rows[0][-3:] == ["100,000", "2,000,000", "9.65 / 2.24"] and infini["ffn"] == "256"
    assert local["Δ vs local_block"] == local["other memory"] == local["GPU seconds"] == "—"
    assert "not the architecture" in sheet.caption and "unigram model needs 8.50 bits" in sheet.caption


@pytest.mark.parametrize(
    ("memory", "task", "span"),
    [
        ({"kind": "xl"}, {}, "512"),
        ({"kind": "compressive"}, {}, "16,384"),
        ({"kind": "compressive", "gradient_depth": 4}, {}, "2,048"),
        ({"kind": "rmt", "gradient_depth": 99}, {}, "16,384"),
        ({"kind": "sliding"}, {}, "1,024"),
        ({"kind": "full", "gradient_depth": 2}, {"memory": {"kind": "sliding"}}, "16,384"),
    ],
)
def test_gradient_span_is_printed(memory, task, span):
    config = {
        "memory": {"segment": 512, **memory},
        "task": {"name": "lm", "sequence": 16384, **task},
    }
    titles, sheet = sheet_text([lm(config=config)], "table2_lm")
    assert sheet.rows[0][titles.index("gradient span")] == span


def test_sizes_times_and_the_state_to_save():
    machine = {"device": "GPU X", "train": {"tokens": 5, "seconds": 60.0}}
    runs = [
        lm("memorizing", state_floats=73_400_320, **machine),
        lm(state_floats=399_360, **machine),
        lm("local_block", state_floats=0, **machine),
    ]
    titles, sheet = sheet_text(runs, "table2_lm")
    rows = {row[0]: dict(zip(titles, row, strict=True)) for row in sheet.rows}
    assert [*rows] == ["memorizing", "infini_linear", "local_block"]
    ratios = [row["times smaller than memorizing"] for row in rows.values()]
    assert ratios == ["1.0", "183.8", "—"]
    assert rows["infini_linear"]["GPU seconds"] == "62"  # 60 of training, 2 of reading
    assert rows["infini_linear"]["Δ vs memorizing"].startswith("+0.000")


def test_table3_layout_has_on_and_off_beside_each_other():
    titles, sheet = sheet_text([passkey(on=95.0, off=10.0)], "table3_passkey")
    assert titles[4:6] == ["512*", "4K"]  # trained at 16 segments of 32 tokens
    assert sheet.rows[0][3:5] == ["512", "95/95/95\n[76-99/76-99/76-99]\noff 10/10/10"]
    assert sheet.rows[0][-1].startswith("32K: 100/100/100;\n") and sheet.rows[0][-1].endswith("1M: 96/94/100")
    assert "1-digit key" in sheet.caption and "start/middle/end_outside, 20 trials" in sheet.caption
    assert "architecture" not in sheet.caption


def test_a_star_means_that_every_training_came_so_far():
    def shown(*runs):
        titles, sheet = sheet_text([*runs], "table3_passkey")
        return titles[4], [row[titles.index("trained at")] for row in sheet.rows]

    def run(model="infini_linear"):
        return passkey(model, config={"trainer.curriculum": [1, 4, 16]})  # segments of 32 tokens

    assert shown(*taught(run(), 1, 4, 16)) == ("512*", ["512"])
    assert shown(*taught(run(), 1, 4, 4)) == ("512", ["128"])
    assert shown(run()) == ("512", ["at most 512"])
    assert shown(*taught(run(), 1, 4, 16), *taught(run("rmt"), 1, 1)) == ("512", ["32", "512"])


def test_table4_layout():
    titles, sheet = sheet_text([booksum()], "table4_booksum")
    line = dict(zip(titles, sheet.rows[0], strict=True))
    assert line["R-1"] == "30.0" and line["overall"] == "16.9" and line["overall, memory off"] == "12.0"
    assert (line["summary tokens"], line["summary words"]) == ("70", "55")
    assert not {"input", "references"} & {*titles}


def test_table4_has_a_line_for_each_input_and_kind_of_reference_and_for_what_has_no_weights():
    titles, sheet = sheet_text([booksum_lengths(), lead()], "table4_booksum")
    lines = [dict(zip(titles, row, strict=True)) for row in sheet.rows]
    shown = [(line["model"], line["input"], line["references"], line["overall"]) for line in lines[:5]]
    assert shown == [
        ("infini_linear", "16K\n(8 cut)", "all", "15.0\n[1.0, 30.0]"),
        ("infini_linear", "16K\n(8 cut)", "wikipedia", "15.0\n[1.0, 30.0]"),
        ("infini_linear", "32K\n(5 cut)", "all", "17.0\n[1.0, 30.0]"),
        ("infini_linear", "32K\n(5 cut)", "wikipedia", "17.0\n[1.0, 30.0]"),
        ("lead", "whole", "all", "12.0"),
    ]
    assert "scale laptop, CPU model X" in sheet.title and len(sheet.records) == 2
    printed = {line["model"].removesuffix("\n(not run)"): line[titles[-1]] for line in lines[5:]}
    assert printed["primera_unlimiformer"] == "37.9 / 8.2 / 16.3 / 17.2" and "infini_delta" in printed
    assert all(line["overall"] == "—" for line in lines[5:]) and "infini_linear" not in printed
    assert "were not run here" in sheet.caption


def test_summaries_are_compared_in_pairs_of_books():
    records = [booksum_lengths(), booksum_lengths("local_block"), lead(), booksum_lengths("infini_delta")]
    records[3].metrics[0]["extra"]["scores"] = [[20.0 + i, 20.0 + i, 20.0 + i, 0.0] for i in range(8)]
    rows = [row for row in tidy(records) if row["metric"] == "delta_overall"]

    def delta(model, name, length, kind=None):
        place = {"model": model, "condition": name, "length": length, "position": kind}
        row = pick(rows, "delta_overall", **place)
        return row["value"], row["ci_low"], row["n"]

    assert delta("infini_linear", "lead", 16384) == pytest.approx((3, 3, 8))
    assert delta("infini_linear", "lead", 32768) == pytest.approx((5, 5, 8))
    assert delta("infini_linear", "memory_off", 32768, "wikipedia") == pytest.approx((3, 3, 4))
    assert delta("infini_linear", "local_block", 16384) == pytest.approx((0, 0, 8))
    value, low, _ = delta("infini_delta", "local_block", 16384)
    assert value == pytest.approx(8.5) and 6 < low < 8.4
    assert not [row for row in rows if row["position"] == "wikipedia" and row["condition"] == "lead"]
    reduced = booksum_lengths(config={"task.baseline": "map_reduce"})
    for each in reduced.metrics:
        each["protocol"] = "map_reduce 4096 to 256, sampled"
    rows = tidy([booksum_lengths(), reduced])
    row = pick(rows, "delta_overall", condition="map_reduce", length=16384, position=None)
    assert (row["value"], row["protocol"], row["variant"]) == (0, "sampled", None)
    rows = [row for row in tidy(records) if row["metric"] == "delta_overall"]
    assert {row["model"] for row in rows if row["condition"] == "local_block"} == {
        "infini_linear",
        "infini_delta",
    }
    assert (
        len(pick(rows, "delta_overall", model="local_block", condition="lead", length=16384)["records"]) == 2
    )


def test_adapted_models_are_compared_with_the_same_model_without_a_memory():
    def run(model, overall, lr=1e-4, kind="wikipedia", base="SmolLM2.gguf", **changes):
        length = changes.pop("length", 16384)
        config = {"base": {"model": base}, "trainer.lr": lr}
        made = booksum_lengths(
            model, config=config, train={"id": "t", "steps": 400, "train_kind": kind}, **changes
        )
        for each in made.metrics:
            each["length"] = {16384: length}.get(each["length"])
            if each["metric"] == "overall" and each["condition"] == "pairwise":
                each["value"] = overall
                books = len(each["extra"]["books"])
                each["extra"]["scores"] = [[overall + i, overall + i, overall + i, 0.0] for i in range(books)]
        made.metrics = [each for each in made.metrics if each["length"] is not None]
        return made

    own = run("infini_delta", 15.0)
    controls = [
        run("smollm2_1k", 9.0, length=1024, device="GPU"),
        run("smollm2_1k", 11.0, lr=3e-4, length=1024),
        run("smollm2_4k", 18.0, length=4096),
        run("smollm2_full", 1.0, kind=None),  # trained on other pairs
        run("smollm2_4k_sliding", 1.0, base="another"),
    ]
    rows = [row for row in tidy([own, *controls]) if row["metric"] == "delta_overall"]
    found = {
        (row["model"], row["condition"], row["position"]): (row["value"], row["ci_low"], row["n"])
        for row in rows
        if row["condition"].startswith("smollm2")
    }
    assert {key[:2] for key in found} == {("infini_delta", "smollm2_1k"), ("infini_delta", "smollm2_4k")}
    full = next(row for row in tidy([own, *controls]) if row["model"] == "smollm2_full")
    assert "trained.train_kind=null" in full["variant"]
    assert found["infini_delta", "smollm2_1k", None] == pytest.approx((4, 4, 8))  # the better of two rates
    assert found["infini_delta", "smollm2_4k", "wikipedia"] == pytest.approx((-3, -3, 4))
    titles, sheet = sheet_text([own, *controls[1:3]], "table4_booksum")
    line = next(
        dict(zip(titles, row, strict=True)) for row in sheet.rows if row[0].startswith("infini_delta")
    )
    assert line["Δ vs smollm2_1k"] == "+4.00\n[+4.00, +4.00]" and line["Δ vs smollm2_4k"].startswith("-3.00")
    assert "less the same pretrained model without a memory" in sheet.caption
    assert "smollm2" not in sheet_text([own], "table4_booksum")[1].caption


def test_books_that_the_pretrained_model_knows_have_rows_of_their_own():
    base = {"model": "folder/SmolLM2.gguf"}
    own = booksum_lengths(config={"base": base})
    own.metrics[0]["extra"]["scores"] = [[10.0 + i, 10.0 + i, 10.0 + i, 0.0] for i in range(8)]

    def opening(nats=(5.0, 1.0, 6.0, 2.0, 7.0, 3.0, 8.0, 4.0), kind="block", train=None):
        task = {"name": "lm", "split": "test", "max_tokens": 2048}
        config = {"data.name": "booksum_local", "base": base, "task": task}
        config["memory"] = {"kind": kind, "segment": 2048}
        made = lm("local_block", nats=nats, config=config, train=train or {})
        for each in made.metrics:
            if "documents" in each["extra"]:
                each["extra"]["documents"] = [f"b{i}" for i in range(len(nats))]
        return made

    def found(*records):
        rows = [r for r in tidy(records) if r["table"] == "table4_booksum" and r["metric"] == "overall"]
        rows = [r for r in rows if any(half in r["condition"] for half in ("known", "obscure"))]
        return {(r["model"], r["condition"], r["length"], r["position"]): r for r in rows}

    rows = found(own, lead(), opening())
    known, obscure = (rows["infini_linear", half, 16384, None] for half in ("known", "obscure"))
    assert (known["value"], known["n"]) == (pytest.approx(14), 4)  # books 1, 3, 5, 7
    assert (obscure["value"], obscure["n"]) == (pytest.approx(13), 4)
    assert 11 < known["ci_low"] < 14 < known["ci_high"] < 17 and opening().id in known["records"]
    assert rows["infini_linear", "memory_off, known", 32768, None]["value"] == pytest.approx(14)
    assert rows["infini_linear", "obscure", 16384, "wikipedia"]["n"] == 2  # a book's half is the split's
    assert rows["lead", "known", None, None]["value"] == pytest.approx(12)
    assert not found(booksum_lengths(), opening())  # from scratch: it never saw any of them
    titles, sheet = sheet_text([own, opening()], "table4_booksum")
    assert dict(zip(titles, sheet.rows[0], strict=True))["overall, known books"].startswith("14.0\n[")
    assert "a proxy" in sheet.caption
    # a trained model, one with a memory, or fewer books say nothing
    assert not found(own, lead(), opening(train={"id": "x"})) and not found(own, opening(kind="compressive"))
    assert not found(own, opening(nats=(1.0, 2.0)))


def test_what_has_no_weights_has_a_sheet_of_its_own_only_where_no_model_is():
    (sheet,) = sheets(tidy([lead()]), [lead()], ["table4_booksum"])
    assert sheet.rows[0][0] == "lead" and "scale smoke, CPU model Y" in sheet.title
    records = [booksum_lengths(), booksum_lengths("infini_delta", device="GPU"), lead(), lead("embedded")]
    made = sheets(tidy(records), records, ["table4_booksum"])
    printed = {*paper.TABLE4, *(f"{name}\n(not run)" for name in paper.TABLE4)}
    models = [{row[0] for row in sheet.rows} - printed for sheet in made]
    assert models == [{"lead"}, {"lead"}, {"lead"}]
    assert tidy([booksum_lengths(), lead()])[-1]["variant"] is None  # no setting of a model names it


def test_figure_4_is_drawn_where_there_are_lengths():
    drawn = svg("table4_booksum", tidy([booksum_lengths(), lead()]))
    assert drawn is not None and drawn.startswith("<?xml")
    for words in ("32K", "n=8", "lead", "paper: 8B model", "references: wikipedia"):
        assert words in drawn
    assert drawn == svg("table4_booksum", tidy([booksum_lengths(), lead()]))
    assert svg("table4_booksum", tidy([booksum(), lead()])) is None


def test_table4_has_the_papers_baselines_whether_they_were_run_or_not():
    own, ran = booksum(), booksum("bart")
    for record in (own, ran):
        for row in record.metrics:
            row["dataset"] = "booksum_local"
    titles, sheet = sheet_text([own, ran], "table4_booksum")
    lines = {row[0]: dict(zip(titles, row, strict=True)) for row in sheet.rows}
    rest = [f"{name}\n(not run)" for name in ("bart_unlimiformer", "primera", "primera_unlimiformer")]
    assert set(rest) < set(lines) and "bart\n(not run)" not in lines
    assert lines["bart"]["overall"] == "16.9" and lines["bart"][titles[-1]] == "36.4 / 7.6 / 15.3 / 16.2"
    primera = lines["primera\n(not run)"]
    assert primera["overall"] == "—" and primera[titles[-1]] == "38.6 / 7.2 / 15.6 / 16.3"
    assert "not run here" in sheet.caption and len(sheet_text([booksum()], "table4_booksum")[1].rows) == 1


@pytest.mark.parametrize("name", ["table2_lm", "lm_position", "table3_passkey", "table4_booksum"])
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
    assert sorted(path.name for path in (folder / "figures").iterdir()) == [
        "lm_position.svg",
        "table3_passkey.svg",
    ]
    assert sorted(p.name for p in paths) == sorted(
        [
            *(f"{name}.{suffix}" for name in NAMES for suffix in ("csv", "md", "tex")),
            *(f"claims.{suffix}" for suffix in ("csv", "md", "tex")),
            *("report.html", "lm_position.svg", "table3_passkey.svg"),
        ]
    )
    markdown = (folder / "out" / "table2_lm.md").read_text()
    assert "| model | seeds |" in markdown and "| :-- | --: |" in markdown
    assert r"too \| large & <odd> 100 %" in markdown
    latex = (folder / "out" / "table2_lm.tex").read_text()
    assert r"\toprule" in latex and r"infini\_linear & 1" in latex and r"$\Delta$" in latex
    page = (folder / "out" / "report.html").read_text()
    assert lm().id in page and "&lt;odd&gt;" in page and "http" not in page
    titles = re.findall(r'<h2 id="(s\d+)">([^<]*)', page)
    assert titles[0][1] == "Claims" and titles == re.findall(r'<a href="#(s\d+)">([^<]*)', page)
    assert '<th class="text">statement</th>' in page and '<th class="number">seeds</th>' in page


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


def _untracked(folder):
    """Names of files that git does not know; none where there is no git."""
    command = ["git", "ls-files", "--others", "."]
    listed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return set(listed.stdout.split())


def test_committed_tables_are_those_of_the_committed_records(tmp_path):
    mine = _untracked(RESULTS / "records")  # what a user ran here is not the suite's
    (tmp_path / "records").mkdir()
    for path in record_files(RESULTS / "records"):
        if path.name not in mine:
            (tmp_path / "records" / path.name).symlink_to(path)
    (tmp_path / "records" / "summaries").symlink_to(RESULTS / "records" / "summaries")
    write_report(tmp_path / "records", tmp_path / "tables")
    made, kept = (
        {path.relative_to(root).as_posix(): path.read_bytes() for kind in KINDS for path in root.glob(kind)}
        for root in (tmp_path, RESULTS)
    )
    assert made == kept, "run `infini-bench report` and commit results/tables and results/figures"


def test_a_variants_settings_keep_their_blanks_and_dots():
    words = ["b1-h4-n8", "curriculum=[1, 2]", "lr=0.001", "task.memory.window=8", "model=a.b"]
    variant = "b1-h4-n8 trainer.curriculum=[1, 2] trainer.lr=0.001 task.memory.window=8 base.model=a.b"
    assert settings({"variant": variant}) == words and settings({"variant": None}) == []
