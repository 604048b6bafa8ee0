"""Where the jobs of a plan stand by the records, and what of a job is there already."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from infini_bench.config import TASKS
from infini_bench.planned import Job
from infini_bench.report.adapted import run_before, run_name
from infini_bench.report.records import KILLED, Record, config_hash, current, read_records
from infini_bench.report.variants import COVERAGE
from infini_bench.schema import RunConfig

# What only an evaluation reads, and who computes the same.
EVALUATED = (*COVERAGE, "task.split", "precision", "memory.backend")
SAVED = "checkpoints/index.json"  # of a run folder that can be gone on with


@dataclass(frozen=True)
class Standing:
    """Where a job stands by the records. seconds: of its training and evaluation so far, where known; a stage
    that jobs share counts in each of them.

    state: done | trained | interrupted | failed | missing; of a job whose own training has not begun, how the
    last of its stages ended (``pretrain done``).
    """

    job: Job
    state: str
    seconds: float
    records: list[str]


def standing(jobs: Sequence[Job]) -> list[Standing]:
    """The jobs in their order, each with what is recorded of it."""
    found = current(read_records(jobs[0].cfg.records))
    return [_standing(job, found) for job in jobs]


def _standing(job: Job, records: list[Record]) -> Standing:
    own = planned_records([job], records)
    *stages, training = chain(job, records)
    evaluation = [r for r in own if r.kind == "eval" and r.task == job.cfg.task.name]
    begun = [f"{part.stage} {same[-1].status}" for part, same in zip(job.stages, stages, strict=True) if same]
    state = begun[-1] if begun else "missing"
    if evaluation and evaluation[-1].status == "done":
        state = "done"
    elif training:
        state = {"done": "trained"}.get(training[-1].status, training[-1].status)
    elif evaluation:
        state = evaluation[-1].status
    return Standing(job, state, sum(r.seconds or 0.0 for r in own), [r.id for r in own])


def standing_text(found: list[Standing], every: bool = True, following: int | None = None) -> str:
    """Markdown: a line a job, as results/README.md keeps them. every: those that are done, too; following:
    only so many.
    """
    shown = _shown(found, every, following)
    lines = [f"| {each.job.name} | {each.state} | {each.seconds:.0f} |" for each in shown]
    done = sum(each.state == "done" for each in found)
    head = ["| run | state | seconds |", "| :-- | :-- | --: |"]
    return "\n".join([*head, *lines, "", f"{done} of {len(found)} runs are done."])


def standing_json(found: list[Standing], every: bool = True, following: int | None = None) -> str:
    """A JSON line a job: name, state, seconds, records, overrides, and the stages with theirs."""
    rows = [
        {
            "job": each.job.name,
            "state": each.state,
            "seconds": round(each.seconds, 1),
            "records": each.records,
            "settings": each.job.settings,
            "stages": {part.stage: part.settings for part in each.job.stages},
        }
        for each in _shown(found, every, following)
    ]
    return "\n".join(json.dumps(row) for row in rows)


def _shown(found: list[Standing], every: bool, following: int | None) -> list[Standing]:
    return [each for each in found if every or each.state != "done"][:following]


def planned_records(jobs: Sequence[Job], records: list[Record]) -> list[Record]:
    """Those of the plan's trainings and of their evaluations, on the plan's task by the split that it asks;
    a folder may hold others, of other settings.
    """
    trainings, asked = set(), set()
    for job in jobs:
        found = chain(job, records)
        trainings |= {r.id for same in found for r in same}
        own = set() if job.stages else {config_hash(asdict(job.cfg))}
        place = (job.cfg.task.name, getattr(job.cfg.task, "split", None))
        asked |= {(digest, *place) for digest in own | {r.config_hash for r in found[-1]}}
    return [r for r in records if r.id in trainings or any(_asks(r, *each) for each in asked)]


def _asks(record: Record, digest: str, task: str, split: str | None) -> bool:
    """Whether a record is of this run, or of another task's question to it."""
    same = digest in (record.config_hash, record.train.get("config_hash"))
    return same and (record.task != task or record.config["task"].get("split", split) == split)


def chain(job: Job, records: list[Record]) -> list[list[Record]]:
    """The recorded trainings of each of the job's stages and, last, of its own: those that went on from one
    of the stage before.
    """
    trainings = [r for r in records if r.kind == "train"]
    runs = {run_name(r) for r in trainings}
    found: list[list[Record]] = []
    before: set[str | None] = {None}
    for part in job.trainings:
        digest = config_hash(asdict(part.cfg))
        same = [r for r in trainings if run_before(r, runs) in before]
        found.append([r for r in same if _digest(r, part.cfg, len(found) > 0) == digest])
        before = {run_name(r) for r in found[-1]}
    return found


def _digest(record: Record, cfg: RunConfig, later: bool) -> str:
    """The hash that ``cfg`` has if this is its training.

    No job knows before it is run which architecture a pretrained model has; of a later stage in which folder
    the run is that it goes on from, with the tokenizer there; where the data of a recorded run lay; and what
    was asked of the model afterwards.
    """
    config, data = record.config, {}
    alike = all(config[key] == getattr(cfg, key) for key in ("model", "scale", "seed"))
    if not alike or record.task != cfg.task.name or config_hash(config) != record.config_hash:
        return record.config_hash  # which may count more than the settings: other lengths of a longer run
    if _moved(config["data"].get("path"), cfg.data.path):
        data["path"] = cfg.data.path
    if cfg.base.model is not None and (config.get("base") or {}).get("model") is not None:
        config = {**config, "decoder": asdict(cfg.decoder)}
        if later:
            config["base"] = {**config["base"], "model": cfg.base.model}
            data["tokenizer"] = cfg.data.tokenizer
    return config_hash(_as_asked({**config, "data": {**config["data"], **data}}, asdict(cfg)))


def _as_asked(recorded: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """A training's settings: those younger than its record at their defaults, which is how it behaved, and
    those that no training reads as ``asked``.
    """
    config = asdict(RunConfig(task=TASKS[asked["task"]["name"]]()))
    for key, value in recorded.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    for key in EVALUATED:
        *section, name = key.split(".")
        values, own = (reduce(dict.__getitem__, section, each) for each in (asked, config))
        own.update({name: values[name]} if name in values else {})
    return config


def _moved(recorded: str | None, asked: str | None) -> bool:
    """Whether two paths are of the same data, known by their name; where both are here, they must be one."""
    if recorded is None or asked is None or recorded == asked or Path(recorded).name != Path(asked).name:
        return False
    return not (Path(recorded).exists() and Path(asked).exists()) or Path(recorded).samefile(asked)


def there(same: Sequence[Record]) -> Record | None:
    """Of a training and its repetitions the newest whose folder is here, and that is done or can be gone on
    with.
    """
    return next((r for r in reversed(same) if _there(r)), None)


def _there(record: Record) -> bool:
    if not (folder := record.train.get("folder")) or not Path(folder).is_dir():
        return False
    killed = record.status == "failed" and record.error == KILLED and (Path(folder) / SAVED).exists()
    return killed or record.status in ("done", "interrupted")
