"""The verbs of ``infini-bench``. Thin: options become overrides, and heavy imports wait until a verb runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from infini_bench import __version__
from infini_bench.cli.listing import GROUPS, KINDS, list_options, list_runs
from infini_bench.errors import UserError
from infini_bench.units import parse_depth, parse_length, suggest

INTERRUPTED = 130
LENGTH_KEYS = {"lm": "task.max_tokens", "passkey": "task.lengths", "booksum": "task.lengths"}
PROFILED = {  # by level: what is profiled unless the user says so
    "model": "local_block,infini_linear,infini_delta,full",
    "operator": "infini_linear,infini_delta",
}
COUNTED = ("recall", "mqar")  # whose distances are segments


class Verbs(TyperGroup):
    """What the user can put right is one sentence and exit code 2; Ctrl-C is exit code 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from error


app = typer.Typer(cls=Verbs, no_args_is_help=True, pretty_exceptions_enable=False)


def complete_override(ctx: typer.Context, incomplete: str) -> list[str]:
    """Completion of ``OVERRIDES``: groups, their options and keys, as Hydra knows them."""
    from infini_bench.cli.bridge import complete

    task = [f"task={ctx.params['what']}"] if ctx.params.get("what") else []
    return complete([*task, *(ctx.params.get("overrides") or [])], incomplete)


def complete_task(incomplete: str) -> list[str]:
    """Completion of the task of ``eval``."""
    return [name for name, _ in list_options("tasks") if name.startswith(incomplete)]


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


@app.command()
def train(
    overrides: Overrides = None,
    multirun: Multirun = False,
    cfg: ShowConfig = None,
    config_dir: ConfigDir = None,
) -> None:
    """Train a model; without overrides infini_linear on the embedded text, sized for two CPU cores.

    resume=RUN_FOLDER continues a run exactly where it was; a sweep started again skips what is done.
    """
    _launch("train", overrides or [], multirun, cfg, config_dir)


@app.command()
def adapt(
    model: Annotated[str, typer.Argument(help="Hub id, folder, GGUF file or run folder.")],
    overrides: Overrides = None,
    stages: Annotated[
        str, typer.Option(help="pretrain, passkey, booksum; several with commas, in order.")
    ] = "pretrain",
) -> None:
    """Give a pretrained Llama, Mistral or Qwen2 a memory and train it, in stages that build on each other.

    pretrain reads long documents: data=books_local data.path=FOLDER, or any other data set.

    base.lora=16 base.save=changes trains and saves only what is added; base.freeze=true only the memory.
    """
    from infini_bench.adapt import adapt as run
    from infini_bench.adapt import added

    records = run(model, stages.split(","), overrides or [])
    print(added(records[-1]))
    raise typer.Exit(0 if records[-1].status == "done" else INTERRUPTED)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Run or checkpoint folder.")],
    out: Annotated[Path, typer.Option(help="A new folder.")],
) -> None:
    """Write a model as one Hugging Face folder, LoRA merged, with its tokenizer."""
    from infini_bench.adapt import export as run

    run(checkpoint, out)
    print(out)


@app.command("eval")
def evaluate(
    what: Annotated[
        str,
        typer.Argument(
            metavar="TASK",
            help="lm, passkey, booksum, recall or mqar; of random weights: footprint, capacity, reach.",
            autocompletion=complete_task,
        ),
    ],
    overrides: Overrides = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Run folder, checkpoint folder or model name; unset: the shipped model or the latest run."
        ),
    ] = None,
    length: Annotated[str | None, typer.Option(help="Input tokens, e.g. 4K,128K,1M (K = 1024).")] = None,
    depths: Annotated[
        str | None, typer.Option(help="Passkey: start,middle,end,end_outside or percent.")
    ] = None,
    segments: Annotated[
        str | None, typer.Option(help="Recall, mqar: segments up to the question, e.g. 1,64,4096.")
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Passkey, recall, mqar: trials a number.")] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="Booksum: lead, random, lexrank, oracle; map_reduce, of a trained model."),
    ] = None,
    multirun: Multirun = False,
    cfg: ShowConfig = None,
    config_dir: ConfigDir = None,
) -> None:
    """Evaluate a trained model on a task and record the numbers.

    footprint, capacity and reach ask random weights: name a model with model=NAME.
    """
    known = [name for name, _ in list_options("tasks", config_dir)]
    if what not in known:
        raise UserError(f'There is no task "{what}"{suggest(what, known)}; choose one of {", ".join(known)}.')
    options = [
        f"task={what}",
        *_length_override(what, length),
        *_trial_overrides(what, depths, segments, trials),
    ]
    if baseline is not None and what != "booksum":
        raise UserError(f"--baseline belongs to eval booksum, not to eval {what}.")
    options += [f"task.baseline={baseline}"] if baseline is not None else []
    if checkpoint is not None:
        from infini_bench.cli.bridge import quote

        options.append(f"checkpoint={quote(checkpoint)}")
    _launch("eval", [*options, *(overrides or [])], multirun, cfg, config_dir)


@app.command()
def reproduce(
    what: Annotated[str, typer.Argument(help="A plan; `infini-bench ls plans` lists them.")],
    overrides: Overrides = None,
    models: Annotated[str | None, typer.Option(help="Models with commas; unset: the plan's.")] = None,
    scale: Annotated[str, typer.Option(help="smoke, laptop, gpu or paper.")] = "laptop",
    seeds: Annotated[str, typer.Option(help="Seeds with commas, e.g. 0,1,2.")] = "0",
    jobs: Annotated[int | None, typer.Option(min=1, help="Jobs side by side.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for runs, records and tables.")] = None,
) -> None:
    """Train and evaluate all that a table needs, and print it; overrides hold for every job."""
    from infini_bench.reproduce import parse_seeds
    from infini_bench.reproduce import reproduce as run

    chosen, numbers = models.split(",") if models else None, parse_seeds(seeds)
    raise typer.Exit(run(what, scale, out, jobs, numbers, chosen, overrides or []))


@app.command()
def check(
    module: Annotated[str, typer.Argument(help="A model, FILE.py:NAME, MODULE:NAME, or a known package.")],
    arg: Annotated[
        list[str] | None,
        typer.Option("--arg", metavar="NAME=VALUE", help="Constructor argument, as YAML; repeatable."),
    ] = None,
    segment: Annotated[int | None, typer.Option(min=1, help="Tokens of a segment.")] = None,
    dim: Annotated[int | None, typer.Option(min=1, help="Its inputs are vectors of this size.")] = None,
    vocab: Annotated[int | None, typer.Option(min=2, help="Its inputs are token ids below this.")] = None,
    length: Annotated[str, typer.Option(help="Tokens read in half precision.")] = "32K",
    seed: Annotated[int, typer.Option(min=0, help="Of weights.")] = 0,
    out: Annotated[Path | None, typer.Option("--json", help="A file for the verdicts.")] = None,
    config_dir: ConfigDir = None,
) -> None:
    """Run the contract of a memory on any attention module or model; exit code 1 if something fails.

    Causality, heads, rows, cuts, padding, gradients through the memory, state growth, half precision,
    generation. What cannot be observed is "not applicable". `infini-bench check infini_delta` checks ours.
    """
    from infini_bench.cli.checking import run_check

    given = {"segment": segment, "dim": dim, "vocab": vocab}
    sizes = {name: value for name, value in given.items() if value is not None}
    raise typer.Exit(run_check(module, arg or [], sizes, parse_length(length), seed, config_dir, out))


@app.command()
def profile(
    overrides: Overrides = None,
    models: Annotated[str | None, typer.Option(help="Models with commas; unset: by level.")] = None,
    level: Annotated[str, typer.Option(help="model, or operator: one layer's memory.")] = "model",
    lengths: Annotated[str | None, typer.Option(help="Tokens, e.g. 1K,10K,1M (K = 1024).")] = None,
    vs: Annotated[str | None, typer.Option(help="Installed packages, timed beside: PACKAGE,...")] = None,
    scale: Annotated[str, typer.Option(help="smoke, laptop, gpu or paper.")] = "laptop",
    cfg: ShowConfig = None,
    config_dir: ConfigDir = None,
) -> None:
    """Time, memory and share of the machine's peak against length, of untrained models; a record each.

    Forward, training step and decoding, beside local attention only. `infini-bench report` makes a table and
    a figure, efficiency, of the records. What was profiled before is done; force=true times it again.
    """
    names = models or PROFILED.get(level, PROFILED["model"])
    options = ["task=efficiency", f"scale={scale}", f"task.level={level}", f"model={names}"]
    if lengths is not None:
        options.append(f"task.lengths=[{','.join(str(parse_length(n)) for n in lengths.split(','))}]")
    if vs is not None:
        options.append(f"task.vs=[{vs}]")
    _launch("eval", [*options, *(overrides or [])], "," in names, cfg, config_dir)


@app.command()
def report(
    records: Annotated[Path, typer.Option(help="Folder of records.")] = Path("results/records"),
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("results/tables"),
    formats: Annotated[
        str, typer.Option("--format", help="csv, md, latex, html; several with commas.")
    ] = "csv,md",
    figures: Annotated[
        Path | None, typer.Option(help="Folder for the figures; unset: `figures` beside the tables' folder.")
    ] = None,
) -> None:
    """Make the tables from the records, beside the paper's numbers, and the figures."""
    from infini_bench.report.tables import write_report

    for path in write_report(records, out, formats.split(","), figures):
        print(path)


@app.command()
def ls(
    kind: Annotated[str | None, typer.Argument(metavar="models|tasks|data|experiments|plans|runs")] = None,
    records: Annotated[Path, typer.Option(help="Folder of records.")] = Path("results/records"),
    config_dir: ConfigDir = None,
) -> None:
    """List what exists, with a line about each."""
    if kind is not None and kind not in KINDS:
        raise UserError(
            f'There are no "{kind}" to list{suggest(kind, KINDS)}; choose one of {", ".join(KINDS)}.'
        )
    for each in [kind] if kind else KINDS:
        found = list_options(each, config_dir) if each in GROUPS else list_runs(records)
        width = max((len(name) for name, _ in found), default=0)
        print(each + ("" if found else ": none yet"))
        for name, text in found:
            print(f"  {name:{width}}  {text}")


@app.command()
def doctor(offline: Annotated[bool, typer.Option(help="Do not ask the network.")] = False) -> None:
    """Check this machine, and say what to do about what is missing."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from infini_bench.cli.doctor import examine

    table = Table("", "what", "found", "to do", box=None)
    broken = False
    for finding in examine(offline):
        mark = (
            "[green]ok[/]" if finding.ok else "[red]missing[/]" if finding.essential else "[yellow]missing[/]"
        )
        words = finding.name, finding.detail, "" if finding.ok else finding.advice
        table.add_row(mark, *map(escape, words))
        broken |= finding.essential and not finding.ok
    Console().print(table)
    raise typer.Exit(int(broken))


def main() -> None:
    """The console script."""
    app(prog_name="infini-bench")


def _launch(
    verb: str, overrides: list[str], multirun: bool, show: str | None, config_dir: Path | None
) -> None:
    from infini_bench.cli.bridge import launch, search_path

    code = launch(verb, [*search_path(config_dir), *overrides], multirun=multirun, show=show)
    if code:
        raise typer.Exit(code)


def _length_override(task: str, text: str | None) -> list[str]:
    if text is None:
        return []
    if task in COUNTED:
        raise UserError(f"eval {task} counts segments, not tokens: give --segments, e.g. 1,64,4096.")
    if task not in LENGTH_KEYS:
        raise UserError(f"--length belongs to eval {', '.join(LENGTH_KEYS)}, not to eval {task}.")
    lengths = [parse_length(part) for part in text.split(",")]
    if task in ("passkey", "booksum"):
        return [f"task.lengths=[{','.join(map(str, lengths))}]"]
    if len(lengths) > 1:
        raise UserError(f"eval {task} takes one --length; for several add -m {LENGTH_KEYS[task]}={text}.")
    return [f"{LENGTH_KEYS[task]}={lengths[0]}"]


def _trial_overrides(task: str, depths: str | None, segments: str | None, trials: int | None) -> list[str]:
    """Of the tasks that are made of trials."""
    if task != "passkey" and depths is not None:
        raise UserError(f"--depths belongs to eval passkey, not to eval {task}.")
    if task not in COUNTED and segments is not None:
        raise UserError(f"--segments belongs to eval {' and '.join(COUNTED)}, not to eval {task}.")
    if task not in ("passkey", *COUNTED) and trials is not None:
        raise UserError(f"--trials belongs to eval passkey, {' and '.join(COUNTED)}, not to eval {task}.")
    depth = [] if depths is None else [f"task.depths=[{','.join(parse_depth(d) for d in depths.split(','))}]"]
    if segments is not None and not all(part.strip().isdecimal() for part in segments.split(",")):
        raise UserError(
            f'--segments "{segments}" is no list of numbers; write them with commas, as in 1,64,4096.'
        )
    after = [] if segments is None else [f"task.segments_after=[{segments}]"]
    return depth + after + ([] if trials is None else [f"task.trials={trials}"])
