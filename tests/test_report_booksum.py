"""Table 4: summaries beside the paper's, their paired differences, known and obscure books, figure 4."""

from __future__ import annotations

import pytest
from report_fakes import booksum, booksum_lengths, lead, lm, pick, sheet_text

from infini_bench.report import paper
from infini_bench.report.figures import svg
from infini_bench.report.layouts import sheets
from infini_bench.report.tidy import tidy


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
    printed = {line["model"].partition("\n")[0]: line[titles[-1]] for line in lines[5:]}
    assert printed["primera_unlimiformer"] == "37.9 / 8.2 / 16.3 / 17.2" and "infini_delta" in printed
    assert all(line["overall"] == "—" for line in lines[5:]) and "infini_linear" not in printed
    assert "were not run here" in sheet.caption


def test_late_names_are_shown_of_controls_and_gates_too():
    made, values = booksum(), {"pairwise": 1.5, "memory_off": 0.25, "gate_0.5": 0.75}
    for condition, value in values.items():
        made.metrics.append(
            {**made.metrics[0], "metric": "late_names", "value": value, "condition": condition}
        )
    titles, sheet = sheet_text([made], "table4_booksum")
    line = dict(zip(titles, sheet.rows[0], strict=True))
    assert [line[f"late names{of}"] for of in ("", ", memory off", ", gate 0.5")] == ["1.50", "0.25", "0.75"]
    assert "late names, shuffled" not in line


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
    models = [{row[0].partition("\n")[0] for row in sheet.rows} - {*paper.TABLE4} for sheet in made]
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
    why = "weights could not be had"
    rest = [f"{name}\n({why})" for name in ("bart_unlimiformer", "primera", "primera_unlimiformer")]
    assert {*rest, "infini_delta\n(not run)"} < set(lines) and f"bart\n({why})" not in lines
    assert lines["bart"]["overall"] == "16.9" and lines["bart"][titles[-1]] == "36.4 / 7.6 / 15.3 / 16.2"
    primera = lines[f"primera\n({why})"]
    assert primera["overall"] == "—" and primera[titles[-1]] == "38.6 / 7.2 / 15.6 / 16.3"
    assert "not run here" in sheet.caption and len(sheet_text([booksum()], "table4_booksum")[1].rows) == 1
