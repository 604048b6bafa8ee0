"""What one job of a verb does, and what is told of many. Knows no Hydra; heavy imports wait for the work."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infini_bench.errors import UserError
from infini_bench.files import read_json, write_json
from infini_bench.schema import RunConfig
from infini_bench.units import counted

if TYPE_CHECKING:
    from infini_bench.report.records import Record

PROGRAM = "infini-bench"


@dataclass(frozen=True)
class Job:
    """One run of ``train`` or ``eval``.

    overrides: of this job. given: the names in them. recompose: the configuration with other overrides added.
    """

    verb: str
    cfg: RunConfig
    overrides: list[str]
    given: frozenset[str]
    recompose: Callable[[list[str]], RunConfig]

    def run(self) -> Record:
        """Raises KeyboardInterrupt if the run was asked to stop."""
        record = self._train() if self.verb == "train" else self._eval()
        if record.status == "interrupted":
            raise KeyboardInterrupt
        return record

    def run_in_sweep(self, number: int, folder: Path) -> None:
        """The same, but a failure is written to ``folder`` instead of raised, so that the sweep goes on."""
        words = " ".join(self.overrides)
        outcome: dict[str, Any] = {"job": number, "overrides": words, "error": None, "user": False}
        print(f"[job {number}] {words}", flush=True)
        try:
            outcome["id"] = self.run().id
        except UserError as error:
            outcome |= {"error": str(error), "user": True}
        except Exception as error:
            traceback.print_exc()
            outcome |= {"error": f"{type(error).__name__}: {error}"}
        write_json(folder / f"job-{number:04d}.json", outcome)

    def _train(self) -> Record:
        from infini_bench.run import run_train

        return run_train(self.cfg, given=self.given, command=[PROGRAM, "train", *self.overrides])

    def _eval(self) -> Record:
        from infini_bench.origin import bare_base, find_origin, trained_config
        from infini_bench.run import run_eval

        cfg = self.cfg
        trained = not (cfg.task.untrained or cfg.task.weightless or bare_base(cfg))
        if "scale" not in self.given and trained:  # the recipe of the checkpoint's scale fits it best
            path, _ = find_origin(cfg, cfg.model if "model" in self.given else None)
            cfg = self.recompose([f"scale={trained_config(path).scale}"])
        task = cfg.task.name
        words = [word for word in self.overrides if word != f"task={task}"]
        return run_eval(cfg, given=self.given - {"task"}, command=[PROGRAM, "eval", task, *words])


def summarize(folder: Path) -> int:
    """Tell how a sweep's jobs ended; returns the exit code: 2 if all failures were the user's, else 1."""
    outcomes = [read_json(path) for path in sorted(folder.glob("job-*.json"))]
    failed = [outcome for outcome in outcomes if outcome["error"] is not None]
    print(f"{counted(len(outcomes), 'job')}: {len(outcomes) - len(failed)} done, {len(failed)} failed")
    for outcome in failed:
        print(f"error: job {outcome['job']} ({outcome['overrides']}): {outcome['error']}", file=sys.stderr)
    return 0 if not failed else 2 if all(outcome["user"] for outcome in failed) else 1
