"""Plans: files of conf/plan/ become jobs."""

import inspect
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from infini_bench import plans
from infini_bench.cli.listing import list_options
from infini_bench.config import evaluated_memory
from infini_bench.errors import UserError
from infini_bench.models import build_model
from infini_bench.planned import plan
from infini_bench.plans import DATA, Plan, Setting, plan_names, read_plan
from infini_bench.report.claims import CLAIMS, FIGURE3
from infini_bench.report.records import config_hash
from infini_bench.report.tidy import NAMES, TABLES
from infini_bench.report.variants import VIEWS
from infini_bench.standing import standing
from infini_bench.tasks import build_task

LONG = ("diag_features",)  # 98 jobs, all composed in one way


@pytest.mark.parametrize("name", plan_names())
def test_every_plan_is_whole(name):
    made = read_plan(name)
    assert set(made.tasks) <= set(TABLES) and set(made.tables) <= set(NAMES)
    assert set(made.models) <= {model for model, _ in list_options("models")}
    assert dict(list_options("plans"))[name].rstrip(".").count("?") >= 1, "its first line is a question"


def test_views_are_plans():
    assert set(VIEWS) <= set(plan_names())


def needed(name, scale, folder):
    """``folder`` as --data, if the plan reads any."""
    return folder if any(DATA in word for word in read_plan(name).at(scale).words()) else None


@pytest.mark.parametrize("name", [name for name in plan_names() if name not in LONG])
@pytest.mark.parametrize("scale", ["smoke", "gpu"])
def test_every_job_composes(name, scale, tmp_path):
    made = read_plan(name).at(scale)
    jobs = plan(name, scale, tmp_path, (0,), ["infini_linear"], data=needed(name, scale, tmp_path))
    settings = [x for x in made.settings() if x.models is None or "infini_linear" in x.models]
    assert len(jobs) == len(made.tasks) * len(settings) > 0


def test_a_long_plan_composes_for_all_of_its_models(tmp_path):
    jobs = plan("diag_features", "smoke", tmp_path, None, None, only="recall memory.features=relu2")
    found = sorted((job.cfg.model, job.cfg.memory.normaliser) for job in jobs)
    linear = [("infini_linear", name) for name in ("max", "mean", "norm", "sum")]
    assert found == [("infini_delta", name) for name in ("max", "mean", "sum")] + linear


def test_settings_are_the_product_of_variants_and_grid():
    made = Plan(
        "x",
        {},
        [],
        [],
        grid={"a.b": [1, "x"], "c": [True]},
        variants={"p": ["d=1"], "q": []},
        overrides=["e=2"],
    )
    assert [(setting.name, setting.overrides) for setting in made.settings()] == [
        ("p a.b=1 c=true", ["e=2", "d=1", "a.b=1", "c=true"]),
        ("p a.b=x c=true", ["e=2", "d=1", "a.b=x", "c=true"]),
        ("q a.b=1 c=true", ["e=2", "a.b=1", "c=true"]),
        ("q a.b=x c=true", ["e=2", "a.b=x", "c=true"]),
    ]
    assert [*Plan("x", {}, [], []).settings()] == [Setting("", [])]


@pytest.fixture(scope="module")
def table2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table2")
    return plan("table2", "gpu", folder, None, None, data=folder)


def test_table2_is_one_budget_for_every_row(table2):
    names = [job.name for job in table2]
    assert len(names) == len(set(names)) == 13 * 5 + 2 * 2 + 1
    assert names[0] == "lm transformer_xl books seed 0" and names[13] == "lm transformer_xl math seed 0"
    books = [job.cfg for job in table2 if " books " in job.name]
    assert {cfg.seed for cfg in books} == {0, 1, 2}
    assert {cfg.seed for cfg in (job.cfg for job in table2) if cfg.data.name == "math"} == {0, 1}
    for cfg in (job.cfg for job in table2):
        tokens = cfg.trainer.batch * cfg.trainer.accumulate * cfg.task.sequence
        assert tokens == 65536 and cfg.memory.segment == 512 and cfg.data.vocab_size == 16384
        budget = {"books": 80e6, "math": 36e6}[cfg.data.name]
        assert tokens * cfg.trainer.steps == pytest.approx(budget, rel=1e-3)
        assert (cfg.decoder.layers, cfg.decoder.dim, cfg.decoder.heads) == (12, 512, 8)
        rate = 1e-3 if cfg.model == "rmt" else 2e-3  # each its own, from table2_lr
        assert (cfg.trainer.lr, cfg.trainer.optimizer, cfg.task.split) == (rate, "adamw", "test")
    (memorizing,) = (cfg for cfg in books if (cfg.model, cfg.seed) == ("memorizing", 0))
    assert (memorizing.memory.entries, evaluated_memory(memorizing).entries) == (16384, 65536)
    (full,) = (cfg for cfg in books if (cfg.model, cfg.seed) == ("full", 0))
    assert (evaluated_memory(full).kind, evaluated_memory(full).window) == ("sliding", full.task.sequence)
    assert [name for name in names if "sink" in name] == ["lm sink books for the stream seed 0"]
    token = [job.cfg.memory for job in table2 if job.cfg.model == "infini_delta_token"]
    assert len(token) == 5 and {(m.features, m.write_gate) for m in token} == {("relu2", True)}
    assert names[10:12] == ["lm infini_delta_token books seed 0", "lm compressive books seed 0"]
    long = [job.cfg for job in table2 if "long" in job.name]
    assert {(cfg.model, cfg.task.sequence) for cfg in long} == {
        ("infini_linear", 32768),
        ("infini_delta", 32768),
    }


def test_language_models_of_the_views_are_those_of_figure_3(tmp_path):
    """What two plans have in common is trained once, and nothing but the memory differs."""
    names, own = ("figure3", "diag_gates", "diag_local"), {}
    made = {name: plan(name, "gpu", tmp_path, (0,), ["infini_delta"], data=tmp_path) for name in names}
    for name, jobs in made.items():
        own[name] = {config_hash(asdict(job.cfg)) for job in jobs if job.cfg.task.name == "lm"}
    assert [len(hashes) for hashes in own.values()] == [6, 7, 5]
    assert len(own["figure3"] & own["diag_gates"]) == 2, "even and split start"
    assert len(own["figure3"] & own["diag_local"]) == 1 == len(own["diag_gates"] & own["diag_local"])
    recall = [job.cfg for jobs in made.values() for job in jobs if job.cfg.task.name == "recall"]
    assert {(cfg.data.name, cfg.trainer.steps, cfg.task.trials) for cfg in recall} == {("books", 1000, 134)}
    assert read_plan("diag_local").scales == read_plan("diag_gates").scales != {}, "named, not repeated"


def sizes(jobs) -> dict[str, int]:
    """Parameters without embeddings, by model."""
    found = {}
    for job in jobs:
        with torch.device("meta"):
            model = build_model(job.cfg.decoder, job.cfg.memory, job.cfg.data.vocab_size)
        found[job.cfg.model] = sum(p.numel() for p in model.parameters()) - 16384 * 512
    return found


def test_nothing_written_is_exactly_nothing(tmp_path):
    jobs = plan("diag_gates", "smoke", tmp_path, None, ["infini_delta"], only="lm nothing written")
    (memory,) = (job.cfg.memory for job in jobs)
    for start, written in ((memory.write_start, False), (-30.0, True)):
        memory = replace(memory, write_start=start)
        (layer, *_) = build_model(jobs[0].cfg.decoder, memory, 512).memories
        strength = layer.strength(torch.randn(3, layer.kv_heads, layer.head_dim))
        (slope,) = torch.autograd.grad(strength.sum(), layer.memory_write)
        assert bool(strength.any()) == bool(slope.any()) == written


def test_table2_models_have_equal_parameters(table2):
    found = sizes([job for job in table2 if {"books", "0"} <= set(job.name.split())])
    assert len(found) == 14 and max(found.values()) / min(found.values()) < 1.02
    assert found["infini_linear"] == pytest.approx(38e6, rel=0.01)


def test_a_sweep_of_rates_has_the_models_of_table2_on_validation(tmp_path):
    jobs = plan("table2_lr", "gpu", tmp_path, None, None, data=tmp_path)
    assert read_plan("table2_lr").at("gpu").models == read_plan("table2").at("gpu").models
    assert len(jobs) == 13 * 3 and {job.cfg.trainer.lr for job in jobs} == {1e-3, 2e-3, 4e-3}
    for cfg in (job.cfg for job in jobs):
        assert cfg.trainer.steps * cfg.trainer.batch * cfg.task.sequence == 19_660_800
        assert (cfg.task.split, cfg.decoder.ffn, cfg.precision) in [
            ("validation", ffn, "float32") for ffn in (2048, 1872)
        ]
    found = sizes(jobs[:13])
    assert len(found) == 13 and max(found.values()) / min(found.values()) < 1.02


@pytest.mark.parametrize("scale", ["gpu", "laptop", "smoke"])
@pytest.mark.parametrize("name", ["table3_hard", "diag_mqar"])
def test_rivals_have_equal_parameters_outside_table_2_too(name, scale, tmp_path):
    sizes = {}
    for job in plan(name, scale, tmp_path, None, None, data=needed(name, scale, tmp_path)):
        words = build_task(job.cfg).tokenizer.vocab_size if name == "diag_mqar" else job.cfg.data.vocab_size
        with torch.device("meta"):
            model = build_model(job.cfg.decoder, job.cfg.memory, words)
        sizes[job.cfg.model] = sum(p.numel() for p in model.parameters())
    assert {"armt", "rmt", "infini_linear"} <= set(sizes)
    assert max(sizes.values()) / min(sizes.values()) < 1.02


def test_settings_of_some_models_seeds_and_scales(tmp_path, monkeypatch):
    made = Plan(
        "x",
        {"lm": []},
        ["full", "rmt"],
        [],
        variants={"a": [], "b": {"overrides": ["data=local", "data.path={data}/it's"], "models": ["rmt"]}},
        each={"rmt": ["memory.tokens=3"]},
        seeds=[0, 2],
        scales={"gpu": {"models": ["rmt"]}},
    )
    monkeypatch.setattr("infini_bench.planned.read_plan", lambda name: made)
    with pytest.raises(UserError, match="--data FOLDER"):
        plan("x", "smoke", tmp_path, None, None)
    with pytest.raises(UserError, match=r"gone is no folder\."):
        plan("x", "smoke", tmp_path, None, None, data=tmp_path / "gone")
    monkeypatch.setattr("infini_bench.planned.read_plan", lambda name: replace(made, variants={}))
    with pytest.raises(UserError, match=r"x at scale=smoke reads no sets of yours; leave --data out\."):
        plan("x", "smoke", tmp_path, None, None, data=tmp_path)
    monkeypatch.setattr("infini_bench.planned.read_plan", lambda name: made)
    jobs = plan("x", "smoke", tmp_path, None, None, data=tmp_path)
    assert [job.name for job in jobs] == [
        *("lm full a seed 0", "lm rmt a seed 0", "lm rmt b seed 0"),
        *("lm full a seed 2", "lm rmt a seed 2", "lm rmt b seed 2"),
    ]
    assert [job.cfg.memory.tokens for job in jobs[:3]] == [16, 3, 3]
    assert jobs[2].cfg.data.path == f"{tmp_path}/it's"
    assert {job.cfg.model for job in plan("x", "gpu", tmp_path, (2, 7), None, data=tmp_path)} == {"rmt"}
    assert len(plan("x", "smoke", tmp_path, None, None, data=tmp_path, only="rmt 2")) == 2
    with pytest.raises(UserError, match=r'No run of x has "rmtt" in its name \(did you mean "rmt"\?\)'):
        plan("x", "smoke", tmp_path, None, None, data=tmp_path, only="rmtt 2")


def test_jobs_of_a_grid_have_names_and_logs_of_their_own(tmp_path, monkeypatch):
    made = Plan(
        "x", {"recall": ["task.trials=5"], "lm": []}, ["full"], [], {"memory.features": ["elu1", "exp"]}
    )
    monkeypatch.setattr("infini_bench.planned.read_plan", lambda name: made)
    jobs = plan("x", "smoke", tmp_path, (0, 1), ["full"], ["trainer.steps=9"])
    assert len(jobs) == 8 == len({job.name for job in jobs}) == len({job.log for job in jobs})
    first = jobs[0]
    assert first.name == "recall full memory.features=elu1 seed 0"
    assert first.log.name == "recall-full-memory.features=elu1-seed0.txt"
    assert first.settings[5:] == ["task.trials=5", "memory.features=elu1", "trainer.steps=9", "seed=0"]
    assert (first.cfg.task.trials, first.cfg.memory.features, first.cfg.trainer.steps) == (5, "elu1", 9)


def test_a_setting_of_one_task_fits_a_plan_of_two_when_only_that_is_run(tmp_path):
    asked = ("diag_gates", "smoke", tmp_path, None, ["infini_linear"], ["task.max_documents=2"])
    with pytest.raises(UserError, match=r"task.max_documents belongs to task=lm"):
        plan(*asked)
    assert {job.cfg.task.max_documents for job in plan(*asked, only="lm frozen")} == {2}


def test_all_models_means_every_file(tmp_path, monkeypatch):
    for path in ("plan/p.yaml", "model/a.yaml", "model/b.yaml"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("tasks: {lm: []}\nmodels: all\ntables: [table2_lm]\n")
    monkeypatch.setattr(plans, "CONF", tmp_path)
    assert read_plan("p").models == ["a", "b"]
    (tmp_path / "plan/r.yaml").write_text("tasks: {}\nmodels: []\ntables: []\nsead: 3\n")
    with pytest.raises(UserError, match='"sead"'):
        read_plan("r")
    with pytest.raises(UserError, match=r'There is no "q" to reproduce; choose one of p'):
        read_plan("q")


def test_table3_trains_the_model_that_ships_on_a_gpu_beside_the_others(tmp_path):
    chosen = ["infini_linear", "infini_delta"]
    jobs = {scale: plan("table3", scale, tmp_path, [0], chosen) for scale in ("laptop", "gpu")}
    assert [job.name for job in jobs["laptop"]] == [f"passkey {name} seed 0" for name in chosen]
    *_, last = jobs["gpu"]
    assert len(jobs["gpu"]) == 3 and last.name == "passkey infini_delta the model that ships seed 0"
    cfg = last.cfg
    assert (cfg.decoder.layers, cfg.decoder.dim, cfg.memory.features) == (2, 128, "relu2")
    assert (cfg.task.own_segment, cfg.task.trials) == (0, 80) and "end" in cfg.task.depths
    assert not cfg.task.train_any_alignment, "as the shipped one was trained"
    assert "experiment=passkey_small" in last.settings and cfg.runs == str(tmp_path / "runs")
    assert len(plan("table3", "gpu", tmp_path, [0], ["infini_linear"])) == 1


@pytest.fixture(scope="module")
def table4(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table4")
    words = ["base.model=small.gguf", "pretrain.trainer.lr=2e-4"]
    return folder, plan("table4", "gpu", folder, None, None, words, data=folder)


def test_table4_teaches_one_pretrained_model_with_and_without_a_memory(table4):
    """Alike in all that `report.compare` asks for before it sets them beside one another."""
    folder, jobs = table4
    adapted = [job for job in jobs if "adapted" in job.name]
    controls = [job for job in jobs if job not in adapted]
    assert sorted((job.cfg.task.protocol, job.cfg.model) for job in adapted if job.stages) == [
        (protocol, model)
        for protocol in ("prefix", "whole_book")
        for model in ("infini_delta", "infini_delta_token", "infini_linear")
    ]
    assert len(controls) == 9 and all(job.cfg.model in job.name for job in controls)
    assert all(job.cfg.model.startswith("smollm2_") for job in controls)
    alike = {
        (
            *(cfg.base.model, cfg.data.tokenizer, cfg.data.path, cfg.scale, cfg.trainer.steps),
            *(cfg.trainer.batch, cfg.task.train_kind, cfg.task.samples, cfg.task.max_new_tokens),
        )
        for cfg in (job.cfg for job in jobs)
    }
    assert alike == {
        ("small.gguf", "small.gguf", str(folder / "booksum"), "gpu", 200, 1, "wikipedia", 3, 1024)
    }
    assert adapted[0].cfg.memory.features == "relu2" and "16K" in adapted[0].cfg.task.lengths
    assert {job.cfg.task.batch for job in adapted} == {10, 20}
    assert [job.name for job in adapted if job.cfg.task.batch == 20] == [
        "booksum infini_delta_token adapted at once seed 0"
    ]
    longest = {job.cfg.model: job.cfg.task.input_tokens for job in controls}
    assert longest["smollm2_1k_unlimiformer"] == longest["smollm2_4k_unlimiformer"] == 65536


def test_table4_pretrains_models_with_and_without_a_memory_alike(table4):
    folder, jobs = table4
    assert [(job.cfg.model, len(job.stages)) for job in jobs[:11]] == [
        *[("infini_delta_token", 1), ("smollm2_4k", 1), ("smollm2_1k", 1), ("infini_linear", 1)],
        *[("infini_delta", 1), ("infini_delta_token", 1), ("infini_linear", 1), ("infini_delta", 1)],
        *[("infini_delta_token", 0), ("smollm2_4k", 0), ("smollm2_1k", 0)],
    ]
    assert {(job.cfg.trainer.lr, len(job.stages)) for job in jobs[11:]} == {(1e-4, 0)}
    stages = [stage.cfg for job in jobs for stage in job.stages]
    assert len({config_hash(asdict(cfg)) for cfg in stages}) == 5, "one of each model"
    for cfg in stages:
        steps = cfg.trainer
        assert (steps.steps, steps.batch, cfg.task.sequence, steps.accumulate) == (300, 2, 32768, 1)
        assert (cfg.data.path, cfg.data.name, steps.lr) == (str(folder / "books"), "books", 2e-4)
        kept = steps.checkpoint_segments * cfg.memory.segment
        assert 15_000 < kept <= 16_384, "activations of as many tokens, whatever a segment is"
    kinds = {(cfg.model, cfg.memory.kind, cfg.memory.segment) for cfg in stages}
    assert {kind for kind in kinds if kind[0] == "local_block"} == {
        ("local_block", "block", 5248),
        ("local_block", "block", 2176),
    }


@pytest.mark.parametrize(
    ("name", "only", "runs"),
    [("diag_recall", "armt", 3), ("diag_features", "recall norm memory.features=exp", 1)],
)
def test_what_was_trained_by_hand_before_the_plan_was_is_done(name, only, runs, tmp_path):
    """Records that lack younger settings, lay elsewhere, and were asked over other distances."""
    jobs = plan(name, "gpu", Path("results"), None, None, data=tmp_path, only=only)
    assert [each.state for each in standing(jobs)] == ["done"] * runs
    jobs = plan(name, "gpu", Path("results"), None, None, ["trainer.warmup=51"], data=tmp_path, only=only)
    assert [each.state for each in standing(jobs)] == ["missing"] * runs


def test_figure3_has_the_seeds_that_its_claims_need():
    rules = [claim.rule for claim in CLAIMS if claim.remark == FIGURE3]
    needed = {inspect.getclosurevars(rule).nonlocals["seeds"] for rule in rules}
    assert needed == {len(read_plan("figure3").at("gpu").seeds)} == {2}
