"""The verbs of ``infini-bench``. Thin: options become overrides, and heavy imports wait until a verb runs."""

from __future__ import annotations

from infini_bench.cli import models, tables  # each import adds its verbs, in the order of the help
from infini_bench.cli.app import app


def main() -> None:
    """The console script."""
    app(prog_name="infini-bench")


__all__ = ["app", "main", "models", "tables"]
