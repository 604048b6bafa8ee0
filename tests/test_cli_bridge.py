"""Overrides from the command line to a checked configuration, one run or a sweep, and completion."""

from __future__ import annotations

import os
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from infini_bench.cli import jobs, main
from infini_bench.cli.bridge import complete, compose_run, expand, launch, quote, search_path
from infini_bench.errors import UserError

FAST = settings(deadline=None, max_examples=30)
LOCAL = ["local_block", "local_kernel", "local_sliding", "local_sparse"]
ASKED = ["booksum", "capacity", "efficiency", "footprint", "lm", "mqar", "needles", "passkey", "reach"]
ASKED += ["recall"]


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Jobs that only remember what they were asked; seed 1 fails, seed 2 fails by the user's fault."""
    seen: list[jobs.Job] = []

    def run(job):
        seen.append(job)
        if job.cfg.seed == 1:
            raise ValueError("no luck")
        if job.cfg.seed == 2:
            raise UserError("No such data.")
        if job.cfg.seed == 3:
            raise KeyboardInterrupt
        return type("Record", (), {"id": f"seed-{job.cfg.seed}"})

    monkeypatch.setattr(jobs.Job, "run", run)
    monkeypatch.chdir(tmp_path)
    return seen


def invoke(*arguments: str):
    return CliRunner().invoke(main.app, [*arguments])


# --- overrides ------------------------------------------------------------------------------------------


@FAST
@given(st.text(max_size=30).filter(lambda text: "\0" not in text))
def test_any_text_is_a_setting_or_a_user_error(text):
    try:
        compose_run([text])
    except UserError as error:
        assert "\n" not in str(error).replace(text, "")


@FAST
@given(
    st.sampled_from(["model", "trainer.steps", "data.path", "task", "hydra", "nope"]),
    st.text("ab1,[]{}'\"\\$:=-+~ ", max_size=8),
)
def test_any_value_is_taken_or_refused(key, value):
    try:
        compose_run([f"{key}={value}"])
    except UserError as error:
        assert "\n" not in str(error)


@settings(FAST, max_examples=15)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20))
def test_a_quoted_path_arrives_as_it_was(path):
    assert compose_run(["data=local", f"data.path={quote(path)}"]).data.path == path


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("seed=7", lambda c: c.seed == 7),
        ("trainer.steps=1e3", lambda c: c.trainer.steps == 1000),
        ("memory.gate_start=-2", lambda c: c.memory.gate_start == -2.0),
        ("trainer.curriculum=[1,2,4]", lambda c: c.trainer.curriculum == [1, 2, 4]),
        ("trainer.gate_lr=null", lambda c: c.trainer.gate_lr is None),
        ("trainer.compile=true", lambda c: c.trainer.compile is True),
        ("+data.filter.lang=en", lambda c: c.data.filter == {"lang": "en"}),
        ("model=transformer_xl", lambda c: (c.model, c.memory.kind) == ("transformer_xl", "xl")),
        ("scale=paper", lambda c: (c.memory.segment, c.trainer.optimizer) == (2048, "adafactor")),
        ("recipe=lm_smoke", lambda c: c.trainer.steps == 4),
    ],
)
def test_overrides_reach_the_configuration(override, read):
    assert read(compose_run([override]))


def test_a_sweep_is_the_product_of_its_lists():
    jobs_ = expand(["model=full,local_block", "seed=range(0,2)", "scale=smoke"])
    assert jobs_ == [
        ["model=full", "seed=0", "scale=smoke"],
        ["model=full", "seed=1", "scale=smoke"],
        ["model=local_block", "seed=0", "scale=smoke"],
        ["model=local_block", "seed=1", "scale=smoke"],
    ]
    assert expand(["model=glob(local_*)"]) == [[f"model={name}"] for name in LOCAL]
    assert expand([]) == [[]]


def test_a_folder_of_ones_own(tmp_path, runs):
    (tmp_path / "my conf" / "experiment").mkdir(parents=True)
    text = (
        "# @package _global_\n# Mine\n"
        "defaults:\n  - override /task: passkey\n  - override /scale: smoke\nseed: 5\n"
    )
    (tmp_path / "my conf" / "experiment" / "mine.yaml").write_text(text)
    folder = str(tmp_path / "my conf")
    cfg = compose_run([*search_path(tmp_path / "my conf"), "experiment=mine"])
    assert (cfg.task.name, cfg.seed, cfg.task.digits) == ("passkey", 5, 1)
    assert invoke("train", "--config-dir", folder, "experiment=mine").exit_code == 0
    assert (
        invoke("train", "--config-dir", folder, "-m", "experiment=mine", "model=full,local_block").exit_code
        == 0
    )
    assert [(job.cfg.seed, job.cfg.model) for job in runs] == [
        (5, "infini_linear"),
        (5, "full"),
        (5, "local_block"),
    ]
    assert runs[1].recompose(["scale=gpu"]).task.digits == 5
    assert "mine  " in invoke("ls", "experiments", "--config-dir", folder).stdout


# --- launching ------------------------------------------------------------------------------------------


def test_one_run(runs):
    before = list(sys.argv), dict(os.environ)
    assert launch("train", ["scale=smoke", "seed=4", "model=full"]) == 0
    (job,) = runs
    assert (job.verb, job.cfg.seed, job.cfg.model) == ("train", 4, "full")
    assert job.overrides == ["scale=smoke", "seed=4", "model=full"]
    assert job.given == {"scale", "seed", "model"}
    assert (sys.argv, dict(os.environ)) == before


def test_failures_of_one_run_keep_their_kind(runs, capsys):
    with pytest.raises(ValueError, match="no luck"):
        launch("train", ["seed=1"])
    with pytest.raises(UserError, match="No such data"):
        launch("eval", ["seed=2"])
    with pytest.raises(KeyboardInterrupt):
        launch("train", ["seed=3"])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seeds", "code", "jobs"), [("0,1,2", 1, "3 jobs"), ("2,0", 2, "2 jobs"), ("2", 2, "1 job")]
)
def test_a_sweep_goes_on_after_failures_and_says_which(runs, seeds, code, jobs, tmp_path):
    result = invoke("train", "-m", f"seed={seeds}", "scale=smoke")
    assert result.exit_code == code
    assert [job.cfg.seed for job in runs] == [int(seed) for seed in seeds.split(",")]
    failed = [seed for seed in seeds.split(",") if seed in "12"]
    assert f"{jobs}: {len(runs) - len(failed)} done, {len(failed)} failed" in result.stdout
    told = [line for line in result.stderr.splitlines() if line.startswith("error: job")]
    assert [f"seed={seed} " in line for seed, line in zip(failed, told, strict=True)] == [True] * len(failed)
    (folder,) = (tmp_path / "runs" / "sweeps").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == [
        *(f"job-{n:04d}.json" for n in range(len(runs))),
        "multirun.yaml",
    ]


def test_a_launcher_that_cannot_be_is_told(runs):
    result = invoke("train", "-m", "hydra.launcher=none_such", "seed=4")
    assert (result.exit_code, runs) == (2, [])
    assert result.stderr.startswith("error: Hydra cannot run this:") and result.stderr.count("\n") == 1


def test_interruption_ends_a_sweep(runs):
    assert invoke("train", "-m", "seed=0,3,4").exit_code == 130
    assert [job.cfg.seed for job in runs] == [0, 3]


def test_a_mistake_anywhere_in_a_sweep_is_found_before_it_starts(runs):
    assert invoke("train", "-m", "trainer.steps=5,0").exit_code == 2
    assert invoke("train", "-m", "model=full", "trainer.setps=1,2").exit_code == 2
    assert runs == []


# --- completion -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "incomplete", "answers"),
    [
        ([], "mo", ["model="]),
        ([], "model=loc", [f"model={name}" for name in LOCAL]),
        (["model", "="], "loc", LOCAL),  # bash
        (["seed", "=", "1", "task"], "=", ASKED),  # bash
        (["task=passkey"], "task.tr", ["task.train_any_alignment=", "task.trials="]),
        ([], "task.tr", []),
        ([], "hydra/laun", ["hydra/launcher="]),
        (["trainer.st"], "mo", []),
    ],
)
def test_completion(words, incomplete, answers):
    assert complete(words, incomplete) == answers


def test_completion_of_an_empty_word_shows_our_own_keys_only():
    answers = complete([], "")
    assert {"model=", "trainer.", "seed="} <= {*answers}
    assert not [word for word in answers if word.startswith(("hydra", "schema"))]


def test_completion_knows_the_task_of_eval():
    environment = {
        "_INFINI_BENCH_COMPLETE": "complete_zsh",
        "_TYPER_COMPLETE_ARGS": "infini-bench eval passkey task.tr",
    }
    result = CliRunner().invoke(main.app, [], env=environment, prog_name="infini-bench")
    assert "task.trials=" in result.stdout
