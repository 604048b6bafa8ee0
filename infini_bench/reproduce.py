"""``infini-bench reproduce``: everything that a table of the paper needs, from training to the printed table.

A job trains one model on one task, perhaps in stages that build on each other, and evaluates it; what is
recorded as done is skipped, and a job that fails does not stop the others.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from infini_bench import first_steps
from infini_bench.errors import UserError
from infini_bench.files import alone, atomic_write
from infini_bench.origin import TRAINED
from infini_bench.planned import Job, plan
from infini_bench.plans import read_plan
from infini_bench.progress import NullProgress, Progress
from infini_bench.report.check import Check, demo_checks
from infini_bench.report.records import Record, add_plan, config_hash, current, now, read_records
from infini_bench.report.tables import print_tables, write_report
from infini_bench.report.tidy import tidy
from infini_bench.schema import RunConfig
from infini_bench.standing import chain, planned_records, standing, there
from infini_bench.units import counted
from infini_bench.workers import Board, Relay, cores, run_all

WEIGHTS = {"train": 0.8, "eval": 0.2}  # of a job's time


@dataclass
class Outcome:
    """What came of a job: seconds spent on it now, and why it stopped short, if it did."""

    job: Job
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    error: str | None = None


def reproduce(
    what: str,
    scale: str = "laptop",
    out: Path | str | None = None,
    jobs: int | None = None,
    seeds: Sequence[int] | None = None,
    models: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | NullProgress | None = None,
    data: Path | None = None,
    only: str = "",
    following: int | None = None,
) -> int:
    """Run the plan ``what`` (a file of conf/plan/), print its tables and return the exit code.

    Records go to ``<out>/records``, run folders to ``<out>/runs``, tables to ``<out>/tables``, figures to
    ``<out>/figures``; out unset = ``runs/<what>``. models, seeds: unset = the plan's. data: the folder that
    the plan calls ``{data}``. only: jobs with all of these words in their names. following: only so many
    jobs that are missing, in the plan's order.
    jobs: how many run side by side; unset = one a core at small scales, else 1. Exit code
    1: a job failed, or the demo did not show what it must. Raises UserError for what does not exist.
    """
    started = time.monotonic()
    folder = Path(out or default_folder(what))
    asked = read_plan(what).at(scale)
    planned = plan(what, scale, folder, seeds, models, overrides, data, only)
    if following is not None:
        planned = [each.job for each in standing(planned) if each.state != "done"][:following]
        if not planned:
            print(f"Nothing of {what} is missing at scale={scale}.")
            return 0
    paths = {part.cfg.data.path for job in planned for part in job.trainings}
    for path in sorted(path for path in paths if path):
        if data is not None and not Path(path).exists():
            raise UserError(f"--data {data} lacks what {what} reads: {path} does not exist.")
    workers = min(jobs or (cores() if scale in ("smoke", "laptop") else 1), len(planned))
    board = Board(progress or Progress(), f"{what}, {counted(len(planned), 'job')}", len(planned), WEIGHTS)
    outcomes = run_all(planned, run_job, workers, board, _lost)
    every = read_records(folder / "records")
    records = planned_records(planned, every)
    if every:  # else all jobs failed before any work, and the summary says why
        write_report(folder / "records", folder / "tables")
    console = Console()
    print_tables(records, names=asked.tables)
    for words in first_steps.reading(records) if what == first_steps.NAME else []:
        console.print(words, soft_wrap=True, highlight=False)
    checks = demo_checks(tidy(records), tuple(models or asked.models)) if what == "demo" else []
    for line in summary(outcomes, checks, records, time.monotonic() - started, workers):
        console.print(line, soft_wrap=True)
    console.print(
        f"Tables: {folder / 'tables'}   records: {folder / 'records'}", soft_wrap=True, highlight=False
    )
    return int(any(outcome.error for outcome in outcomes) or not all(check.ok for check in checks))


def parse_seeds(text: str) -> list[int]:
    """``0,1,2`` as numbers. Raises UserError for anything else."""
    seeds = [part.strip() for part in text.split(",")]
    if not all(seed.isdecimal() for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(
            f'"{text}" is no list of seeds; write different whole numbers with commas, as in 0,1,2.'
        )
    return [int(seed) for seed in seeds]


def default_folder(what: str) -> Path:
    """Never the committed ``results/``: who wants a run there says ``--out results``."""
    return Path("runs") / what


def run_job(job: Job, board: Any) -> Outcome:
    """Train, then evaluate. Whatever goes wrong ends up in the outcome; surprises in full in ``job.log``.

    Raises KeyboardInterrupt if the training was asked to stop; the next time it goes on from there.
    """
    from infini_bench.run import run_eval, run_train
    from infini_bench.show import tell_choices

    outcome = Outcome(job)
    tell_choices()  # in this process, which may be one of several

    def timed(phase: str, run: Callable[..., Record], cfg: RunConfig, words: list[str]) -> Record:
        share = 1 / len(job.trainings) if phase == "train" else 1.0
        began, relay = now(), Relay(board, job.name, phase, share)
        record = run(cfg, command=["infini-bench", phase, *words], progress=relay)
        if record.started >= began:  # otherwise it was done before
            before = getattr(outcome, f"{phase}_seconds")
            setattr(outcome, f"{phase}_seconds", before + (record.seconds or 0.0))
        if record.status == "interrupted":
            raise KeyboardInterrupt
        return record

    try:
        if job.cfg.task.untrained:
            board.put(("start", job.name, "eval"))
            timed("eval", run_eval, job.cfg, [job.cfg.task.name, *job.settings])
        else:
            board.put(("start", job.name, "train"))
            trained = _trained(job, len(job.stages), partial(timed, "train", run_train))
            cfg = replace(job.cfg, checkpoint=trained.train["folder"])
            words = [word for word in job.settings if not word.startswith(("model=", "task=", *TRAINED))]
            board.put(("start", job.name, "eval"))
            timed("eval", run_eval, cfg, [cfg.task.name, f"--checkpoint={cfg.checkpoint}", *words])
    except UserError as error:
        outcome.error = str(error)
    except Exception as error:
        atomic_write(job.log, traceback.format_exc())
        outcome.error = f"{type(error).__name__}: {error} (see {job.log})"
    for found in planned_records([job], read_records(job.cfg.records)):
        add_plan(job.cfg.records, found, job.plan)
    for phase in WEIGHTS:  # also of what was skipped or never begun: there is no more to come
        board.put(("finish", job.name, phase))
    return outcome


def _trained(job: Job, number: int, train: Callable[[RunConfig, list[str]], Record]) -> Record:
    """The record of the job's ``trainings[number]``, which is run, after those before it, if it is not
    recorded or its folder is not here, and gone on with if it was interrupted.
    """
    from infini_bench.adapt import check_data

    part = job.trainings[number]
    with alone(_lock(job, number)) if part.stage else nullcontext():  # jobs side by side may share a stage
        same = chain(job, current(read_records(job.cfg.records)))[number]
        cfg, words, found = part.cfg, part.settings, there(same)
        if found and found.status == "done" and not cfg.force:
            return found
        if found and found.status != "done":
            cfg = replace(cfg, resume=found.train["folder"])
        elif number > 0:
            check_data(cfg)  # not only when its stages are trained
            cfg, words = _gone_on(words, _trained(job, number - 1, train).train["folder"])
        cfg = replace(cfg, force=cfg.force or any(r.status == "done" for r in same))  # its folder is gone
        try:
            return train(cfg, words)
        except UserError as error:
            raise UserError(f"stage {part.stage}: {error}" if part.stage else str(error)) from error


def _lock(job: Job, number: int) -> Path:
    digests = [config_hash(asdict(part.cfg)) for part in job.stages[: number + 1]]
    return Path(job.cfg.runs) / f".{'-'.join(digests)}.lock"


def _gone_on(words: list[str], run: str) -> tuple[RunConfig, list[str]]:
    """The training of these overrides with the model of the run in folder ``run`` as its base."""
    from infini_bench.adapt import on
    from infini_bench.cli.bridge import compose_run

    kept = [word for word in words if not word.startswith(("base.model=", "data.tokenizer="))]
    words = [*kept, *on(run)]
    return compose_run(words), words


def _lost(job: Job) -> Outcome:
    return Outcome(job, error="its process was killed twice, perhaps for want of memory")


def summary(
    outcomes: list[Outcome], checks: list[Check], records: list[Record], seconds: float, workers: int
) -> list[Text]:
    """What failed, what the demo shows, and what it took."""
    failed = [o for o in outcomes if o.error]
    lines = [Text(f"failed: {o.job.name}: {o.error}", "red") for o in failed]
    for check in checks:
        lines.append(Text(f"{'ok  ' if check.ok else 'MISS'} {check.text}", "" if check.ok else "red"))
    if checks:
        lines.append(Text(f"{sum(check.ok for check in checks)} of {len(checks)} checks passed.", "bold"))
    train, evaluation = sum(o.train_seconds for o in outcomes), sum(o.eval_seconds for o in outcomes)
    peak = max((r.peak_bytes or 0 for r in records), default=0)
    took = f"{counted(len(outcomes), 'job')}, {workers} at a time, in {seconds:.0f} s: {train:.0f} s of "
    took += f"training and {evaluation:.0f} s of evaluation (what was done before left out), "
    return [*lines, Text(f"{took}at most {peak / 2**20:.0f} MiB of memory in a process.")]
