"""Curriculum over the number of segments: the next level starts when the smoothed task loss is low enough."""

from __future__ import annotations

from dataclasses import dataclass

from infini_bench.schema import TrainerConfig

SMOOTHING = 0.9  # of the running mean of the task loss
PATIENCE = 10  # steps at a level before it can be left: about what the running mean averages over


@dataclass
class Curriculum:
    """Where a run stands in ``trainer.curriculum``; an empty list is one level, the task's own length.

    level: index of the level. smoothed: running mean of the task loss in nats, and steps, both at this level.
    """

    cfg: TrainerConfig
    level: int = 0
    smoothed: float | None = None
    steps: int = 0

    @property
    def segments(self) -> int | None:
        """Segments of a training sequence now; None = the task's own length."""
        return self.cfg.curriculum[self.level] if self.cfg.curriculum else None

    @property
    def longest(self) -> int | None:
        """Segments at the last level, which validation uses throughout; None = the task's own length."""
        return self.cfg.curriculum[-1] if self.cfg.curriculum else None

    @property
    def rows(self) -> int:
        """Rows of a micro-batch: ``batch`` at the longest level, more at shorter ones (same tokens)."""
        if self.segments is None or self.longest is None:
            return self.cfg.batch
        return self.cfg.batch * self.longest // self.segments

    @property
    def at_once(self) -> int:
        """Rows of a micro-batch that are read together: no more activations than at the longest level.

        ``checkpoint_segments`` bounds those of a row, and shorter levels have more rows.
        """
        kept = self.cfg.checkpoint_segments
        if self.segments is None or self.longest is None or kept is None:
            return self.rows
        return max(1, self.cfg.batch * min(kept, self.longest) // min(kept, self.segments))

    def update(self, task_loss: float) -> bool:
        """Takes in a step's task loss; returns whether the next level starts with the next step."""
        before = task_loss if self.smoothed is None else self.smoothed
        self.smoothed = SMOOTHING * before + (1 - SMOOTHING) * task_loss
        self.steps += 1
        last = self.level + 1 >= len(self.cfg.curriculum)
        if last or self.steps < PATIENCE or self.smoothed >= self.cfg.curriculum_loss:
            return False
        self.level, self.smoothed, self.steps = self.level + 1, None, 0
        return True

    def state(self) -> dict:
        return {"level": self.level, "smoothed": self.smoothed, "steps": self.steps}

    def load(self, state: dict) -> None:
        self.level, self.smoothed, self.steps = state["level"], state["smoothed"], state["steps"]
