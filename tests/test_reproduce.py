"""Plans, jobs side by side, failures and the demo's verdict, with training and evaluation made up."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from report_fakes import booksum, lm, passkey

from infini_bench import reproduce as module
from infini_bench.cli import bridge
from infini_bench.errors import UserError
from infini_bench.planned import plan
from infini_bench.progress import NullProgress
from infini_bench.report.records import KILLED, config_hash, find_done, read_records, write_record
from infini_bench.reproduce import reproduce
from infini_bench.schema import RunConfig
from infini_bench.standing import standing, standing_json, standing_text

MODELS = ("infini_linear", "infini_delta", "transformer_xl", "local_block")
PLACES = ("records=", "runs=")
EVALUATIONS = {"lm": lm, "passkey": passkey, "booksum": booksum}


# --- plans ----------------------------------------------------------------------------------------------


def test_the_demo_is_three_tasks_of_four_models(tmp_path):
    jobs = plan("demo", "laptop", tmp_path, (0,), MODELS)
    assert [job.name for job in jobs[:5]] == [
        *(f"passkey {model} seed 0" for model in MODELS),
        "lm infini_linear seed 0",
    ]
    assert len(jobs) == 12
    cfg = jobs[0].cfg
    assert (cfg.model, cfg.task.name, cfg.scale) == ("infini_linear", "passkey", "laptop")
    assert (cfg.records, cfg.runs) == (str(tmp_path / "records"), str(tmp_path / "runs"))


def test_seeds_and_settings_reach_the_jobs(tmp_path):
    jobs = plan("table2", "smoke", tmp_path, (0, 3), ("full",), ["trainer.steps=7"])
    assert [(job.cfg.seed, job.cfg.trainer.steps, job.cfg.model) for job in jobs] == [
        (0, 7, "full"),
        (3, 7, "full"),
    ]
    assert jobs[1].settings[-2:] == ["trainer.steps=7", "seed=3"]


@pytest.mark.parametrize(
    ("what", "scale", "models", "says"),
    [
        ("table22", "laptop", MODELS, 'did you mean "table2"'),
        ("table2", "labtop", MODELS, "labtop"),
        ("table2", "laptop", ("infini_linaer",), 'did you mean "infini_linear"'),
    ],
)
def test_what_does_not_exist_is_told_before_anything_runs(tmp_path, what, scale, models, says):
    with pytest.raises(UserError, match=says):
        plan(what, scale, tmp_path, (0,), models)


def test_seeds_are_read_from_text():
    assert module.parse_seeds("0, 3,12") == [0, 3, 12]
    for wrong in ("", "1,,2", "-1", "a", "1,1", "1.5"):
        with pytest.raises(UserError, match="no list of seeds"):
            module.parse_seeds(wrong)


# --- the whole ------------------------------------------------------------------------------------------


REAL_COMPOSE = bridge.compose_run


@cache
def composed(words: tuple[str, ...]) -> RunConfig:
    return REAL_COMPOSE(words)


def compose_quickly(words: list[str]) -> RunConfig:
    """As the bridge, but each run is composed once for all tests."""
    places = dict(word.split("=") for word in words if word.startswith(PLACES))
    return replace(composed(tuple(word for word in words if not word.startswith(PLACES))), **places)


@pytest.fixture
def calls(monkeypatch):
    """`infini_bench.run` made up: writes records as the real one; (model, task) in ``broken`` fail."""
    log = SimpleNamespace(trained=[], evaluated=[], resumed=[], commands=[], broken=set(), weak=set())

    def record_of(kind, cfg, made):
        config = asdict(cfg)
        made.config, made.config_hash, made.kind = config, config_hash(config), kind
        made.id = f"{kind}-{cfg.task.name}-{cfg.model}-{cfg.seed}"
        return made

    def run_train(cfg, *, command, progress):
        if done := None if cfg.force else find_done(cfg.records, "train", config_hash(asdict(cfg))):
            return done
        if (cfg.model, cfg.task.name) in log.broken:
            raise ValueError("the loss is no number")
        log.commands.append(command)
        (log.resumed if cfg.resume else log.trained).append(cfg.model)
        with progress.task("training", 10) as bar:
            bar.advance(10)
        made = record_of("train", replace(cfg, resume=None), EVALUATIONS[cfg.task.name]())
        folder = Path(cfg.resume or Path(cfg.runs) / made.id)
        folder.mkdir(parents=True, exist_ok=True)
        made.train = {"folder": str(folder)}
        write_record(cfg.records, made)
        return made

    def run_eval(cfg, *, command, progress):
        assert Path(cfg.checkpoint).is_dir()
        log.commands.append(command)
        log.evaluated.append(cfg.model)
        options = {"on": 50.0} if cfg.model in log.weak and cfg.task.name == "passkey" else {}
        made = record_of("eval", cfg, EVALUATIONS[cfg.task.name](cfg.model, **options))
        made.train["config_hash"] = config_hash(asdict(cfg))
        write_record(cfg.records, made)
        return made

    monkeypatch.setattr(bridge, "compose_run", compose_quickly)
    monkeypatch.setitem(
        sys.modules, "infini_bench.run", SimpleNamespace(run_train=run_train, run_eval=run_eval)
    )
    return log


def demo(out, **options) -> int:
    return reproduce("demo", scale="smoke", out=out, jobs=1, progress=NullProgress(), **options)


def test_the_demo_prints_tables_checks_and_times(tmp_path, calls, capsys):
    assert demo(tmp_path) == 0
    shown = capsys.readouterr().out
    assert all(shown.count(f"Table {n}:") == 1 for n in (2, 3, 4))
    assert "16 of 16 checks passed." in shown
    assert "12 jobs, 1 at a time" in shown and "s of training and" in shown and "256 MiB" in shown
    assert (tmp_path / "tables" / "table2_lm.csv").exists()
    assert not (tmp_path / "logs").exists()
    assert len(read_records(tmp_path / "records")) == 24


def test_commands_are_recorded_as_one_would_type_them(tmp_path, calls):
    reproduce("table2", scale="smoke", out=tmp_path, jobs=1, models=("full",), progress=NullProgress())
    places = ["scale=smoke", f"records={tmp_path}/records", f"runs={tmp_path}/runs", "seed=0"]
    folder = f"{tmp_path}/runs/train-lm-full-0"
    assert calls.commands == [
        ["infini-bench", "train", "model=full", "task=lm", *places],
        ["infini-bench", "eval", "lm", f"--checkpoint={folder}", *places],
    ]


def test_a_demo_that_does_not_show_it_is_exit_code_1(tmp_path, calls, capsys):
    calls.weak.add("infini_delta")
    assert demo(tmp_path) == 1
    shown = capsys.readouterr().out
    assert "MISS infini_delta, 512 tokens, start (8 segments back): 50 %, at least 80 %" in shown
    assert "12 of 16 checks passed." in shown


def test_failures_are_listed_and_the_rest_goes_on(tmp_path, calls, capsys):
    calls.broken.add(("transformer_xl", "lm"))
    assert demo(tmp_path) == 1
    shown = capsys.readouterr().out
    assert "failed: lm transformer_xl seed 0: ValueError: the loss is no number" in shown
    assert len(calls.evaluated) == 11
    assert "Traceback" in (tmp_path / "logs" / "lm-transformer_xl-seed0.txt").read_text()


def test_a_second_run_trains_nothing_unless_a_run_folder_is_gone(tmp_path, calls):
    demo(tmp_path)
    (tmp_path / "runs" / "train-lm-local_block-0").rmdir()
    calls.trained.clear()
    demo(tmp_path)
    assert calls.trained == ["local_block"]


def test_other_settings_in_the_folder_are_not_judged(tmp_path, calls, capsys):
    calls.weak.add("infini_linear")
    assert demo(tmp_path) == 1
    calls.weak.clear()
    assert demo(tmp_path, overrides=["trainer.lr=0.01"]) == 0
    assert "trainer.lr" not in capsys.readouterr().out


def test_a_model_of_one_variant_alone_is_run(tmp_path, calls):
    (tmp_path / "books").mkdir()
    options = {"data": tmp_path, "only": "sink", "jobs": 1, "progress": NullProgress()}
    assert reproduce("table2", scale="gpu", out=tmp_path / "out", **options) == 0
    assert calls.trained == ["sink"]


def test_an_interrupted_training_goes_on(tmp_path, calls):
    job = plan("table2", "smoke", tmp_path, (0,), ("full",))[0]
    digest, folder = config_hash(asdict(job.cfg)), tmp_path / "runs" / "cut"
    folder.mkdir(parents=True)
    cut = lm("full", kind="train", status="interrupted", config_hash=digest, train={"folder": str(folder)})
    write_record(tmp_path / "records", cut)
    reproduce("table2", scale="smoke", out=tmp_path, jobs=1, models=("full",), progress=NullProgress())
    assert calls.resumed == ["full"] and calls.trained == []


def test_a_killed_training_goes_on_from_its_checkpoint(tmp_path, calls):
    job = plan("table2", "smoke", tmp_path, (0,), ("full",))[0]
    digest, folder = config_hash(asdict(job.cfg)), tmp_path / "runs" / "cut"
    folder.mkdir(parents=True)
    changes = {"status": "failed", "error": KILLED, "train": {"folder": str(folder)}}
    write_record(tmp_path / "records", lm("full", kind="train", config_hash=digest, **changes))
    options = {"scale": "smoke", "jobs": 1, "models": ("full",), "progress": NullProgress()}
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "index.json").write_text("{}")
    reproduce("table2", out=tmp_path, **options)
    assert calls.resumed == ["full"] and calls.trained == []


def test_what_is_missing_is_known_and_the_next_of_it_runs(tmp_path, calls, capsys):
    options = {"scale": "smoke", "jobs": 1, "models": ("full", "rmt", "sink"), "progress": NullProgress()}
    calls.broken.add(("rmt", "lm"))
    assert reproduce("table2", out=tmp_path, following=1, **options) == 0
    assert calls.trained == ["full"] == calls.evaluated
    assert reproduce("table2", out=tmp_path, following=2, **options) == 1
    assert calls.trained == ["full", "sink"]
    found = standing(plan("table2", "smoke", tmp_path, None, options["models"]))
    assert [(each.job.cfg.model, each.state) for each in found] == [
        ("full", "done"),
        ("rmt", "missing"),
        ("sink", "done"),
    ]
    assert found[0].seconds == 4.0 and sorted(found[0].records) == ["eval-lm-full-0", "train-lm-full-0"]
    text = standing_text(found)
    assert "| lm rmt seed 0 | missing | 0 |" in text and "2 of 3 runs are done." in text
    rest = standing_text(found, every=False)
    assert rest.count("seed 0") == 1 and "2 of 3 runs are done." in rest
    lines = [json.loads(line) for line in standing_json(found).splitlines()]
    assert [line["state"] for line in lines] == ["done", "missing", "done"]
    assert lines[1]["settings"][:2] == ["model=rmt", "task=lm"]
    calls.broken.clear()
    assert reproduce("table2", out=tmp_path, following=5, **options) == 0
    assert reproduce("table2", out=tmp_path, following=5, **options) == 0
    assert "Nothing of table2 is missing" in capsys.readouterr().out
    with pytest.raises(UserError, match='has "math" in its name'):
        reproduce("table2", out=tmp_path, only="math", **options)


def test_of_repeated_trainings_the_newest_is_gone_on_with(tmp_path, calls):
    job = plan("table4", "smoke", tmp_path, (0,), ("infini_linear",), [])[0]
    folder = tmp_path / "runs" / "there"
    folder.mkdir(parents=True)
    for day, place in ((1, "gone"), (2, "there")):
        own = {"id": place, "config_hash": config_hash(asdict(job.cfg)), "started": f"2026-01-0{day}"}
        train = {"folder": str(tmp_path / "runs" / place)}
        write_record(tmp_path / "records", booksum(kind="train", train=train, **own))
    options = {"scale": "smoke", "jobs": 1, "models": ("infini_linear",), "progress": NullProgress()}
    assert reproduce("table4", out=tmp_path, **options) == 0
    assert calls.trained == [] and f"--checkpoint={folder}" in calls.commands[0]
    folder.rmdir()
    assert reproduce("table4", out=tmp_path, **options) == 0
    assert calls.trained == ["infini_linear"]


def test_only_what_is_asked_of_a_training_ends_its_job(tmp_path):
    (job,) = plan("table4", "smoke", tmp_path, (0,), ("infini_linear",), [])
    trained = booksum(kind="train", id="t", config_hash=config_hash(asdict(job.cfg)), train={"folder": "t"})
    write_record(tmp_path / "records", trained)
    origin = {"config_hash": trained.config_hash}
    for made, state in (
        (booksum(config={"task": {"name": "booksum", "split": "validation"}}), "trained"),
        (lm(config={"task": {"name": "lm", "split": "validation"}}), "trained"),
        (booksum(config={"task": {"name": "booksum", "split": "test", "samples": 2}}), "done"),
    ):
        write_record(tmp_path / "records", replace(made, train=origin))
        assert [each.state for each in standing([job])] == [state]


def test_a_run_on_a_pretrained_model_is_known_by_all_but_its_architecture(tmp_path, calls):
    words = ["base.model=small.gguf", "task.train_kind=wikipedia"]
    jobs = plan("table4", "smoke", tmp_path, (0,), ("infini_linear", "infini_delta"), words)
    cfg = replace(jobs[0].cfg, decoder=replace(jobs[0].cfg.decoder, layers=30))
    digest, folder = config_hash(asdict(cfg)), tmp_path / "runs" / "cut"
    folder.mkdir(parents=True)
    own = {"config": asdict(cfg), "config_hash": digest, "train": {"folder": str(folder)}}
    write_record(tmp_path / "records", booksum(kind="train", status="interrupted", **own))
    options = {"jobs": 1, "models": ("infini_linear", "infini_delta"), "progress": NullProgress()}
    reproduce("table4", "smoke", tmp_path, overrides=words, **options)
    assert calls.resumed == ["infini_linear"] and calls.trained == ["infini_delta"]
    write_record(tmp_path / "other", booksum(kind="train", **own))
    write_record(tmp_path / "other", booksum(train={"config_hash": digest}))
    jobs = [replace(job, cfg=replace(job.cfg, records=str(tmp_path / "other"))) for job in jobs]
    assert [each.state for each in standing(jobs)] == ["done", "missing"]


def test_what_failed_before_any_work_is_told_where_nothing_is_recorded(tmp_path, calls, monkeypatch, capsys):
    def refused(cfg, **options):
        raise UserError("The data set is not there.")

    monkeypatch.setattr(sys.modules["infini_bench.run"], "run_train", refused)
    options = {"scale": "smoke", "jobs": 1, "models": ("infini_linear",), "progress": NullProgress()}
    assert reproduce("table4", out=tmp_path, **options) == 1
    assert "failed: booksum infini_linear seed 0: The data set is not there." in capsys.readouterr().out


def test_ctrl_c_stops_all(tmp_path, calls, monkeypatch):
    def stopped(cfg, **options):
        return SimpleNamespace(status="interrupted", started="")

    monkeypatch.setattr(sys.modules["infini_bench.run"], "run_train", stopped)
    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path)
    assert calls.evaluated == []


def test_only_the_demo_is_judged(tmp_path, calls, capsys):
    calls.weak.add("infini_linear")
    assert reproduce("table3", scale="smoke", out=tmp_path, jobs=1, progress=NullProgress()) == 0
    shown = capsys.readouterr().out
    assert "Table 3:" in shown and "Table 2:" not in shown and "checks" not in shown


def test_no_plan_writes_into_the_committed_results():
    assert module.default_folder("demo") == Path("runs/demo")


def test_what_is_recorded_as_done_stays_done(tmp_path, monkeypatch):
    """Else a setting that is added to the schema has all that was run on a GPU run again."""
    results = Path(__file__).parents[1] / "results"
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    models = ["infini_linear", "infini_delta", "transformer_xl"]
    jobs = plan("table2", "gpu", results, [0], models, data=Path("data"), only="books")
    found = {each.job.name: each.state for each in standing(jobs)}
    assert found == {f"lm {model} books seed 0": "done" for model in models}
    models = ["rmt", "armt", "infini_delta_token"]
    needles = standing(plan("table3_hard", "gpu", results, [0], models, data=Path("data")))
    assert [each.state for each in needles] == ["done"] * 3
    base = "base.model=SmolLM2-135M-Instruct.Q4_1.gguf"
    before = ["trainer.steps=400", "trainer.best=false", "trainer.validate_every=null"]  # as it was recorded
    options = {"overrides": [base, *before], "data": Path("data")}
    for name in ("adapted at once", "smollm2_1k"):
        jobs = plan("table4", "gpu", results, [0], None, only=name, **options)
        assert [each.state for each in standing(jobs) if not each.job.stages] == ["done"]


def test_data_are_known_by_their_name_wherever_they_lie(tmp_path, monkeypatch):
    results = Path(__file__).parents[1] / "results"  # recorded with data/books
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def state(data, *words):
        jobs = plan("table2", "gpu", results, [0], ["infini_delta"], words, Path(data), "books")
        return [each.state for each in standing(jobs)]

    Path("../there/books").mkdir(parents=True)
    assert state("../there") == state(tmp_path / "there") == ["done"]
    Path("data/books").mkdir(parents=True)
    assert state("../there") == ["missing"]  # both are here, so they are two sets
    assert state(Path("data").absolute()) == state("data") == ["done"]
    assert state("data", "data.path=elsewhere/books") == ["done"]
    assert state("data", "data.path=elsewhere/novels") == ["missing"]
