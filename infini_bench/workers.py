"""Named jobs one after the other or in worker processes, under one progress bar with the time left.

A job is run as ``run(job, board)``. It tells the board how far it is through `Relay`, which looks like a
`infini_bench.progress.Progress` and works across processes: a board is anything with ``put``.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from threading import Thread
from typing import Any, Protocol, TypeVar

from infini_bench.progress import Handle, NullProgress, Progress


class Named(Protocol):
    @property
    def name(self) -> str: ...


J = TypeVar("J", bound=Named)
R = TypeVar("R")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(
    jobs: Sequence[J], run: Callable[[J, Any], R], workers: int, board: Board, lost: Callable[[J], R]
) -> list[R]:
    """Results in the order of ``jobs``. ``run`` and jobs must be picklable if workers > 1.

    ``lost(job)`` stands in for the result of a job whose process was killed. KeyboardInterrupt: no further
    job is started, those that run are waited for (training saves itself and stops).
    """
    with board:
        if workers == 1:
            return [run(job, board) for job in jobs]
        return _side_by_side(jobs, run, workers, board, lost)


def _side_by_side(
    jobs: Sequence[J], run: Callable, workers: int, board: Board, lost: Callable[[J], R]
) -> list[R]:
    results: dict[str, R] = {}
    waiting = list(jobs)
    with _mailbox(board) as queue:
        while waiting:
            done, broken = _one_pool(waiting, run, workers, queue)
            results |= done
            # A killed worker takes the whole pool along; only what had been started is given up.
            culprits = [job for job in broken if job.name in board.started] or broken
            results |= {job.name: lost(job) for job in culprits}
            waiting = [job for job in broken if job not in culprits]
    return [results[job.name] for job in jobs]


def _one_pool(jobs: list[J], run: Callable, workers: int, queue: Any) -> tuple[dict[str, Any], list[J]]:
    """Results by name, and the jobs that have none because a worker was killed."""
    context = multiprocessing.get_context("spawn")
    setup = (max(1, cores() // workers),)
    with ProcessPoolExecutor(min(workers, len(jobs)), context, _start_worker, setup) as pool:
        futures = [(job, pool.submit(run, job, queue)) for job in jobs]
        done, broken = {}, []
        try:
            for job, future in futures:
                try:
                    done[job.name] = future.result()
                except BrokenProcessPool:
                    broken.append(job)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return done, broken


def _start_worker(threads: int) -> None:
    """Before torch is imported. Ctrl-C is the parent's and the training loop's affair."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _mailbox(board: Board) -> Iterator[Any]:
    """A queue that can be sent to other processes; its messages reach ``board`` in this one."""
    with multiprocessing.get_context("spawn").Manager() as manager:
        queue = manager.Queue()

        def deliver() -> None:
            for message in iter(queue.get, None):
                board.put(message)

        thread = Thread(target=deliver, daemon=True)
        thread.start()
        try:
            yield queue
        finally:
            queue.put(None)
            thread.join()


class Board:
    """One bar for everything, in percent, and one for each thing that runs now.

    weights: phase -> its share of a job. Without a terminal only the first is shown, as lines.
    """

    def __init__(
        self, progress: Progress | NullProgress, title: str, jobs: int, weights: Mapping[str, float]
    ):
        self.progress, self.title, self.weights, self.jobs = progress, title, weights, jobs
        lines = isinstance(progress, Progress) and not progress.console.is_terminal
        self.details = NullProgress() if lines else progress
        self.started: set[str] = set()
        self.done: dict[tuple[str, str], float] = {}  # (job, phase) -> part done, 0..1
        self.bars: dict[str, Handle] = {}
        self.shown = 0

    def __enter__(self) -> Board:
        self.whole = self.progress.task(self.title, 100)
        return self

    def __exit__(self, *error: object) -> None:
        for bar in (*self.bars.values(), self.whole):
            bar.close()

    def put(self, message: tuple) -> None:
        """(method, *its arguments): ``start``, ``open``, ``advance``, ``close`` or ``finish``."""
        method, *arguments = message
        getattr(self, method)(*arguments)

    def start(self, job: str, phase: str) -> None:
        self.started.add(job)
        self.done[job, phase] = 0.0

    def open(self, key: str, description: str, total: int) -> None:
        self.bars[key] = self.details.task(description, total)

    def advance(self, key: str, n: int, job: str, phase: str, part: float) -> None:
        self.bars[key].advance(n)
        # A phase may have several bars or skip some of its work: only its end counts as the whole.
        self._show(job, phase, min(self.done[job, phase] + part, 0.99))

    def close(self, key: str) -> None:
        self.bars.pop(key).close()

    def finish(self, job: str, phase: str) -> None:
        self._show(job, phase, 1.0)

    def _show(self, job: str, phase: str, part: float) -> None:
        self.done[job, phase] = part
        jobs_done = sum(self.weights[phase] * part for (_, phase), part in self.done.items())
        percent = int(100 * jobs_done / self.jobs + 1e-6)
        self.whole.advance(percent - self.shown)
        self.shown = percent


class Relay:
    """What one phase of a job sees as its progress display."""

    def __init__(self, board: Any, job: str, phase: str):
        self.board, self.job, self.phase, self.count = board, job, phase, 0

    def task(self, description: str, total: int) -> RelayHandle:
        self.count += 1
        key = f"{self.job} {self.phase} {self.count}"
        self.board.put(("open", key, f"{self.job}: {description}", total))
        return RelayHandle(self, key, total)

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *error: object) -> None: ...


class RelayHandle:
    def __init__(self, relay: Relay, key: str, total: int):
        self.relay, self.key, self.total = relay, key, total

    def advance(self, n: int = 1) -> None:
        part = n / max(self.total, 1)
        self.relay.board.put(("advance", self.key, n, self.relay.job, self.relay.phase, part))

    def close(self) -> None:
        self.relay.board.put(("close", self.key))

    def __enter__(self) -> RelayHandle:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
