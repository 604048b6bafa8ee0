"""What ``infini-bench ls`` shows: each thing that exists, with a line about it. Standard library only."""

from __future__ import annotations

import itertools
import re
from importlib.resources import files
from pathlib import Path

GROUPS = {"models": "model", "tasks": "task", "data": "data", "experiments": "experiment", "plans": "plan"}
KINDS = (*GROUPS, "runs")


def list_options(kind: str, config_dir: Path | None = None) -> list[tuple[str, str]]:
    """(name, description) of every option of a config group; the description is its file's first sentence."""
    roots = [Path(str(files("infini_bench.conf")))] + ([config_dir] if config_dir else [])
    paths = [path for root in roots for path in (root / GROUPS[kind]).glob("*.yaml")]
    return [(path.stem, describe(path.read_text(encoding="utf-8"))) for path in sorted(paths)]


def describe(yaml: str) -> str:
    """The first sentence of the first comment that is no Hydra directive."""
    lines = itertools.dropwhile(lambda line: line.startswith("# @package"), yaml.splitlines())
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    text = " ".join(line.lstrip("# ").rstrip() for line in comment)
    return re.split(r"(?<!\.)\.(?= [A-Z]|$)|(?<=\?) ", text, maxsplit=1)[0]  # Eq. 5 ends no sentence


def list_runs(records: Path) -> list[tuple[str, str]]:
    """(id, what came of it) of every recorded run, newest last."""
    from infini_bench.report.records import read_records

    found = sorted(read_records(records), key=lambda r: (r.started, r.id))
    return [(r.id, f"{r.kind} {r.status}: {r.config['model']} on {r.task}" + _numbers(r)) for r in found]


def _numbers(record) -> str:
    if record.error:
        return f" ({record.error.splitlines()[0][:80]})"
    if record.kind == "train":
        return f", loss {record.train['final_loss']:.3f}" if record.train.get("final_loss") else ""
    return f", {len(record.metrics)} numbers"
