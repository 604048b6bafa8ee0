"""The jobs of a plan: what is trained and evaluated, as configurations that fit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from infini_bench.errors import UserError
from infini_bench.origin import PLACES
from infini_bench.plans import DATA, Plan, Setting, read_plan
from infini_bench.schema import RunConfig
from infini_bench.units import suggest
from infini_bench.unread import check_read

# Settings that jobs are known by or that keep them together, and who says them.
SAID = {"task": "the plan", "model": "--models", "seed": "--seeds", "scale": "--scale"}
SAID |= dict.fromkeys(("runs", "records"), "--out")
# Settings that a stage has in common with the trainings after it.
COMMON = ("model", "scale", "decoder", "memory", "base", "data.tokenizer", *PLACES)


@dataclass(frozen=True)
class Training:
    """settings: overrides that say the same as ``cfg`` by hand. stage: its name; empty = the job's own."""

    cfg: RunConfig
    settings: list[str]
    stage: str = ""


@dataclass(frozen=True)
class Job:
    """One model on one task, in one variant.

    stages: trainings before its own, each of which goes on from the one before it. All of them name the
    pretrained model as their base: which run it is in the end is known when they are run.
    """

    name: str
    cfg: RunConfig
    settings: list[str]  # overrides that say the same by hand
    log: Path  # what went wrong, if anything did
    plan: str  # noted in the records
    stages: tuple[Training, ...] = ()

    @property
    def trainings(self) -> tuple[Training, ...]:
        return (*self.stages, Training(self.cfg, self.settings))


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
    setting of a memory is refused if none of the jobs reads it, one of a stage if none of them has it; so is
    ``data`` if no override of the plan at this scale names it.
    """
    from infini_bench.adapt import of_stage
    from infini_bench.cli.bridge import compose_run

    for word in overrides:
        if says := SAID.get(word.lstrip("+~").partition("=")[0]):
            raise UserError(f'"{word}": what a plan runs is said by {says}; leave it out.')
    if data is not None and not data.is_dir():
        raise UserError(f"--data {data} is no folder.")
    plan = read_plan(what).at(scale)
    if data is not None and not any(DATA in word for word in [*plan.words(), *overrides]):
        raise UserError(f"{what} at scale={scale} reads no sets of yours; leave --data out.")
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
        last = Training(compose_run(of_stage("", words)), of_stage("", words))
        stages = _stages(setting, words, last)
        for seed, name in kept.items():
            parts = [task, model, re.sub(r"[^\w.=-]+", "-", setting.name), f"seed{seed}"]
            log = out / "logs" / f"{'-'.join(part for part in parts if part)}.txt"
            *before, trained = (_seeded(part, seed) for part in (*stages, last))
            job = Job(name, trained.cfg, trained.settings, log, plan.name, tuple(before))
            jobs.append((seed if seeds is None else seeds.index(seed), job))
    for word in (word for word in only.split() if word not in named):
        raise UserError(f'No run of {what} has "{word}" in its name{suggest(word, sorted(named))}.')
    if not jobs:
        raise UserError(f"There is no run of {what} at scale={scale} with these models, seeds and names.")
    _check_overrides(overrides, [part for _, job in jobs for part in job.trainings])
    return [job for _, job in sorted(jobs, key=lambda pair: pair[0])]


def _stages(setting: Setting, words: Sequence[str], last: Training) -> list[Training]:
    """The stages before the training ``last``. Of the overrides ``words`` each has those that are COMMON to
    all trainings, and those that begin with its name.
    """
    from infini_bench.adapt import OF_STAGE, check_memory, check_stages, of_stage, stage_words
    from infini_bench.cli.bridge import compose_run

    check_stages(setting.stages, [])
    base = last.cfg.base.model  # wherever that is said: also in an experiment of the training's own
    if setting.stages and base is None:
        raise UserError(f"The stages of {setting.name} are for a pretrained model; set base.model.")
    common = [word for word in words if OF_STAGE.fullmatch(word) or _is_common(word)]
    stages = []
    for name in setting.stages:
        settings = stage_words(str(base), name, of_stage(name, common))
        stages.append(Training(compose_run(settings), settings, name))
        check_memory(name, stages[-1].cfg, last.cfg)
    return stages


def _is_common(word: str) -> bool:
    key = word.lstrip("+~").partition("=")[0]
    return key != "base.model" and any(f"{key}.".startswith(f"{common}.") for common in COMMON)


def _seeded(part: Training, seed: int) -> Training:
    return replace(part, cfg=replace(part.cfg, seed=seed), settings=[*part.settings, f"seed={seed}"])


def _check_overrides(overrides: Sequence[str], trainings: list[Training]) -> None:
    """Raises UserError for one that no training reads, and for one of a stage that is not among them."""
    from infini_bench.adapt import check_stages, of_stage
    from infini_bench.cli.bridge import given

    stages = dict.fromkeys(part.stage for part in trainings if part.stage)
    check_stages([*stages], overrides)
    check_read(given(of_stage("", overrides)), [part.cfg for part in trainings])
    for stage in stages:
        check_read(given(of_stage(stage, overrides)), [part.cfg for part in trainings if part.stage == stage])


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
