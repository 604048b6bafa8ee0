"""Named jobs one after the other or in worker processes, under one progress bar with the time left.

A job is run as ``run(job, board)``. It tells the board how far it is through `Relay`, which looks like a
`infini_bench.progress.Progress` and works across processes: a board is anything with ``put``.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.managers import SyncManager
from threading import Thread
from typing import Any, Protocol, TypeVar

from infini_bench.progress import Handle, NullProgress, Progress
from infini_bench.signals import terminable


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

    Jobs whose process is killed (want of memory, mostly) are run again alone; ``lost(job)`` is the result of
    one that is killed then, too. A KeyboardInterrupt (SIGINT, or inside `terminable` SIGTERM) ends all: no
    further job is started, workers are sent SIGTERM, and training saves itself before it stops.
    """
    with board:
        if workers == 1:
            return [run(job, board) for job in jobs]
        return _side_by_side(jobs, run, workers, board, lost)


def _side_by_side(
    jobs: Sequence[J], run: Callable, workers: int, board: Board, lost: Callable[[J], R]
) -> list[R]:
    results: dict[str, R] = {}
    with _mailbox(board) as queue:
        while waiting := [job for job in jobs if job.name not in results]:
            done, killed = _one_pool(waiting, run, workers, queue)
            results |= done
            for job in killed:  # one dead worker takes the whole pool along
                done, killed_again = _one_pool([job], run, 1, queue)
                results |= done | {job.name: lost(job) for job in killed_again}
    return [results[job.name] for job in jobs]


def _one_pool(jobs: list[J], run: Callable, workers: int, queue: Any) -> tuple[dict[str, Any], list[J]]:
    """Results by name until all is done or a worker is killed, and the jobs that ran then."""
    done: dict[str, Any] = {}
    killed: list[J] = []
    waiting, running = deque(jobs), dict[Future, J]()
    with process_pool(workers) as pool:
        while (waiting or running) and not killed:
            while waiting and len(running) < workers:  # no more: what a pool has queued cannot be cancelled
                job = waiting.popleft()
                running[pool.submit(_run_job, run, job, queue)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                try:
                    done[job.name] = future.result()
                except BrokenProcessPool:
                    killed += [job, *running.values()]
                    break
    return done, killed


def _run_job(run: Callable[[J, Any], R], job: J, queue: Any) -> R:
    """In a worker: one that is told to stop ends its job as the only process would."""
    with terminable():
        return run(job, queue)


@contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes that share the cores; on an interrupt they are told to stop, and what waits is not
    begun."""
    others = set(multiprocessing.active_children())
    context, threads = multiprocessing.get_context("spawn"), max(1, cores() // workers)
    with ProcessPoolExecutor(workers, context, _start_worker, (threads,)) as pool:
        try:
            yield pool
        except KeyboardInterrupt:
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            raise


def _start_worker(threads: int) -> None:
    """Before torch is imported. Ctrl-C, which reaches all processes of a terminal, is the parent's affair."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _mailbox(board: Board) -> Iterator[Any]:
    """A queue that can be sent to other processes; its messages reach ``board`` in this one."""
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    # it ignores SIGINT of itself; either signal may reach all processes, and workers tell of their end
    manager.start(signal.signal, (signal.SIGTERM, signal.SIG_IGN))
    with manager:
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
        self.done[job, phase] = 0.0

    def open(self, key: str, description: str, total: int) -> None:
        if key in self.bars:  # of a process that was killed
            self.close(key)
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
    """What one phase of a job, or this share of it, sees as its progress display."""

    def __init__(self, board: Any, job: str, phase: str, share: float = 1.0):
        self.board, self.job, self.phase, self.share, self.count = board, job, phase, share, 0

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
        part = self.relay.share * n / max(self.total, 1)
        self.relay.board.put(("advance", self.key, n, self.relay.job, self.relay.phase, part))

    def close(self) -> None:
        self.relay.board.put(("close", self.key))

    def __enter__(self) -> RelayHandle:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
