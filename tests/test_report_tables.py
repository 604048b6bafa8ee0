"""Tables: the paper's numbers beside ours, the layouts, and the files in results/."""

from __future__ import annotations

import csv
import io
import re
import subprocess
from base64 import b64decode
from pathlib import Path

import pytest
from report_fakes import booksum, lm, passkey, pick, sheet_text, taught
from rich.console import Console

from infini_bench.errors import UserError
from infini_bench.report import paper
from infini_bench.report.cells import settings
from infini_bench.report.record_files import record_files
from infini_bench.report.records import write_record
from infini_bench.report.tables import FORMATS, print_tables, write_report
from infini_bench.report.tidy import NAMES

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
    figures = dict(re.findall(r'<img alt="(\w+)" src="data:image/svg\+xml;base64,([^"]*)">', page))
    assert {f"{name}.svg": b64decode(data).decode() for name, data in figures.items()} == {
        path.name: path.read_text() for path in (folder / "figures").iterdir()
    }
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
