"""From a command to its record: one real run of seconds, and faked ones for everything that can go wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from report_fakes import row
from typer.testing import CliRunner

import infini_bench.train
from infini_bench.cli import main
from infini_bench.cli.bridge import compose_run
from infini_bench.config import to_dict
from infini_bench.errors import UserError
from infini_bench.progress import NullProgress
from infini_bench.report.records import read_records
from infini_bench.report.tidy import tidy
from infini_bench.run import run_train
from infini_bench.train import TrainResult

TINY = ["scale=smoke", "data.tokenizer=bytes", "task.max_tokens=128", "decoder.layers=1"]


def invoke(*arguments: str):
    return CliRunner().invoke(main.app, [*arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with one finished run, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = invoke("train", "model=infini_delta", "seed=3", *TINY)
    assert result.exit_code == 0, result.output
    return folder, result.stdout


@pytest.fixture
def there(trained, monkeypatch):
    """That folder, and a package without shipped models."""
    monkeypatch.chdir(trained[0])
    monkeypatch.setattr("infini_bench.origin.PACKAGE", trained[0] / "package")
    return trained[0]


@pytest.fixture
def faked(tmp_path, monkeypatch):
    """Training that takes no time: seed 1 fails, 2 by the user's fault, 3 stops, 5 errs before any work."""
    seen = []

    def train(cfg, folder, progress):
        seen.append(cfg)
        if cfg.seed == 1:
            raise RuntimeError("no luck")
        if cfg.seed == 2:
            progress.task("train", 1)
        if cfg.seed in (2, 5):
            raise UserError("The disk is full.")
        folder.mkdir(parents=True)
        numbers = {
            "steps": 4,
            "tokens": 8,
            "seconds": 1.0,
            "final_loss": 2.0,
            "best_loss": None,
            "grad_norm_mean": 1.0,
            "grad_norm_max": 2.0,
            "parameters": 10,
        }
        marks = {"task_version": "1", "data_fingerprint": "d", "tokenizer_fingerprint": "t"}
        sizes = {
            "non_embedding_parameters": 5,
            "trained_parameters": 10,
            "memory_parameters": 1,
            "segmentwise": False,
        }
        sizes |= {"state_floats": 7, "peak_bytes": 0, "tokens_before": 0}
        return TrainResult(folder, folder, interrupted=cfg.seed == 3, **numbers, **marks, **sizes)

    monkeypatch.setattr(infini_bench.train, "train", train)
    monkeypatch.chdir(tmp_path)
    return seen


def only_record(folder="results/records"):
    (record,) = read_records(folder)
    return record


# --- a real run -----------------------------------------------------------------------------------------


def test_training_leaves_a_full_record(there, trained):
    (record,) = [
        r for r in read_records("results/records") if r.kind == "train" and r.config["trainer"]["steps"] == 4
    ]
    assert (record.status, record.seed, record.task, record.error) == ("done", 3, "lm", None)
    assert record.command == ["infini-bench", "train", "model=infini_delta", "seed=3", *TINY]
    assert record.tokens == 4 * 2 * 128 and record.train["steps"] == 4
    assert record.params > 10_000 and record.peak_bytes > 2**20 and record.seconds > 0
    assert record.state_floats == 2 * (16 * 16 + 16)  # heads (D x D and D), one layer
    assert record.data_fingerprint and record.tokenizer_fingerprint and record.versions["torch"]
    assert (
        record.train["folder"] == f"runs/{record.id}"
        and (there / "runs" / record.id / "config.json").exists()
    )
    assert record.forms == ["eager, as the tensors are on cpu, not on a CUDA device"]
    assert "done: infini_delta on lm, 4 steps, 1K tokens" in trained[1]


def test_the_same_run_is_not_run_twice(there):
    result = invoke("train", "model=infini_delta", "seed=3", *TINY)
    assert result.exit_code == 0 and "already done: " in result.stdout
    assert len([*(there / "runs").iterdir()]) == 1


def test_evaluation_takes_the_checkpoints_settings(there):
    result = invoke("eval", "lm", "task.controls=false", "model=infini_delta")
    assert result.exit_code == 0, result.output
    assert "the latest finished run of infini_delta" in result.stdout and "token_ppl" in result.stdout
    (train,) = [r for r in read_records("results/records") if r.kind == "train"]
    (record,) = [r for r in read_records("results/records") if r.kind == "eval"]
    assert record.command == ["infini-bench", "eval", "lm", "task.controls=false", "model=infini_delta"]
    assert {**record.config["task"], "controls": True} == train.config["task"]
    assert (record.seed, record.config["data"], record.config["scale"]) == (3, train.config["data"], "smoke")
    assert record.train["id"] == train.id and record.train["config_hash"] == train.config_hash
    assert (record.train["tokens"], record.train["steps"]) == (train.tokens, 4)
    assert record.train["segmentwise"] is train.train["segmentwise"] is False
    assert record.params == train.params and record.state_floats == train.state_floats
    assert record.forms == train.forms
    again = invoke("eval", "lm", "task.controls=false", "--checkpoint", f"runs/{train.id}")
    assert f"already done: {record.id}" in again.stdout and "token_ppl" in again.stdout


def test_a_shipped_model_goes_first_unless_a_model_is_named(there):
    (run,) = (there / "runs").iterdir()
    shipped = there / "package" / "shipped" / "lm"
    shutil.copytree(run / "checkpoints" / "step-000004", shipped)
    result = invoke("eval", "lm", "task.controls=false", "force=true", "records=others")
    assert "evaluating the shipped model, infini_delta" in result.stdout, result.output
    assert only_record("others").config["checkpoint"] == only_record("others").train["id"] == "shipped/lm"
    assert "already done" in invoke("eval", "lm", "task.controls=false", "records=others").stdout
    named = ["eval", "lm", "task.controls=false", "--checkpoint", "shipped/lm", "records=others"]
    assert "already done" in invoke(*named).stdout
    assert "model=full` first" in invoke("eval", "lm", "model=full").stderr
    own = invoke("eval", "lm", "task.controls=false", "model=infini_delta")
    assert f"evaluating {Path('runs') / run.name}, the latest finished run of infini_delta" in own.stdout
    none = invoke("eval", "lm", "task.controls=false", "model=infini_delta", "records=others")
    assert "the shipped model, infini_delta, of which there is no finished run here" in none.stdout
    shutil.rmtree(shipped)


def test_a_model_reads_and_answers_by_its_name(there, tmp_path):
    (tmp_path / "book.txt").write_text("A story about nothing.")
    file = str(tmp_path / "m.safetensors")
    read = invoke("remember", "infini_delta", str(tmp_path / "book.txt"), "--out", file)
    assert read.exit_code == 0 and "the latest finished run of infini_delta" in read.stderr, read.output
    said = invoke("answer", "infini_delta", "--state", file, "--prompt", "x", "--tokens", "2")
    assert said.exit_code == 0, said.output
    wrong = invoke("export", "infini_delta", "--out", "nowhere", "model=full")
    assert "is of model=infini_delta, not full" in wrong.stderr


def test_an_evaluation_says_how_far_an_unfinished_run_came(there, monkeypatch):
    from infini_bench.train.step import Stepper

    step = Stepper.step

    def fail(self, state, *rest):
        if state.step == 3:
            raise RuntimeError("no luck")
        return step(self, state, *rest)

    places = ["runs=broken", "records=broken/records"]
    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "step", fail)
        invoke("train", "model=full", *TINY, "trainer.save_every=2", *places)
    (record,) = read_records("broken/records")
    words = ["eval", "lm", "--checkpoint", record.train["folder"], "task.controls=false", *places]
    assert f"checkpoint {record.train['folder']}, step 2 of 4, training failed\n" in invoke(*words).stdout
    shutil.rmtree("broken/records")
    assert f"checkpoint {record.train['folder']}, step 2 of 4\n" in invoke(*words).stdout


def test_a_model_is_exported_by_its_name(there, tmp_path):
    result = invoke("export", "infini_delta", "--out", str(tmp_path / "out"))
    assert result.exit_code == 0 and (tmp_path / "out" / "model.safetensors").exists(), result.output
    for option in ("--checkpoint", "--base"):
        result = invoke("eval", "lm", option, str(tmp_path / "out"))
        assert result.exit_code == 2 and "out is an exported folder, which says nothing of" in result.stderr
    result = invoke("export", "infini_delt", "--out", str(tmp_path / "none"))
    assert result.exit_code == 2 and '(did you mean "infini_delta"?)' in result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("model=full", "run `infini-bench train task=lm model=full` first"),
        ("model=full --checkpoint infini_delta", "The checkpoint is of model=infini_delta, not full"),
        ("decoder.dim=64", "decoder.dim was fixed when the checkpoint was trained"),
        ("data.tokenizer=bpe", "data.tokenizer was fixed"),
        ("device=cuda:9", "PyTorch sees no GPU"),
    ],
)
def test_evaluations_that_cannot_be(there, arguments, sentence, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = invoke("eval", "lm", *arguments.split())
    assert result.exit_code == 2 and sentence in result.stderr


def test_an_evaluation_changes_what_needs_no_training(tmp_path, monkeypatch):
    """Keys asked of a model whose floor no key passes, and of the same one without it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("infini_bench.origin.PACKAGE", tmp_path)
    model = ["model=infini_delta_token", "memory.write_gate=true", "memory.write_floor=1"]
    assert invoke("train", "task=passkey", "scale=smoke", "device=cpu", *model).exit_code == 0
    ask = ["eval", "passkey", "device=cpu", "task.controls=false", "--length", "256"]
    for words in ([], ["++task.memory.write_floor=0"]):
        result = invoke(*ask, *words)
        assert result.exit_code == 0, result.output
        assert ("with task.memory: write_floor=0.0\n" in result.stdout) == bool(words)
    assert "already done" in invoke(*ask, "++task.memory.write_floor=0.0").stdout
    found = read_records("results/records")
    plain, without = sorted((r for r in found if r.kind == "eval"), key=lambda r: r.started)
    assert (plain.config["task"]["memory"], without.config["task"]["memory"]) == ({}, {"write_floor": 0.0})
    assert plain.config["memory"] == without.config["memory"] and plain.train == without.train
    for run, least, most in ((plain, 0.0, 0.0), (without, 0.8, 0.9)):
        (strength,) = (m["value"] for m in run.metrics if m["position"] == "filler")
        (held, *_) = (m["extra"]["memory_norm"] for m in run.metrics if m["metric"] == "exact_match")
        assert least <= strength <= most and (held > 0) == (most > 0)
    names = {row["records"][0]: row["variant"].split()[-1] for row in tidy(found)}
    assert names == {plain.id: "task.memory.write_floor=1.0", without.id: "task.memory.write_floor=0.0"}
    for words, sentence in (
        ("++task.memory.gate_input=true", "a memory with parameters of its own; change only what needs no"),
        ("++task.memory.write_gate=false", "memory.write_floor=1.0 is about write strengths, which only a"),
        ("++task.memory.gate_frozen=0", "task.memory.gate_frozen acts in training alone; leave it out."),
        ("++task.memory.floor=1", 'There is no setting "memory.floor"'),
        ("++task.memory.write_floor=low", 'task.memory.write_floor must be a number, not "low"'),
        ("++task.memory.entries=9", "task.memory.entries is read by memory.kind=knn, not by compressive"),
        ("task.memory.write_floor=0", "added with two plus signs: ++task.memory.NAME=VALUE."),
        ("++task.memory.segment=16", "a prompt of 254 tokens in segments of 16"),
        ("--base base ++task.memory.write_floor=0", "has had no training; give memory.NAME, not task.memory"),
    ):
        result = invoke(*ask, *words.split())
        assert result.exit_code == 2 and sentence in result.stderr
    assert len(read_records("results/records")) == len(found)


def test_an_evaluation_says_what_its_training_was_given_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("infini_bench.origin.PACKAGE", tmp_path)
    kept = ["++task.memory.kind=sliding", "++task.memory.window=9"]
    small = ["scale=smoke", "device=cpu", "model=full", "trainer.steps=1"]
    assert invoke("train", "task=passkey", *small, *kept).exit_code == 0
    ask = ["eval", "passkey", "device=cpu", "task.controls=false", "--length", "256", "--trials", "1"]
    hint = "kind=sliding, window=9; the training was given it, ++task.memory={} leaves it out\n"
    assert f"with task.memory: {hint}" in invoke(*ask).stdout
    assert (
        "with task.memory: kind=sliding, window=8\n"
        in invoke(*ask, *kept[:1], "++task.memory.window=8").stdout
    )
    assert "with task.memory" not in invoke(*ask, "++task.memory={}").stdout
    asked = [r.config["task"]["memory"] for r in read_records("results/records") if r.kind == "eval"]
    assert sorted(memory.get("window", 0) for memory in asked) == [0, 8, 9]


def test_resuming(there):  # changes the run, so it comes after the evaluations
    (run,) = (there / "runs").iterdir()
    assert "already done" in invoke("train", f"resume={run}").stdout
    assert "is at step 4 already" in invoke("train", f"resume={run}", "trainer.steps=2").stderr
    for words in ("trainer.lr=1", "++task.memory.window=9"):
        assert (
            f"{words.strip('+').partition('=')[0]} cannot change"
            in invoke("train", f"resume={run}", words).stderr
        )
    longer = invoke("train", f"resume={run}", "trainer.steps=5")
    assert longer.exit_code == 0, longer.output
    assert "from step 4 on the learning rate follows the schedule of 5 steps" in longer.stderr
    (record,) = [r for r in read_records("results/records") if r.config["trainer"]["steps"] == 5]
    assert record.train["steps"] == 5 and Path(record.train["folder"]) == run
    assert record.config_hash != invoke_hash("model=infini_delta", "seed=3", *TINY, "trainer.steps=5")
    assert "already done" in invoke("train", f"resume={run}").stdout


def invoke_hash(*overrides: str) -> str:
    from infini_bench.report.records import config_hash

    return config_hash(to_dict(compose_run(overrides)))


# --- failures -------------------------------------------------------------------------------------------


def test_a_failure_is_recorded_and_raised(faked):
    result = invoke("train", "seed=1")
    assert isinstance(result.exception, RuntimeError)
    record = only_record()
    assert (record.status, record.error) == ("failed", "RuntimeError: no luck")


def test_a_users_mistake_during_the_run_is_recorded_too(faked):
    result = invoke("train", "seed=2")
    assert (result.exit_code, result.stderr) == (2, "error: The disk is full.\n")
    assert only_record().error == "UserError: The disk is full."


def test_a_users_mistake_before_any_work_leaves_no_record(faked):
    result = invoke("train", "seed=5")
    assert (result.exit_code, result.stderr) == (2, "error: The disk is full.\n")
    assert read_records("results/records") == []


def test_an_interrupted_run_is_recorded_as_that(faked):
    assert invoke("train", "seed=3").exit_code == 130
    assert (only_record().status, only_record().tokens) == ("interrupted", 8)


def test_a_killed_run_leaves_a_record(faked, monkeypatch):
    during = []
    monkeypatch.setattr(infini_bench.train, "train", lambda *_: during.append(only_record()) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_train(compose_run([]), progress=NullProgress())
    assert (during[0].status, during[0].error) == ("failed", "the process ended without a word")


def test_records_that_cannot_be_written_stop_the_run_before_it_starts(faked, tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke("train", "records=file/records")
    assert result.exit_code == 2 and "cannot write file/records" in result.stderr
    assert faked == []


def test_a_sweep_that_is_run_again_does_only_what_is_missing(faked):
    first = invoke("train", "-m", "seed=0,1,4", "scale=smoke")
    assert first.exit_code == 1 and "3 jobs: 2 done, 1 failed" in first.stdout
    assert sorted((r.seed, r.status) for r in read_records("results/records")) == [
        (0, "done"),
        (1, "failed"),
        (4, "done"),
    ]
    assert "RuntimeError: no luck" in first.stderr and "Traceback" in first.stderr
    faked.clear()
    second = invoke("train", "-m", "seed=0,2,4", "scale=smoke")
    assert second.exit_code == 2 and second.stdout.count("already done: ") == 2
    assert [cfg.seed for cfg in faked] == [2]


def test_whoever_shows_progress_shows_everything(faked, capsys):
    record = run_train(compose_run(["seed=4"]), progress=NullProgress())
    assert record.status == "done" and capsys.readouterr().out == ""
    assert run_train(compose_run(["seed=4"]), progress=NullProgress()).id == record.id
    assert run_train(compose_run(["seed=4", "force=true"]), progress=NullProgress()).id != record.id


def test_a_record_without_its_run_folder_does_not_count(faked):
    invoke("train", "scale=smoke")
    shutil.rmtree("runs")
    assert "already done" not in invoke("train", "scale=smoke").stdout and len(faked) == 2


# --- what a run says of its data ------------------------------------------------------------------------


def test_a_file_without_splits_and_another_task_are_said(there, tmp_path, monkeypatch):
    text = tmp_path / "own.txt"
    text.write_text("".join(f"{i} apples\n" for i in range(400)))
    run = next(path for path in Path("runs").iterdir() if path.name != "sweeps")
    own = ["--checkpoint", str(run), "scale=smoke", f"records={tmp_path}/records"]
    result = invoke("eval", "lm", "--length", "64", "data=local", f"data.path={text}", *own)
    assert result.exit_code == 0, result.output
    words = "own.txt has no splits: its last tenth is the test split (task.split=train|validation|test)"
    assert words in result.stdout.splitlines()
    assert "63 tokens scored in 1 document, at most 64 read of each" in result.stdout
    assert "warning" not in result.stdout
    none = row("exact_match", None)
    monkeypatch.setattr("infini_bench.run.evaluate", lambda record, *_: record.metrics.append(none))
    result = invoke("eval", "recall", *own)
    assert "warning: trained on lm, evaluated on recall" in result.stdout.splitlines(), result.output


def test_training_says_first_what_it_makes_of_a_file_without_splits(faked):
    Path("own.txt").write_text("apples")
    told = [
        invoke("train", f"task={task}", "scale=smoke", "data=local", "data.path=own.txt").stdout
        for task in ("lm", "passkey")
    ]
    assert told[0].splitlines()[0] == (
        "own.txt has no splits: its first eight tenths are the train split, its last tenth but one is the "
        "validation split, its last tenth is the test split"
    )
    assert len(faked) == 2 and "own.txt" not in told[1]  # it reads no text


def test_a_length_that_leaves_nothing_to_predict_is_at_fault():
    result = invoke("eval", "lm", "--length", "1")
    assert result.exit_code == 2
    assert "task.max_tokens must be 2 or more (--length; a first token is read, not scored)" in result.stderr
