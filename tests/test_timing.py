"""Stopwatch and ladder with injected timers: nothing here measures a time."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch

from infini_bench import timing
from infini_bench.timing import Ceilings, Ladder, Stopwatch, Times, Work, attempt, clock

CPU = torch.device("cpu")


def fake(*ms: float):
    """A timer that makes the calls and says that they took so long, one after the other, then over again."""
    said = cycle(ms)

    def timer(calls, device, count):
        found = [[] for _ in calls]
        for _ in range(count):
            for own, call in zip(found, calls, strict=True):
                call()
                own.append(next(said))
        return found

    return timer


def test_median_and_spread():
    times = Times([5.0, 1.0, 2.0, 3.0, 4.0])
    assert times.median == 3.0 and times.spread == pytest.approx((1.4, 4.6))


def test_warm_up_is_not_timed_and_repetitions_are_counted():
    made = []
    watch = Stopwatch(CPU, 4, 10.0, fake(3.0, 1.0, 2.0, 9.0))
    (times,) = watch.measure(lambda: made.append("call"), warm=[lambda: made.append("warm")])
    assert made == ["warm", *["call"] * 4] and times.ms == [3.0, 1.0, 2.0, 9.0] and times.median == 2.5
    assert times.memory > 0


@pytest.mark.parametrize(("ms", "count"), [(1.0, 5), (600.0, 2), (5000.0, 1)])
def test_repetitions_end_with_the_seconds(ms, count):
    (times,) = Stopwatch(CPU, 5, 1.0, fake(ms)).measure(lambda: None)
    assert len(times.ms) == count


def test_several_calls_take_turns():
    made = []
    watch = Stopwatch(CPU, 3, 10.0, fake(1.0, 2.0))
    found = watch.measure(lambda: made.append("a"), lambda: made.append("b"))
    assert "".join(made) == "ab" * 4 and [times.ms for times in found] == [[1.0] * 3, [2.0] * 3]


def test_the_clock_gives_a_time_a_call_in_turns():
    made = []
    ms = clock([lambda: made.append("a"), lambda: made.append("b")], CPU, 3)
    assert "".join(made) == "ababab" and [len(own) for own in ms] == [3, 3] and min(map(min, ms)) >= 0


def test_a_ladder_ends_where_a_call_would_take_too_long():
    ladder = Ladder(Stopwatch(CPU, 1, 2.0, fake(500.0)))
    assert ladder.climb(1024, lambda: None)[0].ms == [500.0]
    assert not isinstance(ladder.climb(4096, lambda: None), str), "in proportion 2 s, as long as is allowed"
    why = ladder.climb(65536, lambda: pytest.fail("this call is not made"))
    assert why == "65536 tokens take at least 8 s, more than 2 s"
    assert ladder.climb(131072, lambda: None) == why


def test_a_ladder_ends_before_memory_does(monkeypatch):
    ladder = Ladder(Stopwatch(CPU, 1, 1e9, fake(1.0)))
    ladder.before = (1024, 1.0, 1 << 30)
    monkeypatch.setattr(timing, "free_bytes", lambda: 3.0 * (1 << 30))
    assert ladder.climb(4096, lambda: None) == "4096 tokens need about 4 GiB, more than is free"


def test_no_memory_is_a_reason_and_another_error_is_an_error():
    def fails(error):
        def call():
            raise error

        return call

    for error in (MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("can't allocate memory: 9")):
        assert attempt(fails(error)) == "out of memory"
    ladder = Ladder(Stopwatch(CPU, 1, 1.0, fake(1.0)))
    assert ladder.climb(7, fails(MemoryError())) == "out of memory at 7 tokens" == ladder.climb(9, print)
    with pytest.raises(RuntimeError, match="shapes"):
        attempt(fails(RuntimeError("shapes differ")))


def test_bounds_are_the_larger_of_arithmetic_and_traffic():
    best = Ceilings(flops=1e12, bandwidth=1e9)
    assert best.bound_ms(Work(2e9, 1e6)) == pytest.approx(2.0)
    assert best.bound_ms(Work(2e9, 5e6)) == pytest.approx(5.0)
    assert best.percent(Work(2e9, 0), 8.0) == pytest.approx(25.0)


def test_ceilings_of_a_machine_that_is_told():
    best = timing.ceilings(Stopwatch(CPU, 1, 1.0, fake(2.0, 4.0)), torch.float32)
    assert best.flops == 2e3 * 1024**3 / 2 and best.bandwidth == 2e3 * (1 << 26) / 4
