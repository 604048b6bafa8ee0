"""Tables and figures of the trained diagnostics, from made-up records."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from report_fakes import lm, mqar, pick, recall, sheet_text, taught, training

from infini_bench.report import diagnostics, style
from infini_bench.report.cells import ABSENT, number
from infini_bench.report.figures import FIGURES, labels, svg
from infini_bench.report.layouts import BUILDERS, CAPTIONS, LINES, TITLES
from infini_bench.report.records import add_plan, read_records, write_record
from infini_bench.report.style import compact, panels
from infini_bench.report.tables import write_report
from infini_bench.report.tidy import NAMES, tidy

FEATURES = {"plans": ["diag_features"]}


def features(**memory) -> list:
    """Recall, language model and their trainings at one setting."""
    config = {"config": {f"memory.{key}": value for key, value in memory.items()}, **FEATURES}
    made = [
        recall(**config),
        lm(**config),
        training("recall", **config),
        training("lm", (0.3, 2.0), **config),
    ]
    return made


def named(records: list, name: str) -> list:
    return [row for row in tidy(records) if row["table"] == name]


def test_every_table_has_a_layout():
    assert set(NAMES) == set(BUILDERS) == set(CAPTIONS) == set(TITLES) == set(LINES)
    assert set(FIGURES) <= set(NAMES)


def test_recall_layout():
    runs = [*taught(recall(seed=0), 1, 16), *taught(recall(seed=1, values={1: 90.0}), 1, 16)]
    titles, sheet = sheet_text(runs, "diag_recall")
    assert titles[:8] == ["model", "seeds", "filler or control", "trained at", "0", "1", "64", "1,024"]
    lines = {line[2]: dict(zip(titles, line, strict=True)) for line in sheet.rows}
    assert [*lines] == ["constant", "memory_off", "text"]
    assert lines["constant"]["1"].startswith("95\n[76-99]") and lines["constant"]["trained at"] == "16"
    assert lines["constant"]["gate, question"].startswith("0.75")
    assert lines["text"]["gate, question"] == "—"
    assert "at most 200 trials" in sheet.caption and "chance 0.391 %" in sheet.caption


def test_mqar_layout():
    titles, sheet = sheet_text([mqar()], "diag_mqar")
    assert titles[:7] == ["model", "seeds", "memory floats", "pairs", "trained at", "0", "4"]
    assert [line[3] for line in sheet.rows] == [
        *("4 pairs", "4 pairs, memory_off"),
        *("16 pairs", "16 pairs, memory_off"),
    ]
    assert sheet.rows[0][5].startswith("76\n[") and "Trained on 2, 4 pairs" in sheet.caption


def test_a_row_says_how_far_its_training_came():
    def shown(*runs):
        titles, sheet = sheet_text([*runs], "diag_mqar")
        return {row[titles.index("trained at")] for row in sheet.rows}

    def run(seed=0):
        return mqar(seed=seed, config={"trainer.curriculum": [1, 2, 4]})

    assert shown(*taught(run(), 1, 1, 1)) == {"1"}, "the level that it never left, not the last one"
    assert shown(*taught(run(), 1, 2, 4)) == {"4"}
    assert shown(*taught(run(), 1, 1, 2), *taught(run(1), 1, 2, 4)) == {"2 to 4"}
    unknown = taught(run(1), 1, 2, 4)[1:]  # without its training's record
    assert shown(*unknown) == shown(*taught(run(), 1, 2, 4), *unknown) == {"at most 4"}
    early = taught(run(), 1, 2, 4)
    early[1].train["steps"] = 2  # a checkpoint of before the last level
    assert shown(*early) == {"2"}
    assert shown(mqar()) == {"4"}, "without a curriculum there is one level"


def test_a_view_puts_recall_language_and_training_in_one_line():
    titles, sheet = sheet_text([*features(features="exp"), *features(features="relu2")], "diag_features")
    assert len(sheet.rows) == 2 and sheet.title.startswith(
        "Feature maps and normalisers, embedded, scale laptop"
    )
    line = dict(zip(titles, sheet.rows[0], strict=True))
    assert line["model"] == "infini_linear\nmemory.features=exp"
    assert line["constant 64"].startswith("90\n[") and line["text 1,024"].startswith("30\n[")
    assert line["bits/byte"].startswith("2.885") and line["training"] == "done"
    assert line["gradient norm, max (recall, lm)"] == "4.0\n2.0"
    assert line["ended by NaN (recall, lm)"] == "0 of 1\n0 of 1"
    assert named(features(features="exp"), "diag_recall") == named(features(), "table2_lm") == []
    assert named(features(), "lm_position") == []


def test_one_gate_is_one_row_although_only_recall_or_only_language_varied_another():
    def of(run, **memory):
        return run(config={f"memory.{key}": value for key, value in memory.items()}, plans=["diag_gates"])

    runs = [of(recall), of(recall, gate_split=2.0), of(recall, gate_frozen=0.5)]
    runs += [of(lm, gate_frozen=0.5), of(lm, gate_frozen=0.5, write_gate=True)]
    titles, sheet = sheet_text(runs, "diag_gates")
    lines = [dict(zip(titles, row, strict=True)) for row in sheet.rows]
    both = [line["model"] for line in lines if ABSENT not in (line["constant 1"], line["bits/byte"])]
    settings = "memory.gate_frozen=0.5 memory.gate_split=0.0 memory.write_gate=false"
    assert len(lines) == 4 and len(both) == 1 and both[0].split("\n")[1] == settings


def test_a_training_that_fails_is_a_row_with_its_reason():
    broken = training("recall", None, config={"memory.features": "exp"}, **FEATURES)
    rows = named([*features(features="relu2"), broken], "diag_features")
    norm = pick(rows, "grad_norm_max", variant="memory.features=exp")
    assert norm["value"] is None and norm["extra"]["failed"].startswith("UserError: Step 7 gave loss nan")
    titles, sheet = sheet_text([*features(features="relu2"), broken], "diag_features")
    line = dict(zip(titles, sheet.rows[0], strict=True))
    assert line["model"].endswith("exp") and line["constant 64"] == "—"
    assert line["training"] == "recall: UserError: Step 7 gave loss nan; lower trainer.lr."
    assert line["ended by NaN (recall, lm)"] == "1 of 1\n—"
    assert "diag_features" not in TITLES["diag_recall"] and sheet.failures


def test_one_seed_that_fails_is_not_averaged_away():
    config = {"config": {"memory.features": "exp"}, **FEATURES}
    rows = named([training("lm", None, seed=1, **config), training("lm", seed=0, **config)], "diag_features")
    norm = pick(rows, "grad_norm_max")
    assert norm["value"] is None and "failed" in norm["extra"] and norm["seeds"] == 2


def test_trainings_that_end_by_nan_are_counted_over_seeds():
    config = {"config": {"memory.features": "exp"}, **FEATURES}
    trainings = [training("lm", None, seed=seed, **config) for seed in (0, 1)]
    trainings += [training("lm", seed=2, **config), training("lm", None, seed=3, **config)]
    trainings[-1].error = "UserError: There is no room left on the disk."
    titles, sheet = sheet_text([*trainings, training("recall", **config)], "diag_features")
    (line,) = sheet.rows
    assert line[titles.index("ended by NaN (recall, lm)")] == "0 of 1\n2 of 4"


def test_the_cost_of_local_attention_is_speed_and_memory():
    given = {"config": {"memory.local": "xl"}, "plans": ["diag_local"]}
    failed = training("lm", None, state_floats=None, **given)
    titles, sheet = sheet_text([failed, training("recall", **given), recall(**given)], "diag_local")
    (line,) = (dict(zip(titles, line, strict=True)) for line in sheet.rows)
    assert (
        line["training tokens/s (recall, lm)"] == "2,000\n—"
        and line["memory floats (recall, lm)"] == "8,448\n—"
    )


def test_a_run_of_two_plans_is_in_both_tables():
    both = recall(plans=["diag_recall", "diag_features"])
    assert {row["table"] for row in tidy([both])} == {"diag_recall", "diag_features"}
    assert {row["table"] for row in tidy([recall(plans=["demo"])])} == {"diag_recall"}


def test_variants_are_those_of_the_table():
    """What a view varies does not become a variant of the task's own table."""
    own, varied = recall(), recall(config={"memory.gate": 2}, plans=["diag_gates"])
    assert {row["variant"] for row in named([own, varied], "diag_recall")} == {None}


def test_plans_are_noted_in_the_records_file(tmp_path):
    one, two = recall(), recall(seed=1)
    write_record(tmp_path, one)
    (tmp_path / "many.jsonl").write_text(f"{mqar().to_json()}\n\n{two.to_json()}\n")
    for record in read_records(tmp_path):
        add_plan(tmp_path, record, "diag_recall")
        add_plan(tmp_path, record, "diag_recall")
    assert [record.plans for record in read_records(tmp_path)] == [["diag_recall"]] * 3
    assert len(list(tmp_path.iterdir())) == 2


# --- figures ----------------------------------------------------------------------------------------------


def drawn() -> list:
    """Records for every figure, two models each."""
    records = [made for model in ("infini_linear", "infini_delta") for made in (recall(model), mqar(model))]
    for plan, settings in (
        (
            "diag_features",
            [{"features": f, "normaliser": n} for f in ("elu1", "exp") for n in ("sum", "max")],
        ),
        ("diag_gates", [{"gate_split": 0.0}, {"gate_split": 2.0}]),
        ("diag_local", [{"local": "block"}, {"local": "sliding"}]),
    ):
        for memory in settings:
            config = {f"memory.{key}": value for key, value in memory.items()}
            records += [recall(config=config, plans=[plan]), lm(config=config, plans=[plan])]
    return records


DRAWN = [name for name in FIGURES if name in diagnostics.TITLES]  # the others: test_report_probes.py


@pytest.mark.parametrize("name", DRAWN)
def test_figures_are_the_same_bytes_again(name):
    text = svg(name, named(drawn(), name))
    assert text == svg(name, named(drawn(), name))
    ElementTree.fromstring(text)
    assert "<text" in text and "dc:date" not in text and "Matplotlib" not in text
    assert svg(name, []) is None


def test_a_page_holds_a_title_that_is_wider_than_its_panel():
    def page(title: str) -> float:
        figure, (axes,) = panels(1, 1, (1.0, 1.0))
        axes.set_title(title)
        return float(re.search(r'width="([\d.]+)pt"', style.drawn(lambda: figure) or "")[1])

    assert page("short") < 110 < 500 < page("long enough " * 10)  # points; a panel of an inch has 72


def test_a_line_looks_the_same_in_every_panel():
    rows = named(drawn(), "diag_recall")
    text = svg("diag_recall", rows)
    assert all(f">{word}<" in text for word in ("infini_linear", "infini_delta", "chance"))
    lines = [line for each in FIGURES["diag_recall"](rows).axes for line in each.lines]
    looks = [(line.get_label(), line.get_color()) for line in lines]
    assert looks.count(("infini_linear", "#0072B2")) == looks.count(("infini_delta", "#D55E00")) == 2


def test_an_svg_is_compact_and_keeps_its_words():
    """Styles that return become classes, coordinates have two digits; text and images stay as they are."""
    style = 'style="fill: #ffffff; opacity: 0.15"'
    line = f'  <path d="M 0.126 1569.600000\nL -0.0001 12" {style}/>\n'
    text = f'  <text {style} x="10.5" transform="rotate(-0 1.0 2.0)">lr=0.00125</text>\n'
    once = '  <g style="stroke: #000000"><image href="data:base64,\nA1234567"/></g>\n'
    made = compact(f"<svg>\n <style>*{{}}</style>\n{line}{text}{once}</svg>\n")
    assert made.splitlines() == [
        "<svg>",
        "<style>*{}.s0{fill: #ffffff; opacity: 0.15}",
        "</style>",
        '<path d="M 0.13 1569.6',
        'L -0 12" class="s0"/>',
        '<text class="s0" x="10.5">lr=0.00125</text>',
        '<g style="stroke: #000000"><image href="data:base64,',
        'A1234567"/></g>',
        "</svg>",
    ]


def test_accuracy_is_drawn_against_the_floats_that_are_carried():
    """A panel a distance, below those against pairs; the most pairs that all were asked."""
    made = [mqar(), mqar("local_block", value=40.0, state_floats=0), mqar("rmt", state_floats=None)]
    axes = FIGURES["diag_mqar"](named(made, "diag_mqar")).axes
    assert [each.get_title() for each in axes[2:]] == [
        f"16 pairs, asked {place} segments later" for place in (0, 4)
    ]
    points = [line.get_xydata().tolist() for line in axes[2].lines if line.get_marker() not in ("_", "None")]
    assert points == [[[0.0, 24.0]], [[8448.0, 64.0]]]
    assert axes[2].get_xscale() == "symlog"


def test_labels_say_what_tells_a_line_from_others_of_its_model():
    config = {"memory": {}, "task": {"segments": 64}, "trainer": {"curriculum": []}}

    def row(model, variant, reached=(16, 16)):
        return {"model": model, "variant": variant, "config": config, "reached": reached}

    shared = "trainer.lr=0.01 task.segments=16"
    rows = [row("infini_linear", f"memory.gate_frozen={g} {shared}") for g in (0.5, 1.0)]
    rmt = row("rmt", f"trainer.steps=9 {shared}", (0, 64))
    names = labels([*rows, rows[0], rmt, row("sink", None)])
    linear = [f"infini_linear gate_frozen={g} (to 16)" for g in (0.5, 1.0)]
    assert [*names.values()] == [*linear, "rmt (to at most 64)", "sink"]


def test_recall_is_marked_where_training_came_to():
    curriculum = {"trainer.curriculum": [1, 16, 64]}
    runs = [*taught(recall(config=curriculum), 1, 16), recall("infini_delta", config=curriculum)]
    marks = re.findall(r">(trained to [^<]*?) *<", svg("diag_recall", named(runs, "diag_recall")))
    assert sorted({*marks}) == ["trained to 15", "trained to at most 63"]
    marks = re.findall(r">(trained to [^<]*?) *<", svg("diag_recall", named(runs[:2], "diag_recall")))
    assert {*marks} == {"trained to 15"}


def test_halves_print_alike_however_they_came_about():
    for value in (72.5, 100 * 29 / 40, 72.49999999999999, 72.50000000000001):
        assert number(value, 0) == "73" and number(-value, 0, "+") == "-73"
    assert [number(value, 0) for value in (2.5, 7.5, 2.4999)] == ["3", "8", "2"]
    assert number(1234567.0, 0) == "1,234,567" and number(0.0125, 3, "+") == "+0.013"
    assert number(None, 0) == ABSENT


def test_heat_maps_leave_a_dash_where_a_run_is_missing():
    records = [made for made in drawn() if made.plans == ["diag_features"]]
    whole = svg("diag_features", named(records, "diag_features"))
    text = svg("diag_features", named(records[:-2], "diag_features"))
    assert ">—<" in text and ">—<" not in whole and ">elu1<" in text and ">90<" in text


def test_report_writes_figures_beside_the_tables(tmp_path):
    for made in drawn():
        write_record(tmp_path / "records", made)
    write_report(tmp_path / "records", tmp_path / "tables")
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == set(DRAWN)
    write_report(tmp_path / "records", tmp_path / "page.html", ["html"], tmp_path / "elsewhere")
    assert len([*(tmp_path / "elsewhere").iterdir()]) == len(DRAWN)
