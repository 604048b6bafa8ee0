"""Plans: files of conf/plan/ become jobs."""

import pytest

from infini_bench import plans
from infini_bench.cli.listing import list_options
from infini_bench.errors import UserError
from infini_bench.plans import Plan, plan_names, read_plan
from infini_bench.report.tidy import NAMES, TABLES, VIEWS
from infini_bench.reproduce import plan

# Plans of settings that no released memory has yet are data only: what they vary must not exist by accident.
FUTURE = ("diag_features", "diag_gates", "diag_local")


@pytest.mark.parametrize("name", plan_names())
def test_every_plan_is_whole(name):
    made = read_plan(name)
    assert set(made.tasks) <= set(TABLES) and set(made.tables) <= set(NAMES)
    assert set(made.models) <= {model for model, _ in list_options("models")}
    assert dict(list_options("plans"))[name].rstrip(".").count("?") >= 1, "its first line is a question"


def test_views_are_plans():
    assert set(VIEWS) <= set(plan_names())


@pytest.mark.parametrize("name", [name for name in plan_names() if name not in FUTURE])
@pytest.mark.parametrize("scale", ["smoke", "gpu"])
def test_every_job_composes(name, scale, tmp_path):
    made = read_plan(name)
    jobs = plan(name, scale, tmp_path, (0,), made.models[:1])
    assert len(jobs) == len(made.tasks) * len([*made.settings()])


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
    assert [*made.settings()] == [
        ("p a.b=1 c=true", ["e=2", "d=1", "a.b=1", "c=true"]),
        ("p a.b=x c=true", ["e=2", "d=1", "a.b=x", "c=true"]),
        ("q a.b=1 c=true", ["e=2", "a.b=1", "c=true"]),
        ("q a.b=x c=true", ["e=2", "a.b=x", "c=true"]),
    ]
    assert [*Plan("x", {}, [], []).settings()] == [("", [])]


def test_jobs_of_a_grid_have_names_and_logs_of_their_own(tmp_path, monkeypatch):
    made = Plan(
        "x", {"recall": ["task.trials=5"], "lm": []}, ["full"], [], {"memory.features": ["elu1", "exp"]}
    )
    monkeypatch.setattr("infini_bench.reproduce.read_plan", lambda name: made)
    jobs = plan("x", "smoke", tmp_path, (0, 1), ["full"], ["trainer.steps=9"])
    assert len(jobs) == 8 == len({job.name for job in jobs}) == len({job.log for job in jobs})
    first = jobs[0]
    assert first.name == "recall full memory.features=elu1 seed 0"
    assert first.log.name == "recall-full-memory.features=elu1-seed0.txt"
    assert first.settings[5:] == ["task.trials=5", "memory.features=elu1", "trainer.steps=9", "seed=0"]
    assert (first.cfg.task.trials, first.cfg.memory.features, first.cfg.trainer.steps) == (5, "elu1", 9)


def test_all_models_means_every_file(tmp_path, monkeypatch):
    for path in ("plan/p.yaml", "model/a.yaml", "model/b.yaml"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("tasks: {lm: []}\nmodels: all\ntables: [table2_lm]\n")
    monkeypatch.setattr(plans, "CONF", tmp_path)
    assert read_plan("p").models == ["a", "b"]
    with pytest.raises(UserError, match=r'There is no "q" to reproduce; choose one of p\.'):
        read_plan("q")


def test_table3_trains_the_model_that_ships_on_a_gpu_beside_the_others(tmp_path):
    chosen = ["infini_linear", "infini_delta"]
    jobs = {scale: plan("table3", scale, tmp_path, [0], chosen) for scale in ("laptop", "gpu")}
    assert [job.name for job in jobs["laptop"]] == [f"passkey {name} seed 0" for name in chosen]
    *_, last = jobs["gpu"]
    assert len(jobs["gpu"]) == 3 and last.name == "passkey infini_delta the model that ships seed 0"
    cfg = last.cfg
    assert (cfg.decoder.layers, cfg.decoder.dim, cfg.memory.features) == (2, 128, "relu2")
    assert (cfg.task.own_segment, cfg.task.trials) == (0.2, 80) and "end" in cfg.task.depths
    assert "experiment=passkey_small" in last.settings and cfg.runs == str(tmp_path / "runs")
    assert len(plan("table3", "gpu", tmp_path, [0], ["infini_linear"])) == 1
