"""metrics.jsonl: one JSON line a logged step, each step once, also after crashes and resumes."""

from __future__ import annotations

import json
import os
from pathlib import Path

from infini_bench.errors import UserError
from infini_bench.files import atomic_write


class MetricsLog:
    """Appends lines to ``path``, first dropping what a dead run logged after ``step`` (0 = everything)."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [line for line in read_log(path) if line["step"] <= step]
        atomic_write(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: dict) -> None:
        """Appends a line and hands it to the system, so that killing this process loses nothing of it."""
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"Cannot write {self.path} ({error.strerror}); free some space and resume."
            ) from error

    def sync(self) -> None:
        """Forces the lines to the disk: a checkpoint is never newer than its log."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def curve(path: Path, most: int = 100) -> list[dict]:
    """What a record keeps of a training's log: at most ``most`` lines, evenly spread, the last one among
    them; and that of the lowest validation loss: the step that a run with ``trainer.best`` stands for.

    Keys: step, tokens, task_loss (nats), level (segments), gates (mean, min, max by layer; None without),
    validation_loss where it was measured, and write, where writing has a cost: mean strength by layer over
    the last call of this process.
    """
    lines = read_log(path)
    places = {round(i * (len(lines) - 1) / max(most - 1, 1)) for i in range(most)} if lines else set()
    validated = [place for place, line in enumerate(lines) if "validation_loss" in line]
    best = min(validated, key=lambda place: lines[place]["validation_loss"], default=None)
    return [_point(line) for place, line in enumerate(lines) if place in places or place == best]


def _point(line: dict) -> dict:
    gates = line.get("gates")
    short = gates and {name: [round(gate, 4) for gate in gates[name]] for name in ("mean", "min", "max")}
    point = {**{key: line[key] for key in ("step", "tokens", "task_loss", "level")}, "gates": short}
    return point | {key: line[key] for key in ("validation_loss", "write") if key in line}


def read_log(path: Path) -> list[dict]:
    """Lines of a log, without a last one that a crash cut off. Raises UserError for any other broken line."""
    if not path.exists():
        return []
    *lines, unfinished = path.read_bytes().split(b"\n")
    del unfinished  # what follows the last line end: nothing, or a line cut off in the middle
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:  # not JSON, or not UTF-8
            raise UserError(f"{path}, line {number} is not JSON; remove that line and resume.") from error
    return entries
