"""``infini-bench check``: from words on the command line to verdicts in a table and a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from infini_bench.cli.bridge import compose_run, search_path
from infini_bench.cli.listing import list_options
from infini_bench.contract.adapters import subject_of
from infini_bench.contract.check import check
from infini_bench.contract.subject import Verdict
from infini_bench.errors import UserError
from infini_bench.files import write_json
from infini_bench.schema import MemoryConfig
from infini_bench.show import out, quiet

COLOURS = {"pass": "green", "FAIL": "red", "not applicable": "dim"}


def run_check(
    target: str,
    arguments: Sequence[str],
    sizes: dict[str, int],
    length: int,
    seed: int,
    config_dir: Path | None,
    out: Path | None,
) -> int:
    """Check, print and write; the exit code: 0 if nothing fails, 1 if something does.

    Raises UserError if the module cannot be made or called, or if nothing of it can be observed.
    """
    quiet()
    settings = dict(parse_argument(text) for text in arguments)
    subject = subject_of(target, settings, sizes, models(target, config_dir), seed)
    verdicts = list(check(subject, length, seed))
    seen = [v for v in verdicts if v.verdict != "not applicable"]
    if not seen:
        raise UserError(
            f"Nothing of {target} can be observed: {verdicts[0].detail}; write an adapter for it."
        )
    failed = [v for v in seen if v.verdict == "FAIL"]
    show(target, verdicts)
    print(f"{len(seen) - len(failed)} pass, {len(failed)} fail, {len(verdicts) - len(seen)} not applicable")
    if out is not None:
        facts = {"target": target, "arguments": settings, **sizes, "length": length, "seed": seed}
        write_json(out, {**facts, "verdicts": [vars(v) for v in verdicts]})
    return int(bool(failed))


def models(target: str, config_dir: Path | None) -> dict[str, MemoryConfig]:
    """The memory of every model by name; composed only for the one asked for."""
    names = [name for name, _ in list_options("models", config_dir)]
    return {
        name: compose_run([*search_path(config_dir), f"model={name}"]).memory
        if name == target
        else MemoryConfig()
        for name in names
    }


def parse_argument(text: str) -> tuple[str, Any]:
    """``name=value``, the value read as YAML."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UserError(f'"{text}" is no argument; write --arg NAME=VALUE.')
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f'The value of "{text}" is no YAML; put it in quotes.') from error


def show(target: str, verdicts: Sequence[Verdict]) -> None:
    """A line a property."""
    table = Table("property", "verdict", "what was seen", title=f"contract of {target}", box=SIMPLE_HEAD)
    table.title_justify = "left"
    for v in verdicts:
        table.add_row(v.property, f"[{COLOURS[v.verdict]}]{v.verdict}[/]", escape(v.detail))
    out().print(table)
