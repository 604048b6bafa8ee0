"""``infini-bench reproduce``: everything that a table of the paper needs, from training to the printed table.

A job trains one model on one task and evaluates it; what is recorded as done is skipped, and a job that fails
does not stop the others.
"""

from __future__ import annotations

import json
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from infini_bench import first_steps
from infini_bench.errors import UserError
from infini_bench.files import atomic_write
from infini_bench.origin import TRAINED
from infini_bench.plans import DATA, Plan, Setting, read_plan
from infini_bench.progress import NullProgress, Progress
from infini_bench.report.check import Check, demo_checks
from infini_bench.report.records import KILLED, Record, add_plan, config_hash, current, now, read_records
from infini_bench.report.tables import print_tables, write_report
from infini_bench.report.tidy import tidy
from infini_bench.schema import RunConfig
from infini_bench.units import suggest
from infini_bench.unread import check_read
from infini_bench.workers import Board, Relay, cores, run_all

SAVED = "checkpoints/index.json"  # of a run folder that can be gone on with
WEIGHTS = {"train": 0.8, "eval": 0.2}  # of a job's time


@dataclass(frozen=True)
class Job:
    """One model on one task, in one variant."""

    name: str
    cfg: RunConfig
    settings: list[str]  # overrides that say the same by hand
    log: Path  # what went wrong, if anything did
    plan: str  # noted in the records


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
    tables, models = read_plan(what).at(scale).tables, models or read_plan(what).at(scale).models
    planned = plan(what, scale, folder, seeds, models, overrides, data, only)
    if following is not None:
        planned = [each.job for each in standing(planned) if each.state != "done"][:following]
        if not planned:
            print(f"Nothing of {what} is missing at scale={scale}.")
            return 0
    if not planned:
        raise UserError(f"There is nothing to do for {what} at scale={scale} with these models and names.")
    for path in sorted({job.cfg.data.path for job in planned if job.cfg.data.path}):
        if data is not None and not Path(path).exists():
            raise UserError(f"--data {data} lacks what {what} reads: {path} does not exist.")
    workers = min(jobs or (cores() if scale in ("smoke", "laptop") else 1), len(planned))
    board = Board(progress or Progress(), f"{what}, {len(planned)} jobs", len(planned), WEIGHTS)
    outcomes = run_all(planned, run_job, workers, board, _lost)
    records = _planned_records(planned, read_records(folder / "records"))
    write_report(folder / "records", folder / "tables")
    console = Console()
    print_tables(records, names=tables)
    for words in first_steps.reading(records) if what == first_steps.NAME else []:
        console.print(words, soft_wrap=True, highlight=False)
    checks = demo_checks(tidy(records), tuple(models)) if what == "demo" else []
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


def plan(
    what: str,
    scale: str,
    out: Path,
    seeds: Sequence[int] | None,
    models: Sequence[str] | None,
    overrides: Sequence[str] = (),
    data: Path | None = None,
    only: str = "",
) -> list[Job]:
    """The jobs of a plan, checked: first seeds first, then in the order of tasks, settings and models.

    models, seeds: unset = the plan's; a setting that names its own has the jobs that both allow. overrides: a
    setting of a memory is refused if none of the jobs reads it.
    """
    from infini_bench.cli.bridge import compose_run, given

    if data is not None and not data.is_dir():
        raise UserError(f"--data {data} is no folder.")
    plan = read_plan(what).at(scale)
    places = (f"scale={scale}", f"records={out / 'records'}", f"runs={out / 'runs'}")
    jobs: list[tuple[int, Job]] = []
    named: set[str] = set()
    for (task, own), (setting, model) in product(plan.tasks.items(), [*_rows(plan, models)]):
        words = [f"model={model}", f"task={task}", *places, *own, *setting.overrides]
        words = _filled([*words, *plan.each.get(model, []), *overrides], data)
        names = {
            seed: " ".join([task, model, *([setting.name] if setting.name else []), f"seed {seed}"])
            for seed in _seeds(seeds, setting.seeds, plan.seeds)
        }
        named |= {word for name in names.values() for word in name.split()}
        kept = {seed: name for seed, name in names.items() if set(only.split()) <= set(name.split())}
        if not kept:  # settings need only fit what is run
            continue
        cfg = compose_run(words)
        for seed, name in kept.items():
            parts = [task, model, re.sub(r"[^\w.=-]+", "-", setting.name), f"seed{seed}"]
            log = out / "logs" / f"{'-'.join(part for part in parts if part)}.txt"
            job = Job(name, replace(cfg, seed=seed), [*words, f"seed={seed}"], log, plan.name)
            jobs.append((seed if seeds is None else seeds.index(seed), job))
    for word in (word for word in only.split() if word not in named):
        raise UserError(f'No run of {what} has "{word}" in its name{suggest(word, sorted(named))}.')
    check_read(given(overrides), [job.cfg for _, job in jobs])
    return [job for _, job in sorted(jobs, key=lambda pair: pair[0])]


def _rows(plan: Plan, asked: Sequence[str] | None) -> Iterator[tuple[Setting, str]]:
    for setting in plan.settings():
        known = plan.models if setting.models is None else setting.models
        for model in asked or known:
            if setting.models is None or model in known:
                yield setting, model


def _seeds(asked: Sequence[int] | None, own: list[int] | None, planned: list[int]) -> list[int]:
    if asked is None:
        return planned if own is None else own
    return [seed for seed in asked if own is None or seed in own]


def _filled(words: list[str], data: Path | None) -> list[str]:
    """Overrides with the folder of ``--data`` in them. Raises UserError if it is needed and not given."""
    from infini_bench.cli.bridge import quote

    if data is None and any(DATA in word for word in words):
        raise UserError("This plan reads local sets: name the folder that holds them with --data FOLDER.")
    filled = []
    for word in words:
        key, _, value = word.partition("=")
        filled.append(f"{key}={quote(value.replace(DATA, str(data)))}" if DATA in value else word)
    return filled


@dataclass(frozen=True)
class Standing:
    """Where a job stands by the records. seconds: of its training and evaluation so far, where known."""

    job: Job
    state: str  # done | trained | interrupted | failed | missing
    seconds: float
    records: list[str]


def standing(jobs: Sequence[Job]) -> list[Standing]:
    """The jobs in their order, each with what is recorded of it."""
    found = current(read_records(jobs[0].cfg.records)) if jobs else []
    return [_standing(job, found) for job in jobs]


def _standing(job: Job, records: list[Record]) -> Standing:
    own = _planned_records([job], records)
    training = [r for r in own if r.kind == "train"]
    evaluation = [r for r in own if r.kind == "eval"]
    state = "missing"
    if evaluation and evaluation[-1].status == "done":
        state = "done"
    elif training:
        state = {"done": "trained"}.get(training[-1].status, training[-1].status)
    elif evaluation:
        state = evaluation[-1].status
    return Standing(job, state, sum(r.seconds or 0.0 for r in own), [r.id for r in own])


def standing_text(found: list[Standing], every: bool = True) -> str:
    """Markdown: a line a job, as results/README.md keeps them. every: those that are done, too."""
    shown = [each for each in found if every or each.state != "done"]
    lines = [f"| {each.job.name} | {each.state} | {each.seconds:.0f} |" for each in shown]
    done = sum(each.state == "done" for each in found)
    head = ["| run | state | seconds |", "| :-- | :-- | --: |"]
    return "\n".join([*head, *lines, "", f"{done} of {len(found)} runs are done."])


def standing_json(found: list[Standing], every: bool = True) -> str:
    """A JSON line a job: name, state, seconds, records, overrides and log."""
    rows = [
        {
            "job": each.job.name,
            "state": each.state,
            "seconds": round(each.seconds, 1),
            "records": each.records,
            "settings": each.job.settings,
        }
        for each in found
        if every or each.state != "done"
    ]
    return "\n".join(json.dumps(row) for row in rows)


def run_job(job: Job, board: Any) -> Outcome:
    """Train, then evaluate. Whatever goes wrong ends up in the outcome; surprises in full in ``job.log``.

    Raises KeyboardInterrupt if the training was asked to stop; the next time it goes on from there.
    """
    from infini_bench.run import run_eval, run_train

    outcome = Outcome(job)

    def timed(phase: str, run: Callable[..., Record], cfg: RunConfig, words: list[str]) -> Record:
        board.put(("start", job.name, phase))
        began = now()
        record = run(cfg, command=["infini-bench", phase, *words], progress=Relay(board, job.name, phase))
        if record.started >= began:  # otherwise it was done before
            setattr(outcome, f"{phase}_seconds", record.seconds)
        if record.status == "interrupted":
            raise KeyboardInterrupt
        return record

    try:
        if job.cfg.task.untrained:
            timed("eval", run_eval, job.cfg, [job.cfg.task.name, *job.settings])
        else:
            trained = timed("train", run_train, _startable(job), job.settings)
            cfg = replace(job.cfg, checkpoint=trained.train["folder"])
            words = [word for word in job.settings if not word.startswith(("model=", "task=", *TRAINED))]
            timed("eval", run_eval, cfg, [cfg.task.name, f"--checkpoint={cfg.checkpoint}", *words])
    except UserError as error:
        outcome.error = str(error)
    except Exception as error:
        atomic_write(job.log, traceback.format_exc())
        outcome.error = f"{type(error).__name__}: {error} (see {job.log})"
    for found in _planned_records([job], read_records(job.cfg.records)):
        add_plan(job.cfg.records, found, job.plan)
    for phase in WEIGHTS:  # also of what was skipped or never begun: there is no more to come
        board.put(("finish", job.name, phase))
    return outcome


def _startable(job: Job) -> RunConfig:
    """The job's ``cfg``, set to go on with its interrupted run, or to run again if a finished run's folder
    is gone."""
    cfg, records = job.cfg, current(read_records(job.cfg.records))
    digests = _trainings([job], records)
    same = [r for r in records if r.kind == "train" and r.config_hash in digests]
    if not same:
        return cfg
    newest = same[-1]
    folder = newest.train.get("folder", "")
    there = bool(folder) and Path(folder).is_dir()
    if newest.status == "done":
        return cfg if there else replace(cfg, force=True)
    killed = newest.status == "failed" and newest.error == KILLED and (Path(folder) / SAVED).exists()
    return replace(cfg, resume=folder) if there and (newest.status == "interrupted" or killed) else cfg


def _planned_records(jobs: Sequence[Job], records: list[Record]) -> list[Record]:
    """Those of the plan's trainings and of their evaluations; a folder may hold others, of other settings."""
    digests = _trainings(jobs, records)
    return [r for r in records if {r.config_hash, r.train.get("config_hash")} & digests]


def _trainings(jobs: Sequence[Job], records: list[Record]) -> set[str]:
    """Hashes of the jobs' configurations, and of recorded trainings that differ in the decoder alone: a run
    on a pretrained model has that model's, which no job knows before it is read."""
    digests = {config_hash(asdict(job.cfg)) for job in jobs}
    jobs_own = {json.dumps(asdict(job.cfg.decoder)) for job in jobs if job.cfg.base.model is not None}
    based = [r for r in records if r.kind == "train" and r.config.get("base", {}).get("model") is not None]
    pairs = [(r, {**r.config, "decoder": json.loads(text)}) for r in based for text in jobs_own]
    return digests | {r.config_hash for r, config in pairs if config_hash(config) in digests}


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
    took = f"{len(outcomes)} jobs, {workers} at a time, in {seconds:.0f} s: {train:.0f} s of training and "
    took += f"{evaluation:.0f} s of evaluation (what was done before left out), "
    return [*lines, Text(f"{took}at most {peak / 2**20:.0f} MiB of memory in a process.")]
