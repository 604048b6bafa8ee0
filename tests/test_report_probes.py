"""Tables and figures of what is asked of untrained models, from made-up records."""

from __future__ import annotations

import pytest
from report_fakes import record, row, sheet_text

from infini_bench.report import paper, probes
from infini_bench.report.probe_figures import FIGURES, apart, reach_figure
from infini_bench.report.tidy import TABLES, tidy

BODY = {"layers": 2, "heads": 4, "dim": 64, "head_dim": None}


def asked(task: str, model: str, metrics: list, settings: dict | None = None, **changes):
    config = {"decoder": BODY, "task": {"name": task, **(settings or {})}, **changes.pop("config", {})}
    return record(model, metrics=metrics, config=config, train={}, **changes)


def footprint(model: str, floats: tuple[int, ...], formula: int | None = None, **changes):
    metrics = []
    for segments, value in zip((4, 64), floats, strict=True):
        columns = {"length": 32 * segments, "extra": {"segments": segments}}
        metrics += [row("state_floats", value, **columns), row("state_bytes", 4 * value, **columns)]
        if formula:
            metrics.append(row("paper_formula_floats", formula, **columns))
    metrics.append(row("local_floats", 7, **columns))
    return asked("footprint", model, metrics, {"shapes": False}, **changes)


def capacity(model: str, **changes):
    metrics = []
    for kind in ("random", "zipf"):
        for cut in ("one segment", "16 a segment"):
            for ratio, value in (("0.5", 0.4), ("2", 0.2)):
                columns = {"position": ratio, "condition": kind, "protocol": cut, "length": 8, "n": 16}
                columns |= {"ci_low": value - 0.1, "ci_high": value + 0.1, "extra": {"head_dim": 16}}
                metrics += [row(name, value, **columns) for name in ("cosine", "relative_error", "gain")]
    return asked("capacity", model, metrics, {"trials": 16, "copies": 4, "cosine": 0.9}, **changes)


def reach(model: str, values: tuple[float, ...] = (1.0, 0.1), **changes):
    metrics = []
    for distance, value in zip(("1", "16"), values, strict=True):
        columns = {"position": distance, "condition": "constant", "n": 2}
        columns |= {"ci_low": value / 2, "ci_high": value * 2}
        metrics += [row(name, value, **columns) for name in ("gradient_norm", "gradient_share")]
    return asked("reach", model, metrics, **changes)


FOUND = [
    footprint("infini_delta", (100, 100), 100),
    footprint("memorizing", (50, 400), 800),
    footprint("local_block", (0, 0)),
    capacity("infini_linear"),
    capacity("infini_delta"),
    reach("infini_linear"),
    reach("transformer_xl", (0.0, 0.0)),
    reach("local_sliding", (1.0, 0.0)),
]


def test_table1_has_state_growth_and_the_papers_words():
    titles, sheet = sheet_text(FOUND, "table1_memory")
    lines = {line[0]: dict(zip(titles, line, strict=True)) for line in sheet.rows}
    assert lines["memorizing"]["floats after 64 segments"] == "400"
    assert [lines[name]["grows"] for name in ("memorizing", "infini_delta", "local_block")] == [
        *("x 8", "no", "no")
    ]
    assert lines["memorizing"]["paper's formula, floats"] == "800" and lines["memorizing"]["bytes"] == "1,600"
    assert lines["infini_delta"]["paper: formula"] == "dk (dv+1) H l"
    assert lines["local_block"]["paper: formula"] == "—" == lines["local_block"]["paper's formula, floats"]
    assert "Trained" not in sheet.caption and "segments of 32 tokens" in sheet.caption


def test_the_papers_memory_stands_beside_its_own_body_only():
    columns = {"model": "rmt", "metric": "state_floats", "condition": None, "extra": {"segments": 64}}
    config = {"decoder": {"layers": 12, "heads": 8, "head_dim": 128}, "memory": {"segment": 2048}}
    assert paper.value("table1_memory", {**columns, "config": config}) == 2.5e6
    config["memory"]["segment"] = 512
    assert paper.value("table1_memory", {**columns, "config": config}) is None


def test_read_back_has_a_line_for_each_cut_and_kind():
    titles, sheet = sheet_text(FOUND, "diag_memory")
    assert titles == ["model", "writes", "keys", "P / D = 0.5", "P / D = 2"]
    assert len(sheet.rows) == 8
    assert sheet.rows[0][:4] == [
        *("infini_linear", "16 a segment", "random", "0.40 / 0.40 / 0.40\n[0.30, 0.50]")
    ]


def test_gradients_are_scientific_and_zeros_are_zeros():
    titles, sheet = sheet_text(FOUND, "diag_gradients")
    lines = {line[0]: line[3:] for line in sheet.rows}
    assert titles[3:] == ["1", "16"]
    assert lines["infini_linear"] == ["1.0e+00\n[5.0e-01, 2.0e+00]", "1.0e-01\n[5.0e-02, 2.0e-01]"]
    assert lines["transformer_xl"] == ["0", "0"]


@pytest.mark.parametrize("name", FIGURES)
def test_figures_show_every_line(name, tmp_path):
    more = [footprint("full", (9, 90), config={"scale": "gpu"}), reach("infini_linear", seed=1)]
    more.append(capacity("infini_delta", config={"scale": "gpu"}))
    rows = [row for row in tidy([*FOUND, *more]) if row["table"] == name]
    figure = FIGURES[name](rows)
    figure.savefig(tmp_path / "figure.svg")
    drawn = sum(len(ax.get_legend_handles_labels()[1]) for ax in figure.axes)
    assert drawn == {"table1_memory": 3, "diag_memory": 2 * 2 * (4 + 2), "diag_gradients": 2}[name]
    assert all(line.get_xdata().min() > 0 for ax in figure.axes for line in ax.lines[:1])


def test_names_beside_lines_stay_near_them_and_off_one_another():
    assert apart([0.1, 0.5, 0.9], [0.1, 0.1, 0.1]) == pytest.approx([0.1, 0.5, 0.9])
    assert apart([0.5, 0.5, 0.9], [0.1, 0.3, 0.1]) == pytest.approx([0.4, 0.6, 0.9])
    assert apart([0.1, 0.5, 0.52], [0.1, 0.1, 0.1]) == pytest.approx([0.1, 0.46, 0.56])
    assert apart([0.4, 0.5, 0.5], [0.1, 0.1, 0.1]) == pytest.approx([1.1 / 3, 1.4 / 3, 1.7 / 3])


def test_what_is_zero_is_named_and_not_lost():
    """However many they are: the words stay inside the axes."""
    names = [f"a_memory_of_some_kind_{i}" for i in range(9)]
    zeros = [reach(name, seed=0, values=(0.0, 0.0)) for name in names]
    rows = [row for row in tidy([*FOUND, *zeros]) if row["table"] == "diag_gradients"]
    figure = reach_figure(rows)
    (ax,) = figure.axes
    words = next(text for text in ax.texts if "at every distance" in text.get_text())
    assert all(name in words.get_text() for name in ("transformer_xl", *names))
    figure.canvas.draw()
    box, around = words.get_window_extent(), ax.get_window_extent()
    assert around.x0 <= box.x0 and box.x1 <= around.x1 and around.y0 <= box.y0
    sliding = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))["local_sliding"]
    assert 0 < sliding.get_ydata()[1] < 0.1


def test_every_table_has_a_builder_a_title_and_a_figure():
    own = {TABLES[task] for task in ("footprint", "capacity", "reach")}
    parts = (probes.TITLES, probes.LINES, probes.BUILDERS, probes.CAPTIONS, FIGURES)
    assert all(set(part) == own for part in parts)
