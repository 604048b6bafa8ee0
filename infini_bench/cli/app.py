"""The program of the verbs: how it fails, options that several verbs have, and the launch of jobs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from infini_bench import __version__, outside
from infini_bench.errors import UserError
from infini_bench.signals import terminable

INTERRUPTED = 130


class Verbs(TyperGroup):
    """What the user can put right is one sentence and exit code 2; Ctrl-C and SIGTERM are exit code 130."""

    def invoke(self, ctx: Any) -> Any:
        with terminable():
            try:
                return super().invoke(ctx)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                raise typer.Exit(2) from error
            except KeyboardInterrupt as error:
                print("interrupted", file=sys.stderr)
                raise typer.Exit(INTERRUPTED) from error
            except Exception as error:
                if words := outside.fault(error):
                    print(f"error: {words}", file=sys.stderr)
                    raise typer.Exit(2) from error
                raise


app = typer.Typer(cls=Verbs, no_args_is_help=True, pretty_exceptions_enable=False)


def complete_override(ctx: typer.Context, incomplete: str) -> list[str]:
    """Completion of ``OVERRIDES``: groups, their options and keys, as Hydra knows them."""
    from infini_bench.cli.bridge import complete

    task = [f"task={ctx.params['what']}"] if ctx.params.get("what") else []
    return complete([*task, *(ctx.params.get("overrides") or [])], incomplete)


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="OVERRIDES",
        help="Settings as key=value, e.g. model=infini_delta trainer.steps=500.",
        autocompletion=complete_override,
    ),
]
Multirun = Annotated[bool, typer.Option("-m", "--multirun", help="Run every combination of the comma lists.")]
ShowConfig = Annotated[
    str | None, typer.Option("--cfg", "-c", metavar="job|all", help="Print the settings and stop.")
]
ConfigDir = Annotated[
    Path | None, typer.Option("--config-dir", help="A folder with more YAML files, laid out as conf/.")
]


def _version(value: bool) -> None:
    if value:
        print(f"infini-bench {__version__}")
        raise typer.Exit()


@app.callback()
def infini_bench(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Infini-attention reproduced, explained and compared under one budget."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # offline, our one sentence without its retries
    # GGUF readers draw bars of their own, which transformers' switch (`show.quiet`) does not reach
    os.environ.setdefault("TQDM_DISABLE", "1")
    # torch's threads wait asleep: where others want the cores, or a quota ends, spinning costs three quarters
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def launch(
    verb: str, overrides: list[str], multirun: bool, show: str | None, config_dir: Path | None
) -> None:
    """Hand a verb's jobs to Hydra; leaves with their exit code."""
    from infini_bench.cli import bridge

    code = bridge.launch(verb, [*bridge.search_path(config_dir), *overrides], multirun=multirun, show=show)
    if code:
        raise typer.Exit(code)
