"""Worker processes and their shared progress: order, killed and stopped workers, the board's count."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from infini_bench.progress import NullProgress, Progress
from infini_bench.signals import terminable
from infini_bench.workers import Board, Relay, run_all


@dataclass(frozen=True)
class Toy:
    name: str
    fate: str = "fine"


def toy_run(job: Toy, board) -> tuple:
    board.put(("start", job.name, "train"))
    with Relay(board, job.name, "train").task("counting", 4) as bar:
        for _ in range(4):
            bar.advance()
    board.put(("finish", job.name, "train"))
    if job.fate == "terminator":
        os.kill(os.getppid(), signal.SIGTERM)
    if job.fate == "group":
        os.killpg(os.getpgrp(), signal.SIGTERM)
    time.sleep({"slow": 0.5, "endless": 60, "terminator": 60, "group": 60}.get(job.fate, 0))
    if job.fate == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if job.fate == "stopped":
        raise KeyboardInterrupt
    return job.name, os.getpid(), os.environ.get("OMP_NUM_THREADS")


def lost(job: Toy) -> tuple:
    return job.name, None, None


def board(jobs: int, progress=None) -> Board:
    return Board(progress or NullProgress(), "toys", jobs, {"train": 1.0})


def test_workers_share_cores_and_keep_the_order():
    results = run_all([Toy("a"), Toy("b"), Toy("c")], toy_run, 2, board(3), lost)
    assert [name for name, _, _ in results] == ["a", "b", "c"]
    assert os.getpid() not in {pid for _, pid, _ in results}
    assert {threads for _, _, threads in results} <= {str(max(1, (os.cpu_count() or 1) // 2)), "1"}


def test_a_killed_worker_loses_its_own_job_only():
    jobs = [Toy("a"), Toy("b", "killed"), Toy("c", "slow"), Toy("d")]
    results = run_all(jobs, toy_run, 2, board(4), lost)
    assert [name for name, _, _ in results] == ["a", "b", "c", "d"]
    assert [pid is None for _, pid, _ in results] == [False, True, False, False]


def test_an_interrupt_in_a_worker_reaches_the_parent():
    with pytest.raises(KeyboardInterrupt):
        run_all([Toy("a", "stopped"), Toy("b")], toy_run, 2, board(2), lost)


def test_sigterm_ends_the_workers_too():
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), terminable():
        run_all([Toy("a", "endless"), Toy("b", "terminator")], toy_run, 2, board(2), lost)
    assert time.monotonic() - began < 30
    assert multiprocessing.active_children() == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_to_all_processes_at_once_is_silent():
    """As ``timeout`` sends it: to the parent, its workers and the mailbox between them."""
    script = """
import sys
from test_workers import Toy, board, lost, run_all, terminable, toy_run
try:
    with terminable():
        run_all([Toy("a", "endless"), Toy("b", "group"), Toy("c")], toy_run, 2, board(3), lost)
except KeyboardInterrupt:
    sys.exit(130)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, start_new_session=True, cwd=Path(__file__).parent, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_of_two_sigterms_the_second_cuts_nothing_off():
    ended = []
    with pytest.raises(KeyboardInterrupt), terminable():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            ended.append("whole")
    assert ended == ["whole"] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_board_counts_to_a_hundred():
    from infini_bench.reproduce import WEIGHTS  # here, as each worker of the tests above imports this file

    class Counter(NullProgress):
        def __init__(self):
            self.bars = {}

        def task(self, description, total):
            self.bars[description] = 0
            return SimpleNamespace(advance=lambda n=1: self.count(description, n), close=lambda: None)

        def count(self, description, n):
            self.bars[description] += n

    counter = Counter()
    shared = Board(counter, "all", 2, WEIGHTS)
    with shared:
        shared.put(("start", "a", "train"))
        bar = Relay(shared, "a", "train").task("steps", 10)
        bar.advance(5)
        assert counter.bars == {"all": 20, "a: steps": 5}
        bar.advance(10)  # more than was said
        assert counter.bars["all"] == 39
        bar.close()
        shared.put(("start", "b", "train"))
        Relay(shared, "b", "train", 0.25).task("steps", 10).advance(10)
        assert counter.bars["all"] == 49, "a quarter of its training"
        for job, phase in (("a", "train"), ("a", "eval"), ("b", "train"), ("b", "eval")):
            shared.put(("start", job, phase))
            shared.put(("finish", job, phase))
    assert counter.bars["all"] == 100


def test_the_board_draws_on_a_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with board(1, Progress(console)) as shared:
        toy_run(Toy("a"), shared)
    assert "toys" in console.file.getvalue()
