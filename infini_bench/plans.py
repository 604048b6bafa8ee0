"""Plans of ``infini-bench reproduce``: what to train and evaluate for a table, as data in ``conf/plan/``.

# One line: the question that it answers
tasks: {recall: ["task.trials=100"], lm: []}   # with settings of their own
models: [infini_linear, infini_delta]          # or: all
tables: [diag_recall]                          # printed at the end
grid: {memory.features: [elu1, relu2]}         # every combination of these ...
variants: {name: [memory.gate_split=2]}        # ... with each of these; both may be left out
overrides: []                                  # for every job; may be left out
beside: {gpu: {name: [model=infini_delta]}}    # jobs of their own at one scale; may be left out
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from infini_bench.errors import UserError
from infini_bench.units import suggest

CONF = Path(str(files("infini_bench.conf")))


@dataclass(frozen=True)
class Plan:
    """A file of ``conf/plan/``; ``models`` are names."""

    name: str
    tasks: dict[str, list[str]]
    models: list[str]
    tables: list[str]
    grid: dict[str, list[Any]] = field(default_factory=dict)
    variants: dict[str, list[str]] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    beside: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    def settings(self) -> Iterator[tuple[str, list[str]]]:
        """Each variant's name (empty if there is one only) and its overrides."""
        axes = [[f"{key}={_text(value)}" for value in values] for key, values in self.grid.items()]
        for name, words in (self.variants or {"": []}).items():
            for point in product(*axes):
                yield " ".join([name, *point]).strip(), [*self.overrides, *words, *point]


def plan_names() -> list[str]:
    return sorted(path.stem for path in (CONF / "plan").glob("*.yaml"))


def read_plan(name: str) -> Plan:
    """Raises UserError for a plan that does not exist."""
    if name not in plan_names():
        there = f"choose one of {', '.join(plan_names())}"
        raise UserError(f'There is no "{name}" to reproduce{suggest(name, plan_names())}; {there}.')
    values = yaml.safe_load((CONF / "plan" / f"{name}.yaml").read_text(encoding="utf-8"))
    if values["models"] == "all":
        values["models"] = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
    return Plan(name, **values)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
