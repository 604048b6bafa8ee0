"""Real processes: killed at random moments and resumed, and several that train one model together.

They are forked from a server that has imported everything, so that each costs a fraction of a second.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import socket
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from train_fakes import run_config, train_in_child

from infini_bench.errors import UserError
from infini_bench.schema import RunConfig, TrainerConfig
from infini_bench.train import load_checkpoint_model
from infini_bench.train.parallel import check_launcher

SETTINGS = {"steps": 6, "save_every": 2, "validate_every": 3, "keep": 1, "curriculum": [1, 2]}


@pytest.fixture(scope="module")
def children():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["infini_bench.train.loop", "infini_bench.tasks.base"])

    def start(*args) -> BaseProcess:
        process = context.Process(target=train_in_child, args=args)
        process.start()
        return process

    return start


def finish(process: BaseProcess) -> int | None:
    process.join(60)
    assert process.exitcode is not None, "the child hangs"
    return process.exitcode


def log(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_s", "peak_bytes")} for line in lines]


def config(folder: Path, **settings) -> RunConfig:
    cfg = run_config(**{**SETTINGS, **settings})
    cfg.resume = str(folder) if (folder / "config.json").exists() else None
    return cfg


@pytest.fixture(scope="module")
def undisturbed(children, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert finish(children(config(folder), folder)) == 0
    return log(folder)


@pytest.mark.parametrize("seed", range(8))
def test_killed_at_random_moments_and_resumed_it_logs_the_undisturbed_run(
    children, undisturbed, tmp_path, seed
):
    moments = random.Random(seed)
    kills = 0
    for _ in range(2):
        kills += finish(children(config(tmp_path), tmp_path, moments.randint(1, 80))) == -9
    assert finish(children(config(tmp_path), tmp_path)) == 0
    assert kills > 0
    assert [line["step"] for line in undisturbed] == [1, 2, 3, 4, 5, 6]
    assert log(tmp_path) == undisturbed
    assert not list(tmp_path.rglob(".*"))


@pytest.fixture
def two(children):
    """Trains a folder by two processes, which must both end well."""

    def train_it(folder, **settings):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        ranks = [
            children(
                config(folder, **settings),
                folder,
                None,
                {**common, "RANK": r, "LOCAL_RANK": r, "LOCAL_WORLD_SIZE": "2"},
            )
            for r in ("0", "1")
        ]
        assert [finish(rank) for rank in ranks] == [0, 0]

    return train_it


@pytest.mark.parametrize(
    "settings",
    [
        {"parallel": "ddp", "optimizer": "adafactor"},
        {"parallel": "fsdp"},
        {"parallel": "fsdp", "optimizer": "adafactor", "checkpoint_segments": 1},
    ],
    ids=["ddp", "fsdp", "fsdp-paper"],
)
def test_two_processes_train_as_one_that_accumulates(children, two, tmp_path, settings):
    """Equal losses at the same global batch, and one whole checkpoint, from which both forms go on alike."""
    both, alone = tmp_path / "both", tmp_path / "alone"
    two(both, **settings)
    single = {key: value for key, value in settings.items() if key != "parallel"}
    assert finish(children(config(alone, accumulate=2, **single), alone)) == 0
    a, b = log(both), log(alone)
    assert [line["step"] for line in a] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "task_loss", "grad_norm", "tokens"):
        assert [line[key] for line in a] == pytest.approx([line[key] for line in b], rel=1e-5)
    two(both, **{**settings, "steps": 8})
    assert finish(children(config(alone, accumulate=2, **{**single, "steps": 8}), alone)) == 0
    assert [line["loss"] for line in log(both)] == pytest.approx([x["loss"] for x in log(alone)], rel=1e-5)
    one, other = (load_checkpoint_model(folder)[0].state_dict() for folder in (both, alone))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=1e-4)


def test_sharing_needs_a_launcher_and_is_a_setting(monkeypatch):
    with pytest.raises(UserError, match="torchrun"):
        check_launcher(TrainerConfig(parallel="fsdp"))
    with monkeypatch.context() as launched:
        launched.setenv("ACCELERATE_USE_CPU", "True")  # by `accelerate launch --cpu --num_processes 2`
        with pytest.raises(UserError, match="one process only"):
            check_launcher(TrainerConfig())
        launched.setenv("RANK", "0")
        check_launcher(TrainerConfig())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"trainer\.parallel=fsdp"):
        check_launcher(TrainerConfig())
