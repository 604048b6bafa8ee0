"""Table 2's settings, gates (Figure 3) and the figures of language models."""

from __future__ import annotations

import pytest
from report_fakes import lm, pick, record, row, sheet_text

from infini_bench.report import gates, lm_figures, paper
from infini_bench.report.figures import svg
from infini_bench.report.first_segment import spans
from infini_bench.report.tidy import tidy

EVEN = [[0.5, 0.45], [0.6, 0.3]]
OPEN = [[0.05, 0.95], [0.5, 0.7]]


def training(model: str = "infini_linear", seed: int = 0, last=OPEN, **changes):
    history = [{"step": 10, "gates": EVEN}, {"step": 20, "gates": last}]
    train = {"folder": "runs/x", "seconds": 1.0, "final_loss": 3.0, "gates": history}
    return record(model, seed, kind="train", train=train, tokens=640, **changes)


# --- settings -------------------------------------------------------------------------------------------


def test_how_a_run_is_computed_makes_no_variant():
    runs = [
        lm(config={"trainer.compile": True, "memory.backend": "auto"}),
        lm(seed=1, config={"trainer.compile": False, "memory.backend": "eager"}),
    ]
    assert {(r["variant"], r["seeds"]) for r in tidy(runs)} == {(None, 2)}


def test_room_for_a_memorys_parameters_is_no_other_budget():
    slim = lm("compressive", nats=(90.0, 300.0), config={"decoder.ffn": 200}, params=101_000)
    assert pick(tidy([slim, lm("local_block")]), "delta_bits_per_byte", model="compressive")["value"] < 0
    large = lm("compressive", config={"decoder.ffn": 300}, params=103_000)
    found = [r["metric"] for r in tidy([large, lm("local_block")])]
    assert "delta_bits_per_byte" not in found, "3 % more parameters are another size"


def test_what_only_the_evaluation_has_is_the_memorys_own():
    store = lm("memorizing", config={"task": {"name": "lm", "memory": {"entries": 65536}}})
    assert (
        pick(tidy([store, lm("local_block")]), "delta_bits_per_byte", model="memorizing")["variant"] is None
    )


def test_splits_have_sheets_of_their_own_and_name_no_setting():
    found = []
    for split, lr in (("test", 0.003), ("validation", 0.01)):
        run = lm(config={"task": {"name": "lm", "split": split}, "trainer.lr": lr})
        for metric in run.metrics:
            metric["split"] = split
        found.append(run)
    assert {(r["split"], r["variant"]) for r in tidy(found)} == {("test", None), ("validation", None)}


# --- gates ----------------------------------------------------------------------------------------------


def test_kinds_of_heads():
    assert gates.summary(OPEN) == {
        "local_heads": 25.0,
        "mixer_heads": 25.0,
        "memory_heads": 25.0,
        "local_layers": 50.0,
        "gate": pytest.approx(0.55),
    }
    printed = gates.summary(paper.FIGURE3)
    assert [round(printed[name] * 96 / 100) for name in gates.KINDS] == [46, 15, 3]
    assert printed["local_layers"] == 100 and printed["gate"] == pytest.approx(0.327, abs=5e-4)


def test_gates_of_seeds_and_of_every_head():
    rows = [r for r in tidy([training(), training(seed=1, last=EVEN)]) if r["table"] == "figure3_gates"]
    local = pick(rows, "local_heads", condition=None)
    assert (local["value"], local["seeds"], local["n"]) == (12.5, 2, 4)
    assert pick(rows, "head_gate", condition="seed 0", position="layer 1 head 2")["value"] == 0.95
    assert pick(rows, "head_gate", condition="seed 1", position="layer 1 head 2")["value"] == 0.45
    assert pick(rows, "mixer_heads", condition="step 10")["value"] == 75.0
    titles, sheet = sheet_text([training()], "figure3_gates")
    line = dict(zip(titles, sheet.rows[0], strict=True))
    assert line["layers with a local head, %"] == "50" and line["heads"] == "4"
    assert "local heads 48 %" in sheet.caption


def test_gates_are_drawn_with_the_papers():
    rows = [r for r in tidy([training(), training("infini_delta")]) if r["table"] == "figure3_gates"]
    figure = lm_figures.gates_figure(rows)
    maps = [ax for ax in figure.axes if ax.images]
    assert [ax.images[0].get_array().shape for ax in maps] == [(12, 8), (2, 2), (2, 2)]
    ways = [ax for ax in figure.axes if ax.lines]
    assert len(ways) == 2 and [list(line.get_xdata()) for line in ways[0].lines] == [[10, 20]] * 3
    assert list(ways[0].lines[0].get_ydata()) == [0, 25]
    text = svg("figure3_gates", rows)
    assert text == svg("figure3_gates", rows) and "Munkhdalai" in text


def test_trainings_of_other_tasks_have_no_part_in_figure_3():
    other = training(config={"task": {"name": "passkey"}})
    assert not [r for r in tidy([other]) if r["table"] == "figure3_gates"]


# --- positions ------------------------------------------------------------------------------------------


def test_positions_are_drawn_against_local_block():
    def run(model, nats):
        places = [row("loss", x, split="test", position=str(16 * 4**i), n=2) for i, x in enumerate(nats)]
        return record(model, metrics=places)

    rows = [r for r in tidy([run("infini_linear", (3.0, 2.0)), run("local_block", (3.5, 3.0))])]
    left, right = lm_figures.position_figure(rows).axes
    assert {line.get_label(): list(line.get_ydata()) for line in left.lines[:2]} == {
        "infini_linear": [3.0, 2.0],
        "local_block": [3.5, 3.0],
    }
    assert list(right.lines[0].get_ydata()) == [-0.5, -1.0] and list(right.lines[0].get_xdata()) == [16, 64]


def test_positions_are_paired_by_document_where_the_sums_are_known():
    def run(model, *nats, seed=0, counts=(10, 30)):
        kept = [{"nats": list(each), "counts": list(counts)} for each in nats]
        values = [sum(each) / sum(counts) for each in nats]
        columns = {"split": "test", "n": 2}
        places = [
            row("loss", value, extra, position=str(16 * 4**i), ci_low=value - 1, ci_high=value + 1, **columns)
            for i, (value, extra) in enumerate(zip(values, kept, strict=True))
        ]
        return record(model, seed, metrics=places)

    runs = [run("infini_linear", (20.0, 90.0), (11.0, 51.0)), run("local_block", (30.0, 120.0), (21.0, 81.0))]
    rows = [r for r in tidy(runs) if r["table"] == "lm_position"]
    near, far = (pick(rows, "loss_less_local_block", position=place) for place in ("16", "64"))
    assert (near["value"], near["ci_low"], near["ci_high"], near["n"]) == (-1.0, -1.0, -1.0, 2)
    assert far["value"] == far["ci_high"] == pytest.approx(-1)
    left, right = lm_figures.position_figure(rows).axes
    assert len(left.collections) == 2 and len(right.collections) == 1
    assert right.collections[0].get_paths()[0].vertices[:, 1] == pytest.approx(-1.0)
    assert list(right.lines[0].get_ydata()) == pytest.approx([-1.0, -1.0])
    unlike = [*runs[:1], run("local_block", (30.0, 105.0), (21.0, 81.0))]
    wide = pick(tidy(unlike), "loss_less_local_block", position="16")
    assert wide["value"] == pytest.approx(-25 / 40) and wide["ci_low"] == pytest.approx(-1.0)
    assert wide["ci_high"] == pytest.approx(-0.5), "documents of 10 and 30 tokens, redrawn"


def test_the_first_segment_and_what_comes_after_it_are_pooled_over_tokens():
    """Segments of 4 tokens: tokens 1 to 3 of three documents, of which one ends there, and all from 4 on."""

    def run(model, shift=0.0, **kept):
        places = []
        for low, nats, counts in ((1, (2, 4, 6), (1, 1, 1)), (2, (4, 4, 1), (2, 2, 1)), (4, (8, 2), (4, 1))):
            nats = [each + shift * count for each, count in zip(nats, counts, strict=True)]
            extra = {"tokens": sum(counts), **({"nats": nats, "counts": counts} if kept.get("sums") else {})}
            places.append(row("loss", sum(nats) / sum(counts), extra, split="test", position=str(low), n=3))
        sums = {"documents": ["a", "b", "c"], "nats": [1.0] * 3, "bytes": [9] * 3}
        whole = row("bits_per_byte", 1.0, {"tokens": [7, 4, 2], **sums}, split="test")
        return record(model, metrics=[whole, *places], config={"memory.segment": 4})

    def found(*runs):
        rows = [r for r in tidy(runs) if r["table"] == "lm_position" and r["model"] == "infini_linear"]
        return {(r["metric"], r["position"]): r for r in rows if not r["position"].isdecimal()}

    rows = found(run("infini_linear", sums=True), run("local_block", 0.5, sums=True))
    near, far = (rows["loss", place] for place in ("1 to 3", "from 4"))
    assert (near["value"], near["n"]) == (pytest.approx(21 / 8), 3)
    assert (far["value"], far["n"]) == (2.0, 2), "the third document ends before"
    assert (near["extra"]["nats"], near["extra"]["counts"]) == ([6, 8, 7], [3, 3, 2])
    assert near["ci_low"] == 2.0 and near["ci_high"] == 3.5  # the first document's and the third's alone
    less = rows["loss_less_local_block", "1 to 3"]
    assert [less[key] for key in ("value", "ci_low", "ci_high")] == pytest.approx([-0.5] * 3)
    rows = found(run("infini_linear"), run("local_block", 0.5, sums=True))
    less = rows["loss_less_local_block", "from 4"]
    assert (less["value"], less["ci_low"], less["n"]) == (-0.5, None, 2), "no sums, no interval"
    assert rows["loss", "1 to 3"]["value"] == pytest.approx(21 / 8)
    titles, sheet = sheet_text([run("infini_linear", sums=True), run("local_block", 0.5)], "lm_position")
    assert titles[4:10] == [
        *("1 to 3", "from 4", "1 to 3, less local_block", "from 4, less local_block", "1", "2")
    ]
    assert sheet.rows[0][4].startswith("2.625\n[2.000") and sheet.rows[0][6:8] == ["-0.500", "-0.500"]


@pytest.mark.parametrize(("segment", "name"), [(3, "1 to 3"), (4, "1 to 3"), (6, "1 to 3"), (7, "1 to 7")])
def test_the_first_span_ends_inside_the_segment(segment, name):
    places = [row("loss", 1.0, {"tokens": low}, position=str(low)) for low in (1, 2, 4, 8)]
    whole = row("bits_per_byte", 1.0, {"tokens": [15]})
    made = spans(record(metrics=[whole, *places], config={"memory.segment": segment}))
    assert [each["position"] for each in made] == [name, f"from {int(name[-1]) + 1}"]
    assert sum(each["extra"]["tokens"] for each in made) == 15


def test_in_a_joined_stream_the_first_segment_is_the_streams():
    """Documents of 3 and 4 tokens: targets at 1, 2 and at 4, 5, 6 of the stream."""
    ranges = ((1, [1.0], [1]), (2, [2.0], [1]), (4, [9.0], [3]))
    places = [
        row("loss", sum(n) / sum(c), {"tokens": sum(c), "nats": n, "counts": c}, position=str(p))
        for p, n, c in ranges
    ]
    whole = row("bits_per_byte", 1.0, {"tokens": [2, 3]})
    config = {"memory.segment": 4, "task": {"name": "lm", "joined": True}}
    near, far = spans(record(metrics=[whole, *places], config=config))
    assert (near["value"], near["n"], near["ci_low"]) == (1.5, 1, None)
    assert (far["extra"]["nats"], far["value"]) == ([9.0], 3.0)
