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
from train_fakes import run_config, train_in_child

from infini_bench.schema import RunConfig

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


def test_two_processes_train_as_one_that_accumulates(children, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    both, alone = tmp_path / "both", tmp_path / "alone"
    ranks = [
        children(config(both), both, None, {**common, "RANK": r, "LOCAL_RANK": r, "LOCAL_WORLD_SIZE": "2"})
        for r in ("0", "1")
    ]
    assert [finish(rank) for rank in ranks] == [0, 0]
    assert finish(children(config(alone, accumulate=2), alone)) == 0
    a, b = log(both), log(alone)
    assert [line["step"] for line in a] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "task_loss", "grad_norm", "tokens"):
        assert [line[key] for line in a] == pytest.approx([line[key] for line in b], rel=1e-5)
