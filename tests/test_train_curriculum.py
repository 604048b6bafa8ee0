import pytest

from infini_bench.schema import TrainerConfig
from infini_bench.train.curriculum import PATIENCE, Curriculum


def curriculum(**settings) -> Curriculum:
    return Curriculum(
        TrainerConfig(**{"curriculum": [2, 4, 8], "curriculum_loss": 0.5, "batch": 3, **settings})
    )


def test_rows_keep_the_tokens_of_a_step():
    c = curriculum()
    found = []
    for c.level in range(3):
        found.append((c.segments, c.rows))
    assert found == [(2, 12), (4, 6), (8, 3)]
    assert c.longest == 8


def test_rows_are_never_fewer_than_at_the_longest_level():
    assert curriculum(curriculum=[3, 4], batch=1).rows == 1


def test_a_short_level_reads_no_more_segments_at_once_than_checkpointing_keeps_of_the_longest():
    c = curriculum(curriculum=[1, 4, 16, 256], batch=1, checkpoint_segments=16)
    found = []
    for c.level in range(4):
        found.append((c.rows, c.at_once))
    assert found == [(256, 16), (64, 4), (16, 1), (1, 1)]
    whole = curriculum()
    assert whole.rows == whole.at_once == 12 and curriculum(curriculum=[]).at_once == 3


def test_without_levels_the_task_decides_the_length():
    c = curriculum(curriculum=[])
    assert (c.segments, c.longest, c.rows) == (None, None, 3)
    assert not any(c.update(0.0) for _ in range(3 * PATIENCE))


def test_a_level_ends_when_the_smoothed_loss_falls_below_the_threshold():
    c = curriculum()
    steps = 1
    while not c.update(2.0 if steps <= 5 else 0.0):
        steps += 1
    # 2.0 * 0.9 ** n < 0.5 from n = 14 on
    assert steps == 5 + 14
    assert (c.level, c.smoothed, c.steps) == (1, None, 0)


def test_a_level_lasts_at_least_the_patience():
    c = curriculum()
    moved = [c.update(0.1) for _ in range(3 * PATIENCE)]
    assert [i + 1 for i, m in enumerate(moved) if m] == [PATIENCE, 2 * PATIENCE]
    assert c.segments == 8


def test_a_high_loss_stays():
    c = curriculum()
    assert not any(c.update(0.5) for _ in range(50))
    assert c.smoothed == pytest.approx(0.5)


def test_state_round_trip():
    c, d = curriculum(), curriculum()
    for loss in [3.0, 0.1, 0.2] * 5:
        c.update(loss)
    d.load(c.state())
    assert c.state() == d.state()
    assert [c.update(0.3) for _ in range(30)] == [d.update(0.3) for _ in range(30)]
