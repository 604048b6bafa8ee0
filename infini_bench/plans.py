"""Plans of ``infini-bench reproduce``: what to train and evaluate for a table, as data in ``conf/plan/``.

# One line: the question that it answers
tasks: {recall: ["task.trials=100"], lm: []}   # with settings of their own
models: [infini_linear, infini_delta]          # or: all
tables: [diag_recall]                          # printed at the end

All that follows may be left out:

grid: {memory.features: [elu1, relu2]}         # every combination of these ...
variants: {name: [memory.gate_split=2]}        # ... with each of these; or, of some models and seeds only,
                                               # name: {overrides: [...], models: [...], seeds: [0, 1]}; such
                                               # models need not be among the plan's. With stages: [pretrain]
                                               # a pretrained model goes through these stages of `adapt` first
overrides: []                                  # for every job
each: {memorizing: [memory.entries=16384]}     # for the jobs of one model
seeds: [0, 1, 2]                               # unset = 0
scales: {gpu: {overrides: [...]}}              # what is otherwise at a scale: any of the above; with
                                               # like: PLAN what that plan has there, with our `overrides`
                                               # and `each` behind its own and all else of ours instead

``{data}`` in an override stands for the folder of ``--data``. A stage has the overrides that name the model
and its memory, and those that begin with its name, for it alone: ``pretrain.trainer.steps=100``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from infini_bench.errors import UserError
from infini_bench.units import suggest

CONF = Path(str(files("infini_bench.conf")))
DATA = "{data}"


@dataclass(frozen=True)
class Setting:
    """What tells the jobs of one variant and point of the grid from others. None = the plan's own."""

    name: str  # empty if there is one only
    overrides: list[str]
    models: list[str] | None = None
    seeds: list[int] | None = None
    stages: list[str] = field(default_factory=list)  # of `adapt`, before the training itself


@dataclass(frozen=True)
class Plan:
    """A file of ``conf/plan/``; ``models`` are names."""

    name: str
    tasks: dict[str, list[str]]
    models: list[str]
    tables: list[str]
    grid: dict[str, list[Any]] = field(default_factory=dict)
    variants: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    each: dict[str, list[str]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    scales: dict[str, dict[str, Any]] = field(default_factory=dict)

    def at(self, scale: str) -> Plan:
        """The plan as it is at a scale."""
        return replace(self, **self.scales.get(scale, {}))

    def settings(self) -> Iterator[Setting]:
        axes = [[f"{key}={_text(value)}" for value in values] for key, values in self.grid.items()]
        for name, given in (self.variants or {"": []}).items():
            variant = given if isinstance(given, dict) else {"overrides": given}
            for point in product(*axes):
                words = [*self.overrides, *variant["overrides"], *point]
                known = {key: value for key, value in variant.items() if key != "overrides"}
                yield Setting(" ".join([name, *point]).strip(), words, **known)

    def words(self) -> Iterator[str]:
        """All overrides of its jobs."""
        for part in (*self.tasks.values(), *self.each.values(), *(one.overrides for one in self.settings())):
            yield from part


def plan_names() -> list[str]:
    return sorted(path.stem for path in (CONF / "plan").glob("*.yaml"))


def read_plan(name: str) -> Plan:
    """Raises UserError for a plan that does not exist."""
    if name not in plan_names():
        there = f"choose one of {', '.join(plan_names())}"
        raise UserError(f'There is no "{name}" to reproduce{suggest(name, plan_names())}; {there}.')
    values = yaml.safe_load((CONF / "plan" / f"{name}.yaml").read_text(encoding="utf-8"))
    if unknown := [key for key in values if key not in {each.name for each in fields(Plan)}]:
        raise UserError(f'Plan {name} has an entry "{unknown[0]}" that no plan can have.')
    for scale, given in values.get("scales", {}).items():
        if "like" in given:
            values["scales"][scale] = _joined(read_plan(given.pop("like")).scales[scale], given)
    if values["models"] == "all":
        values["models"] = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
    return Plan(name, **values)


def _joined(other: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """What another plan has at a scale, with ``own`` added to it or in its place."""
    made = {**other, **own}
    if "overrides" in own:
        made["overrides"] = [*other.get("overrides", []), *own["overrides"]]
    if "each" in own:
        both = other.get("each", {}), own["each"]
        names = {**both[0], **both[1]}
        made["each"] = {name: [word for part in both for word in part.get(name, [])] for name in names}
    return made


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
