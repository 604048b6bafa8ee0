"""``train --dry-run``: exact counts, estimates that meet recorded runs, the paper's own configuration."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from infini_bench.cli.bridge import compose_run
from infini_bench.cli.main import app
from infini_bench.errors import UserError
from infini_bench.estimate import GIB, estimate, report

PAPER = ["scale=paper", "data=pg19"]


def test_the_papers_configuration():
    cfg = compose_run([*PAPER, "model=infini_delta"])
    d, t = cfg.decoder, cfg.trainer
    assert (d.layers, d.heads, d.head_dim, d.ffn, cfg.memory.segment) == (12, 8, 128, 4096, 2048)
    assert (t.optimizer, t.lr, t.warmup, t.min_lr, t.checkpoint_segments) == ("adafactor", 0.01, 1000, 0.0, 1)
    e = estimate(cfg)
    assert e.tokens_a_step == 64 * 32768 and e.tokens == 100_000 * e.tokens_a_step
    assert e.non_embedding == 12 * (4 * 1024**2 + 3 * 1024 * 4096 + 2 * 1024) + 1024 + 96
    assert (e.added, e.state_floats, e.parameters - e.non_embedding) == (96, 1_585_152, 32768 * 1024)
    long = compose_run([*PAPER, "experiment=paper_100k"])
    assert estimate(long).tokens_a_step == 64 * 102_400 and long.task.sequence % 2048 == 0


def test_processes_share_the_work_and_with_fsdp_the_weights():
    words = [*PAPER, "trainer.accumulate=1"]
    one, eight = estimate(compose_run(PAPER)), estimate(compose_run(words), 8)
    assert one.tokens_a_step == eight.tokens_a_step and one.flops == eight.flops
    assert eight.seconds == pytest.approx(one.seconds / 8) and eight.weights == one.weights
    shared = estimate(compose_run([*words, "trainer.parallel=fsdp"]), 8)
    assert shared.weights == pytest.approx(one.weights / 8) and shared.activations == one.activations


@pytest.mark.parametrize(("model", "gib"), [("local_block", 21.0), ("infini_linear", 27.1)])
def test_memory_and_speed_are_those_of_recorded_runs(model, gib):
    e = estimate(compose_run([f"model={model}", "scale=gpu"]))
    assert e.memory / GIB == pytest.approx(gib, rel=0.05)
    assert e.tokens / e.seconds == pytest.approx(370_000, rel=0.1)


def test_recomputing_saves_memory_and_costs_time():
    kept, again = (
        estimate(compose_run(["scale=gpu", *more])) for more in ([], ["trainer.checkpoint_segments=1"])
    )
    assert again.activations == kept.activations / 32 and again.states > 0 == kept.states
    assert again.flops == pytest.approx(kept.flops * (4 - 1 / 32) / 3)  # the last call is not recomputed


def test_the_command_prints_and_starts_nothing(tmp_path):
    words = ["train", "--dry-run", "--processes", "8", "scale=paper", f"runs={tmp_path}/runs"]
    shown = CliRunner().invoke(app, [*words, "-m", "model=infini_linear,transformer_xl"]).output
    assert shown.count("64 sequences of 32,768") == 0 and shown.count("512 sequences of 32,768") == 2
    assert "1,585,152 floats carried" in shown and "50,331,648 floats carried" in shown
    assert "15 % of them reached" in shown and "8 GPUs" in shown
    assert not (tmp_path / "runs").exists()


def test_what_cannot_be_estimated_is_told():
    with pytest.raises(UserError, match="task=lm"):
        report(compose_run(["task=passkey"]))
