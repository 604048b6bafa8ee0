import json
import os
import signal
from pathlib import Path

import pytest
import torch
from train_fakes import FakeTask, fake_task, run_config

from infini_bench.cli.bridge import compose_run
from infini_bench.errors import UserError
from infini_bench.schema import BooksumConfig, DataConfig, LMConfig, PasskeyConfig, RunConfig
from infini_bench.tasks import build_task
from infini_bench.train import load_checkpoint_model, loop, train
from infini_bench.train.checkpoint import find_checkpoint
from infini_bench.train.log import MetricsLog, read_log
from infini_bench.train.state import checkpoint_of


@pytest.fixture(autouse=True)
def tiny_task(monkeypatch):
    monkeypatch.setattr(loop, "build_task", fake_task)


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in log(folder)]


def resumed(cfg: RunConfig, folder: Path) -> RunConfig:
    cfg.resume = str(folder)
    return cfg


def test_it_learns_and_reports(tmp_path):
    result = train(run_config(steps=60, save_every=None, log_every=20, lr=0.03), tmp_path)
    lines = log(tmp_path)
    assert [line["step"] for line in lines] == [20, 40, 60]
    assert lines[-1]["loss"] < 0.5 < lines[0]["loss"]
    assert lines[-1]["tokens"] == result.tokens == 60 * 2 * 24
    assert (result.steps, result.interrupted, result.final_loss) == (60, False, lines[-1]["loss"])
    assert 0 < result.grad_norm_mean < result.grad_norm_max
    assert max(line["grad_norm"] for line in lines) <= result.grad_norm_max
    assert result.best_loss == lines[-1]["validation_loss"] < 0.5
    assert result.checkpoint == tmp_path / "checkpoints" / "step-000060"
    vocab = result.parameters - result.non_embedding_parameters
    assert vocab % 16 == 0 and result.non_embedding_parameters == 2 * (7 * 16 * 16 + 2 * 16 + 2) + 16
    assert result.state_floats == 2 * 2 * 8 * 9
    gates = lines[-1]["gates"]
    assert [len(gates[name]) for name in ("mean", "min", "max")] == [2, 2, 2]
    assert all(a <= b <= c for a, b, c in zip(gates["min"], gates["mean"], gates["max"], strict=True))
    assert lines[-1]["lr"] == pytest.approx(3e-3) and lines[-1]["gate_lr"] == pytest.approx(3e-3)
    assert lines[-1]["peak_bytes"] > 0 and lines[-1]["tokens_per_s"] > 0 and lines[-1]["level"] is None


def test_accumulating_equals_one_large_batch(tmp_path):
    train(run_config(batch=4, steps=4), tmp_path / "large")
    train(run_config(batch=2, accumulate=2, steps=4), tmp_path / "small")
    assert losses(tmp_path / "small") == pytest.approx(losses(tmp_path / "large"), rel=1e-5)
    assert log(tmp_path / "small")[-1]["grad_norm"] == pytest.approx(
        log(tmp_path / "large")[-1]["grad_norm"], rel=1e-4
    )


def test_checkpointed_segments_train_the_same(tmp_path):
    train(run_config(steps=4), tmp_path / "whole")
    train(run_config(steps=4, checkpoint_segments=1), tmp_path / "parts")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_rows_of_a_short_level_read_in_parts_train_the_same(tmp_path):
    settings = {"steps": 4, "batch": 1, "curriculum": [1, 3], "curriculum_loss": 0.0}
    train(run_config(**settings), tmp_path / "whole")
    train(run_config(**settings, checkpoint_segments=1), tmp_path / "parts")
    whole, parts = log(tmp_path / "whole"), log(tmp_path / "parts")
    assert [line["loss"] for line in parts] == pytest.approx([line["loss"] for line in whole], rel=1e-5)
    assert parts[-1]["grad_norm"] == pytest.approx(whole[-1]["grad_norm"], rel=1e-4)
    assert parts[-1]["tokens"] == whole[-1]["tokens"] == 4 * 3 * 8


def test_two_resumes_give_the_undisturbed_run(tmp_path):
    settings = {
        "steps": 9,
        "validate_every": 3,
        "optimizer": "adamw",
        "curriculum": [1, 2],
        "curriculum_loss": 9.0,
    }
    undisturbed = train(run_config(**{**settings, "save_every": None}), tmp_path / "whole")
    whole = log(tmp_path / "whole")
    assert {line["level"] for line in whole} == {1}  # too few steps to move on
    folder = tmp_path / "parts"
    train_until(run_config(**settings), folder, 4)
    train_until(resumed(run_config(**settings), folder), folder, 7)
    result = train(resumed(run_config(**settings), folder), folder)
    assert timeless(log(folder)) == timeless(whole)
    norms = [line["grad_norm"] for line in whole]
    for each in (undisturbed, result):
        assert each.grad_norm_mean == pytest.approx(sum(norms) / 9) and each.grad_norm_max == max(norms)


def timeless(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in ("tokens_per_s", "peak_bytes")} for line in lines]


def train_until(cfg: RunConfig, folder: Path, step: int, number: int = signal.SIGTERM) -> loop.TrainResult:
    """Trains, and sends this process a signal in ``step``, when the batch of the next one is made ahead."""
    rows = cfg.trainer.batch * max(1, *(cfg.trainer.curriculum or [1])) // min(cfg.trainer.curriculum or [1])

    class Interrupting(FakeTask):
        def batch(self, cursor, *args, **kwargs):
            if cursor == step * rows and "split" not in kwargs:
                os.kill(os.getpid(), number)
            return super().batch(cursor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loop, "build_task", lambda cfg, tokenizer: Interrupting(cfg, fake_task(cfg, tokenizer).tokenizer)
        )
        return train(cfg, folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_next_step_with_a_checkpoint(tmp_path, capsys, number):
    before = signal.getsignal(number)
    result = train_until(run_config(save_every=None, log_every=5), tmp_path, 3, number)
    assert result.interrupted and result.steps == 3 and result.checkpoint.name == "step-000003"
    assert f"infini-bench train resume={tmp_path}" in capsys.readouterr().err
    assert signal.getsignal(number) is before
    assert log(tmp_path) == []  # an interruption leaves no trace in the log
    assert train(resumed(run_config(save_every=None, log_every=5), tmp_path), tmp_path).steps == 8
    assert [line["step"] for line in log(tmp_path)] == [5, 8]


def test_a_second_sigint_stops_at_once(tmp_path, monkeypatch):
    class Impatient(FakeTask):
        def batch(self, *args, **kwargs):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            return super().batch(*args, **kwargs)

    monkeypatch.setattr(loop, "build_task", lambda cfg, tokenizer: Impatient(cfg, fake_task(cfg).tokenizer))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(run_config(), tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_curriculum_moves_on_and_survives_a_resume(tmp_path):
    settings = {"steps": 30, "curriculum": [1, 2, 4], "curriculum_loss": 9.0, "save_every": 12}
    train(run_config(**settings), tmp_path / "whole")
    levels = [line["level"] for line in log(tmp_path / "whole")]
    assert levels == [1] * 10 + [2] * 10 + [4] * 10
    assert {line["tokens"] / line["step"] for line in log(tmp_path / "whole")} == {2 * 4 * 8}
    folder = tmp_path / "parts"
    train(run_config(**settings), folder)
    cfg = resumed(run_config(**settings), folder / "checkpoints" / "step-000024")
    train(cfg, folder)
    assert timeless(log(folder)) == timeless(log(tmp_path / "whole"))


REAL = {
    "lm": LMConfig(sequence=24),
    "passkey": PasskeyConfig(digits=1, segments=16),
    "booksum": BooksumConfig(train_input_tokens=32, train_summary_tokens=16),
}


@pytest.mark.parametrize("name", REAL)
def test_real_tasks_resume_exactly(tmp_path, monkeypatch, name):
    monkeypatch.setattr(loop, "build_task", build_task)
    (tmp_path / "books").mkdir()
    for split in ("train", "validation", "test"):
        text = f"It was the best {split} of times, it was the worst {split} of times. " * 20
        books = [{"id": str(i), "text": f"{i} {text}", "summary": f"{i} times, mixed."} for i in range(3)]
        lines = [json.dumps(book) + "\n" for book in books]
        (tmp_path / "books" / f"{split}.jsonl").write_text("".join(lines))

    def config(resume: str | None = None) -> RunConfig:
        cfg = run_config(steps=4)
        cfg.task, cfg.resume, cfg.memory.segment = REAL[name], resume, 32
        cfg.data = DataConfig(
            name="tiny",
            source="local",
            path=str(tmp_path / "books"),
            id_column="id",
            summary_column="summary",
            tokenizer="bytes",
            cache_dir=str(tmp_path / "cache"),
        )
        return cfg

    train(config(), tmp_path / "run")
    whole = timeless(log(tmp_path / "run"))
    result = train(config(str(tmp_path / "run" / "checkpoints" / "step-000002")), tmp_path)
    assert timeless(log(tmp_path / "run")) == whole and len(whole) == 4
    assert load_checkpoint_model(result.folder)[2].task == REAL[name]


def test_the_best_checkpoint_is_the_one_with_the_lowest_validation_loss(tmp_path, monkeypatch):
    measured = iter([3.0, 1.0, 2.0, 1.5])
    monkeypatch.setattr("infini_bench.train.step.Stepper.validate", lambda *_: next(measured))
    result = train(run_config(validate_every=2, keep=1, save_every=None), tmp_path)
    index = json.loads((tmp_path / "checkpoints" / "index.json").read_text())
    assert index == {"last": "step-000008", "best": "step-000004", "kept": ["step-000004", "step-000008"]}
    assert result.best_loss == 1.0
    assert find_checkpoint(tmp_path).name == "step-000008"
    assert [line["validation_loss"] for line in log(tmp_path) if "validation_loss" in line] == [
        3.0,
        1.0,
        2.0,
        1.5,
    ]


def test_a_run_may_stand_for_its_best_checkpoint_and_goes_on_from_its_last(tmp_path, monkeypatch):
    measured = iter([3.0, 1.0, 2.0, 1.5])
    monkeypatch.setattr("infini_bench.train.step.Stepper.validate", lambda *_: next(measured))
    settings = {"validate_every": 2, "keep": 1, "save_every": None}
    result = train(run_config(best=True, **settings), tmp_path)
    assert result.checkpoint.name == find_checkpoint(tmp_path).name == "step-000004"
    assert checkpoint_of(tmp_path).name == "step-000008"
    words = ["task=booksum", "trainer.best=true"]
    with pytest.raises(UserError, match=r"among several validations; add trainer\.validate_every="):
        compose_run([*words, "trainer.validate_every=null"])
    assert compose_run([*words, "trainer.validate_every=2"]).trainer.best


def test_validation_is_the_mean_over_its_rows_whatever_the_batch(tmp_path):
    results = [
        train(run_config(steps=1, lr=1e-12, gate_lr=1e-12, batch=b), tmp_path / str(b)) for b in (1, 2, 3)
    ]
    assert [r.best_loss for r in results] == pytest.approx([results[0].best_loss] * 3, rel=1e-6)


def test_a_loss_that_is_no_number_ends_the_run_and_spares_the_checkpoint(tmp_path, monkeypatch):
    def broken(cfg, tokenizer):
        task = fake_task(cfg, tokenizer)
        good = task.batch

        def batch(cursor, *args, **kwargs):
            task.weight = float("nan") if cursor == 2 * 4 else 1.0
            return good(cursor, *args, **kwargs)

        task.batch = batch
        return task

    monkeypatch.setattr(loop, "build_task", broken)
    with pytest.raises(UserError, match=r"Step 5 gave loss nan.*step-000004.*trainer\.lr"):
        train(run_config(), tmp_path)
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 3, 4]
    monkeypatch.setattr(loop, "build_task", fake_task)
    assert train(resumed(run_config(), tmp_path), tmp_path).steps == 8


def test_a_finished_run_resumes_to_its_result(tmp_path):
    first = train(run_config(), tmp_path)
    again = train(resumed(run_config(), tmp_path), tmp_path)
    assert (again.final_loss, again.best_loss, again.tokens) == (
        first.final_loss,
        first.best_loss,
        first.tokens,
    )
    assert len(log(tmp_path)) == 8
    assert train(resumed(run_config(steps=10), tmp_path), tmp_path).steps == 10  # and can be made longer


def test_a_folder_in_use_is_not_overwritten_unless_forced(tmp_path):
    train(run_config(steps=2), tmp_path)
    with pytest.raises(UserError, match=f"resume={tmp_path}"):
        train(run_config(steps=2), tmp_path)
    cfg = run_config(steps=3)
    cfg.force = True
    assert train(cfg, tmp_path).steps == 3
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 3]


def test_a_gpu_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = run_config()
    cfg.device = "cuda"
    with pytest.raises(UserError, match="device=cpu"):
        train(cfg, tmp_path)


def test_bf16_trains_with_float32_weights(tmp_path):
    train(run_config(steps=4), tmp_path / "float32")
    train(run_config(steps=4, precision="bf16"), tmp_path / "bf16")
    a, b = losses(tmp_path / "float32"), losses(tmp_path / "bf16")
    assert a != b and a == pytest.approx(b, rel=2e-2)


def test_the_log_drops_what_a_dead_run_wrote_last(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    metrics = MetricsLog(path, step=2)
    metrics.write({"step": 3, "loss": 1.0})
    metrics.close()
    assert read_log(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]


def test_a_broken_line_inside_the_log_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        MetricsLog(path, step=3)
