"""How long a call takes, how much memory it needs, and what this machine could do at best.

Times are of a device: CUDA events on a GPU, with no synchronization between repetitions; the wall clock on
a CPU.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from infini_bench.device import peak_bytes, reset_peak

Call = Callable[[], object]
# Milliseconds of so many repetitions of each call; several take turns.
Timer = Callable[[Sequence[Call], torch.device, int], list[list[float]]]
GiB = 1 << 30


@dataclass(frozen=True)
class Times:
    """Milliseconds of the timed calls; memory: the most bytes that were held meanwhile, see `peak_bytes`."""

    ms: list[float]
    memory: int = 0

    @property
    def median(self) -> float:
        return float(np.median(self.ms))

    @property
    def spread(self) -> tuple[float, float]:
        """The 10th and the 90th percentile."""
        low, high = np.percentile(self.ms, [10, 90])
        return float(low), float(high)


def clock(calls: Sequence[Call], device: torch.device, count: int) -> list[list[float]]:
    """The `Timer` of real runs."""
    turns = [call for _ in range(count) for call in calls]
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(turns) + 1)]
        torch.cuda.synchronize(device)
        marks[0].record()
        for call, mark in zip(turns, marks[1:], strict=True):
            call()
            mark.record()
        torch.cuda.synchronize(device)
        ms = [a.elapsed_time(b) for a, b in pairwise(marks)]
    else:
        times = [time.perf_counter()]
        for call in turns:
            call()
            times.append(time.perf_counter())
        ms = [1e3 * (b - a) for a, b in pairwise(times)]
    return [ms[number :: len(calls)] for number in range(len(calls))]


@dataclass(frozen=True)
class Stopwatch:
    """Times calls after a warm-up, as often as ``repeats`` and ``seconds`` (of all repetitions) allow, at
    least once."""

    device: torch.device
    repeats: int
    seconds: float
    timer: Timer = clock

    def measure(self, *calls: Call, warm: Sequence[Call] = ()) -> list[Times]:
        """Times of each call; several take turns, so that whatever else the machine does meets all of them.

        warm: what runs first, untimed; unset = each call once.
        """
        reset_peak(self.device)
        for call in warm or calls:
            call()
        ms = self.timer(calls, self.device, 1)
        more = min(self.repeats - 1, int(1e3 * self.seconds / max(sum(map(sum, ms)), 1e-6)))
        if more > 0:
            ms = [a + b for a, b in zip(ms, self.timer(calls, self.device, more), strict=True)]
        memory = peak_bytes(self.device)
        return [Times(own, memory) for own in ms]


class Ladder:
    """One kind of call, or several in turns, at rising lengths up to the first that does not fit or takes too
    long."""

    def __init__(self, watch: Stopwatch):
        self.watch = watch
        self.why: str | None = None
        self.before: tuple[int, float, int] | None = None  # tokens, ms, bytes that they needed

    def climb(self, tokens: int, *calls: Call, warm: Sequence[Call] = ()) -> list[Times] | str:
        """The times at a length, or in words why there are none.

        A call that took ms at fewer tokens takes at least in proportion more at these, and on a CPU, where
        the system would kill the process, it is not tried if in proportion it needs more than is free.
        """
        self.why = self.why or self.forecast(tokens)
        if self.why:
            return self.why
        reset_peak(self.watch.device)
        held = peak_bytes(self.watch.device)
        found = attempt(lambda: self.watch.measure(*calls, warm=warm))
        if isinstance(found, str):
            self.why = f"{found} at {tokens} tokens"
            return self.why
        slowest = max(times.median for times in found)
        self.before = tokens, slowest, max(found[0].memory - held, 0)
        return found

    def forecast(self, tokens: int) -> str | None:
        if self.before is None:
            return None
        fewer, ms, needed = self.before
        seconds, more = tokens / fewer * ms / 1e3, tokens / fewer * needed
        if seconds > self.watch.seconds:
            return f"{tokens} tokens take at least {seconds:.0f} s, more than {self.watch.seconds:g} s"
        if self.watch.device.type == "cpu" and more > free_bytes():
            return f"{tokens} tokens need about {more / GiB:.0f} GiB, more than is free"
        return None


def attempt(work: Callable[[], list[Times]]) -> list[Times] | str:
    """What ``work`` gives, or ``out of memory``; any other error goes on."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is the first
        short = isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)
        if not short:
            raise
    gc.collect()  # outside the handler, whose traceback holds the tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return "out of memory"


def free_bytes() -> float:
    """Main memory that can be had without swapping; infinite where the system does not say."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((1024.0 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable")), float("inf"))


@dataclass(frozen=True)
class Work:
    """What a call must do at least: floating-point operations of matrix products, bytes read and written."""

    flops: float
    bytes: float

    def times(self, factor: float) -> Work:
        return Work(factor * self.flops, factor * self.bytes)


@dataclass(frozen=True)
class Ceilings:
    """The machine's best, measured: operations a second of a large product, bytes a second of a copy."""

    flops: float
    bandwidth: float

    def bound_ms(self, work: Work) -> float:
        """No faster can it be."""
        return 1e3 * max(work.flops / self.flops, work.bytes / self.bandwidth)

    def percent(self, work: Work, ms: float) -> float:
        """Of the matrix peak."""
        return 100 * work.flops / (ms / 1e3) / self.flops


def ceilings(watch: Stopwatch, dtype: torch.dtype) -> Ceilings:
    """Medians; a product of 8192 x 8192 and a copy of 1 GiB on a GPU, 1024 x 1024 and 64 MiB on a CPU."""
    gpu = watch.device.type == "cuda"
    size, numbers = (8192, GiB // 2) if gpu else (1024, GiB // 64)
    a, b = (torch.randn(size, size, device=watch.device).to(dtype) for _ in range(2))
    product = watch.measure(lambda: torch.mm(a, b))[0].median
    x = torch.zeros(numbers, dtype=dtype, device=watch.device)
    y = torch.empty_like(x)
    copied = watch.measure(lambda: y.copy_(x))[0].median
    return Ceilings(2e3 * size**3 / product, 2e3 * x.numel() * x.element_size() / copied)
