"""`profile` at tiny sizes, one repetition, timers that are told what to say: rows, shapes, sentences."""

from __future__ import annotations

import copy

import pytest
import report_fakes as fakes
import torch
import yaml
from report_fakes import sheet_text
from test_tasks_probes import config, pick
from test_timing import fake
from typer.testing import CliRunner

from infini_bench.cli.main import app
from infini_bench.config import build_config, to_dict
from infini_bench.errors import UserError
from infini_bench.report.efficiency_figure import efficiency_figure
from infini_bench.report.figures import svg
from infini_bench.report.records import read_records
from infini_bench.report.tidy import tidy
from infini_bench.run import run_eval
from infini_bench.schema import EfficiencyConfig
from infini_bench.tasks import build_task
from infini_bench.tasks.efficiency import Efficiency
from infini_bench.tasks.efficiency_model import Subject, sizes
from infini_bench.tasks.efficiency_operator import Shape, build_layer, run
from infini_bench.timing import Ceilings

CPU = torch.device("cpu")
PEER = "infini-transformer-pytorch"
SHAPE = "b1-l3-w32-h4-g2-d8-n8"


@pytest.fixture(autouse=True)
def told(monkeypatch):
    """A machine of 1 TFLOP/s and 100 GB/s, on which every call takes 2 ms."""
    monkeypatch.setattr(Efficiency, "timer", staticmethod(fake(2.0)))
    monkeypatch.setattr(Efficiency, "best", Ceilings(1e12, 1e11))


def asked(model="infini_linear", memory=None, kv_heads=2, **task):
    settings = {"lengths": ["16", "24"], "repeats": 1, "decode": 3, "chunk": 16, "seconds": 1e9, **task}
    cfg = config(model, memory, EfficiencyConfig(**settings), device="cpu")
    cfg.decoder.kv_heads = kv_heads
    return cfg


def rows_of(cfg):
    torch.manual_seed(0)
    task = build_task(cfg)
    return task.evaluate(task.build(CPU))


def test_a_model_has_times_memory_and_ratios_at_every_length():
    rows = rows_of(asked(against=["local", "full"]))
    for mode in ("forward", "train", "decode"):
        assert pick(rows, f"{mode}_ms") == [2.0, 2.0]
        each = [1, 1] if mode == "decode" else [16, 24]
        assert pick(rows, "tokens_per_s", position=mode) == [n / 2e-3 for n in each]
        assert min(pick(rows, "peak_bytes", position=mode)) > 0
        assert 0 < min(pick(rows, "percent_of_peak", position=mode)) < 100
    for metric in ("ratio_to_local_forward", "ratio_to_local_train", "ratio_to_full_forward"):
        assert pick(rows, metric) == [1.0, 1.0]
    assert pick(rows, "ratio_to_full_train") == [], "not asked"
    kernels = {row["extra"].get("attention") for row in rows if row["metric"].startswith("ratio_to_")}
    assert kernels == {"flash"}, "of a CPU"
    assert pick(rows, "state_bytes") == [4 * 3 * 2 * 8 * 9] * 2
    assert {row["extra"]["variant"] for row in rows} == {SHAPE} and {row["protocol"] for row in rows} == {
        "model"
    }
    steps = [row["n"] for row in rows if row["metric"] == "decode_ms"]
    assert steps == [3, 3]


def test_every_memory_can_be_profiled(memory):
    cfg = asked(lengths=["24"], against=[])
    cfg.memory = memory
    rows = rows_of(cfg)
    found = [pick(rows, f"{mode}_ms") for mode in ("forward", "train", "decode")]
    assert found == [[2.0]] * 3 and len(pick(rows, "state_bytes")) == 1


def test_a_training_step_changes_weights_and_reading_does_not():
    cfg = asked()
    task = build_task(cfg)
    own = Subject(task, task.build(CPU))
    before = own.model.lm_head.weight.detach().clone()
    for mode, same in (("forward", True), ("train", False)):
        own.prepare(mode)
        own.calls(mode, 16)[0]()
        assert own.model.lm_head.weight.equal(before) == same
    own.prepare("forward")
    assert own.step is None, "the optimizer's state is gone"
    own.calls("forward", 40)[0]()
    assert own.state.get_seq_length() == 40 and sizes(40, 16) == [16, 16, 8]


def test_what_takes_too_long_is_a_row_with_the_reason(monkeypatch):
    monkeypatch.setattr(Efficiency, "timer", staticmethod(fake(900.0)))
    rows = rows_of(asked(lengths=["16", "32"], seconds=1.0, modes=["forward"]))
    assert pick(rows, "forward_ms") == [900.0, None] and pick(rows, "tokens_per_s") == [16 / 0.9]
    reasons = [row["extra"]["failed"] for row in rows if row["value"] is None]
    assert reasons == ["32 tokens take at least 2 s, more than 1 s"] * 2, "the model's, and the ratio's"


def test_operations_are_those_of_the_formulas():
    cfg = asked("infini_delta", {"update": "delta"})
    task = build_task(cfg)
    own = Subject(task, task.build(CPU))
    # local: 2 T N H D; memory: 2 T D^2 (H reads, G writes, G reads of keys)
    assert [*own.attention("forward", 16)] == [2 * 16 * 8 * 4 * 8, 2 * 16 * 64 * (4 + 2 + 2)]
    inner = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    forward = own.work("forward", 16)
    assert forward.flops == 2 * (16 * inner + 256 * 32) + 3 * sum(own.attention("forward", 16))
    assert own.work("train", 16).flops == 3 * (forward.flops + 2 * 15 * 256 * 32)
    assert forward.bytes == 4 * (inner + 256 * 32)


# --- operator -------------------------------------------------------------------------------------------


def test_an_operator_has_forms_a_floor_and_full_attention():
    rows = rows_of(asked(level="operator", forms=["eager"], lengths=["16"]))
    for condition in ("local", "full", "eager"):
        assert (
            pick(rows, "forward_ms", condition=condition)
            == [2.0]
            == pick(rows, "train_ms", condition=condition)
        )
    assert pick(rows, "ratio_to_local_train", condition="eager") == [1.0]
    assert {row["extra"].get("backend", "flash") for row in rows} <= {"flash", "math"}
    assert {row["extra"]["variant"] for row in rows} == {"b1-h4-g2-d8-n8"}


def test_the_floor_is_the_fastest_backend(monkeypatch):
    monkeypatch.setattr(Efficiency, "timer", staticmethod(fake(2.0, 1.0, 9.0, 3.0)))
    task = build_task(asked(level="operator", lengths=["16"]))
    shape = Shape(task, task.build(CPU), 16)
    found = shape.fastest("local", shape.local, ["flash", "math"])
    assert [(mode, times.ms, name) for mode, (times, name) in found.items()] == [
        *(("forward", [1.0], "math"), ("train", [3.0], "math"))
    ]


def test_what_cannot_run_is_a_row_with_the_reason():
    rows = rows_of(
        asked(
            "infini_delta",
            {"update": "delta"},
            level="operator",
            forms=["triton", "compiled"],
            lengths=["1K"],
        )
    )
    failed = {
        (row["condition"], row["metric"]): row["extra"]["failed"] for row in rows if row["value"] is None
    }
    assert "memory.backend=triton cannot run" in failed["triton", "forward_ms"]
    assert failed["compiled", "train_ms"] == "a scan of more than 64 segments compiles for minutes"
    assert ("triton", "ratio_to_local_forward") in failed
    task = build_task(asked(level="operator", lengths=["16"]))
    shape = Shape(task, task.build(CPU), 16)
    assert shape.tried("forward", shape.full, (shape.q, shape.k, shape.v), "cudnn").startswith("cudnn: ")


def test_a_form_computes_the_memory_beside_the_floor():
    """With the gate closed what comes out is local attention of the embedded queries and keys."""
    task = build_task(asked(level="operator", lengths=["24"]))
    layer = build_layer(task.cfg)
    shape = Shape(task, layer, 24)
    with torch.no_grad():
        layer.memory_gate.fill_(-40.0)
        out = run(layer, shape.q, shape.k, shape.v, shape.far_q, shape.far_k)
        floor = shape.local(shape.far_q, shape.far_k, shape.v)
    torch.testing.assert_close(out, floor)
    assert shape.work["own"]["forward"].flops == 2 * 24 * 8 * 4 * 8 + 2 * 24 * 64 * (4 + 2)


@pytest.mark.parametrize(
    ("model", "lengths", "words"),
    [("full", ["16"], "use --level model"), ("infini_linear", ["20"], "20 tokens are no multiple of memory")],
)
def test_an_operator_wants_a_compressive_memory_and_whole_segments(model, lengths, words):
    with pytest.raises(UserError, match=words):
        rows_of(asked(model, level="operator", lengths=lengths))


def test_a_form_that_breaks_leaves_the_others(monkeypatch):
    def broken(*_, **__):
        raise ValueError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", lambda function, **_: broken)
    rows = rows_of(asked(level="operator", forms=["compiled", "eager"], lengths=["16"]))
    assert pick(rows, "forward_ms", condition="eager") == [2.0]
    (row,) = [row for row in rows if (row["condition"], row["metric"]) == ("compiled", "train_ms")]
    assert row["value"] is None and row["extra"]["failed"] == "ValueError: no compiler"


def test_bf16_runs_on_a_cpu_too():
    cfg = asked(against=["local"], lengths=["16"])
    cfg.trainer.precision = "bf16"
    before = torch.get_float32_matmul_precision()
    rows = rows_of(cfg)
    assert pick(rows, "ratio_to_local_forward") == [1.0] == pick(rows, "ratio_to_local_train")
    task = build_task(cfg)
    own = Subject(task, task.build(CPU))
    own.prepare("forward")
    kinds = {p.dtype for name, p in own.model.named_parameters() if ".memory." not in name}
    assert kinds == {torch.bfloat16} and own.model.memories[0].memory_gate.dtype == torch.float32
    own.prepare("train")
    assert {p.dtype for p in own.model.parameters()} == {torch.float32}
    assert torch.get_float32_matmul_precision() == before


def test_a_step_that_ran_out_of_memory_leaves_nothing_to_the_next_mode(monkeypatch):
    def full(*_):
        raise MemoryError

    task = build_task(asked("compressive"))
    own = Subject(task, task.build(CPU))
    own.prepare("train")
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(own.model.model.norm, "forward", full)
        own.calls("train", 24)[0]()
    assert own.model.memories[0].auxiliary.requires_grad, "it holds the graph"
    own.prepare("forward")
    assert [memory.auxiliary for memory in own.model.memories] == [None] * 3


# --- records, table, figure -----------------------------------------------------------------------------


def test_records_make_a_table_and_a_figure(tmp_path):
    where = {"records": str(tmp_path)}
    operator = {"level": "operator", "forms": ["eager"], "lengths": ["16", "32"]}
    for settings in ({}, {"vs": [PEER]}, operator):
        cfg = asked(kv_heads=None, **settings)
        run_eval(build_config({**to_dict(cfg), **where}), command=["x"])
    found = read_records(tmp_path)
    assert all(record.status == "done" and record.peak_bytes > 0 for record in found)
    titles, sheet = sheet_text(found, "efficiency")
    lines = [dict(zip(titles, line, strict=True)) for line in sheet.rows]
    first = next(line for line in lines if line["form"] == "model" and line["tokens"] == "16")
    assert first["forward, ms"] == "2\n[2, 2]" and first["x local, forward"] == "1\n[1, 1]"
    assert {line["model"] for line in lines} == {
        *(f"infini_linear\n{name}" for name in ("b1-l3-w32-h4-d8-n8", "b1-h4-d8-n8", PEER))
    }
    assert first["decode, tokens/s"] == "500" and first["decode, ms a token"] == "2\n[2, 2]"
    weights = {line["model"]: line["params"] for line in lines if line["form"] != "model"}
    model = next(record for record in found if record.config["task"]["level"] == "model")
    assert first["params"] == f"{model.params:,}" and weights["infini_linear\nb1-h4-d8-n8"] == "—"
    theirs = next(row["extra"]["params"] for r in found for row in r.metrics if "params" in row["extra"])
    assert weights[f"infini_linear\n{PEER}"] == f"{theirs:,}" != first["params"]
    assert "local\n(" in next(line["form"] for line in lines if line["form"].startswith("local"))
    assert "1 to 1 TFLOP/s; a copy, 100 to 100 GB/s" in sheet.caption
    rows = [row for row in tidy(found) if row["table"] == "efficiency"]
    figure = efficiency_figure(rows)
    names = {name for ax in figure.axes for name in ax.get_legend_handles_labels()[1]}
    forms = {f"infini_linear {form}" for form in ("eager", "local", "full")}
    assert names == {"infini_linear", *forms, PEER, "bound of the line of that colour"}
    drawn = [line for ax in figure.axes for line in ax.lines if len(line.get_xdata())]
    dotted = [line for line in drawn if line.get_linestyle() == ":"]
    assert len(dotted) == 3 + 2 * 3, "a bound beside each time of ours, and of each operator"
    assert all(ax.get_xscale() == ax.get_yscale() == "log" for ax in figure.axes if ax.lines)
    words = {ax.get_ylabel() for ax in figure.axes}
    assert words >= {"peak memory, forward, GiB", "peak memory, training, GiB"}
    titles = [title for ax in figure.axes if (title := ax.get_title(loc="left"))]
    assert all(f", {found[0].config['scale']}" in title for title in titles)
    assert svg("efficiency", rows).startswith("<?xml")
    ours = [
        row for row in rows if row["length"] == 16 and row["protocol"] == "model" and not row["condition"]
    ]
    lines = [line for ax in efficiency_figure(ours).axes for line in ax.lines]
    points = [line for line in lines if str(line.get_label()).startswith("bound")]
    bounds = [row["extra"]["bound_ms"] for row in ours if row["metric"].endswith("_ms")]
    assert sorted(line.get_xdata()[0] for line in points) == sorted(bounds) and len(bounds) == 3


def test_documents_beyond_1m_tokens_are_compared_with_1m():
    """Of a row: time a token, peak memory, of the longest over those of 1M; none without the two."""

    def rows(length, forward, peak, decode):
        sizes = {"length": length, "protocol": "model", "extra": {"peak_tflops": 1.0, "copy_gb_per_s": 1.0}}
        times = (("forward_ms", forward), ("decode_ms", decode))
        found = [fakes.row(metric, value, **copy.deepcopy(sizes)) for metric, value in times]
        return [*found, fakes.row("peak_bytes", peak, **copy.deepcopy(sizes), position="forward")]

    def profiled(*metrics, **settings):
        config = {"task": {"name": "efficiency"}, **settings}
        return fakes.record(metrics=[row for each in metrics for row in each], config=config)

    many, ten = rows(1 << 20, 1000.0, 4.0, 2.0), rows(10 << 20, 10500.0, 5.0, 2.5)
    titles, sheet = sheet_text([profiled(rows(1024, 1.0, 1.0, 1.0), many, ten)], "efficiency")
    grown = [dict(zip(titles, line, strict=True)) for line in sheet.rows]
    wanted = {"forward time a token, x 1M": "1.050", "forward peak memory, x 1M": "1.250"}
    wanted |= {"decode time, x 1M": "1.250"}
    for title, value in wanted.items():
        assert [line[title] for line in grown] == ["—", "—", value]
    assert "decode peak memory, x 1M" not in titles
    assert not any("x 1M" in title for title in sheet_text([profiled(many)], "efficiency")[0])
    other = profiled(many, **{"trainer.checkpoint_segments": 8})
    lines = sheet_text([profiled(many, ten), other], "efficiency")[1].rows
    assert len(lines) == 3, "activations that are recomputed are another measurement"


@pytest.mark.parametrize(
    ("key", "value"), [("level", "layer"), ("modes", []), ("forms", ["fast"]), ("against", ["xl"])]
)
def test_settings_are_checked(key, value):
    with pytest.raises(UserError, match=rf"task\.{key} must be"):
        build_config({**to_dict(asked()), "task": {"name": "efficiency", key: value}})


def test_the_command_says_what_is_profiled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["profile", "--level", "operator", "--models", "infini_delta", "--lengths", "2K,1M", "--vs", PEER]
    done = CliRunner().invoke(app, [*words, "--scale", "gpu", "--cfg", "job"])
    assert done.exit_code == 0
    shown = yaml.safe_load(done.stdout)
    task = shown["task"]
    assert (shown["model"], task["name"], task["level"]) == ("infini_delta", "efficiency", "operator")
    assert task["lengths"] == [2048, 1 << 20] and task["vs"] == [PEER]
    assert task["forms"] == ["eager", "compiled", "triton"]


def test_a_row_names_what_differs_among_runs_of_its_size(tmp_path):
    for heads, ffn, compiled in ((2, 64, False), (None, 96, False), (None, 96, True)):
        cfg = to_dict(asked(kv_heads=heads, modes=["forward"], against=[], lengths=["16"]))
        cfg["decoder"]["ffn"], cfg["trainer"]["compile"] = ffn, compiled
        run_eval(build_config({**cfg, "records": str(tmp_path)}), command=["x"])
    rows = [row for row in tidy(read_records(tmp_path)) if row["metric"] == "forward_ms"]
    assert {row["variant"] for row in rows} == {
        *(SHAPE, "b1-l3-w32-h4-d8-n8 trainer.compile=false", "b1-l3-w32-h4-d8-n8 trainer.compile=true")
    }


def test_operators_of_a_package_are_timed_beside_operators():
    done = CliRunner().invoke(
        app, ["profile", "--vs", "flash-linear-attention", "--cfg", "job", "--models", "full"]
    )
    assert done.exit_code == 0 and yaml.safe_load(done.stdout)["task"]["level"] == "operator"
