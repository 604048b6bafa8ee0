"""The verbs of ``infini-bench``. Thin: options become overrides, and heavy imports wait until a verb runs."""

from __future__ import annotations

import os
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
LENGTH_KEYS = {
    **{"lm": "task.max_tokens", "booksum": "task.input_tokens"},
    **dict.fromkeys(("passkey", "needles"), "task.lengths"),
}
PROFILED = {  # by level: what is profiled unless the user says so
    "model": "local_block,infini_linear,infini_delta,full",
    "operator": "infini_linear,infini_delta",
}
PROMPTED = ("passkey", "needles")  # whose prompts have lengths and depths
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
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # offline, our one sentence without its retries


@app.command()
def train(
    overrides: Overrides = None,
    multirun: Multirun = False,
    cfg: ShowConfig = None,
    config_dir: ConfigDir = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count parameters, estimate memory and time a GPU, and stop.")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="--dry-run: GPUs, a process each.")] = 1,
    tflops: Annotated[float, typer.Option(min=1, help="--dry-run: bf16 peak of a GPU.")] = 989,
) -> None:
    """Train a model; without overrides infini_linear on the embedded text, sized for two CPU cores.

    resume=RUN_FOLDER continues a run exactly where it was; a sweep started again skips what is done.
    """
    if dry_run:
        from infini_bench.cli.bridge import compose_runs, search_path
        from infini_bench.estimate import report

        for run in compose_runs("train", [*search_path(config_dir), *(overrides or [])], multirun):
            print(report(run, processes, tflops))
        return
    _launch("train", overrides or [], multirun, cfg, config_dir)


@app.command()
def adapt(
    model: Annotated[str, typer.Argument(help="Hub id, folder, GGUF file or run folder.")],
    overrides: Overrides = None,
    stages: Annotated[
        str, typer.Option(help="pretrain, passkey, needles, booksum; several with commas, in order.")
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
    checkpoint: Annotated[str, typer.Argument(help="Run folder, checkpoint folder or model name.")],
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
            help="lm, passkey, needles, booksum, recall or mqar; of random weights: footprint, capacity, …",
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
    base: Annotated[
        str | None,
        typer.Option(
            help="A pretrained model itself (hub id, folder, GGUF), with model= attached, untrained."
        ),
    ] = None,
    length: Annotated[str | None, typer.Option(help="Input tokens, e.g. 4K,128K,1M (K = 1024).")] = None,
    depths: Annotated[
        str | None,
        typer.Option(help="start,middle or percent; passkey: also end,end_outside."),
    ] = None,
    segments: Annotated[
        str | None, typer.Option(help="Recall, mqar: segments up to the question, e.g. 1,64,4096.")
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Of passkey, needles, recall, mqar, a number.")] = None,
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
    options += _base_overrides(what, base, checkpoint)
    if checkpoint is not None:
        from infini_bench.cli.bridge import quote

        options.append(f"checkpoint={quote(checkpoint)}")
    _launch("eval", [*options, *(overrides or [])], multirun, cfg, config_dir)


@app.command()
def remember(
    model: Annotated[str, typer.Argument(help="Run, checkpoint or exported folder, or shipped/passkey.")],
    book: Annotated[Path, typer.Argument(help="A text file.")],
    out: Annotated[Path, typer.Option(help="The file for the memory.")] = Path("memory.safetensors"),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Read a book and keep what the model remembers of it as a file, from which `answer` answers."""
    from infini_bench.remember import remember as run

    about = run(model, book, out, device)
    print(f"{int(about['tokens']):,} tokens of {book.name} in {out}, {out.stat().st_size / 2**20:.1f} MiB")


@app.command()
def answer(
    model: Annotated[str, typer.Argument(help="The model that remembers.")],
    prompt: Annotated[str, typer.Option(help="What to go on from, after the book.")],
    state: Annotated[Path, typer.Option(help="A file written by `remember`.")] = Path("memory.safetensors"),
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the answer.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Answer from a memory file, without the book."""
    from infini_bench.remember import answer as run

    print(run(model, state, prompt, tokens, device))


@app.command("lm-eval")
def harness(
    model: Annotated[str, typer.Argument(help="Run, checkpoint or exported folder.")],
    tasks: Annotated[str, typer.Option(help="Tasks of lm-eval, with commas, e.g. niah_single_1.")],
    lengths: Annotated[str | None, typer.Option(help="Of RULER's tasks: tokens, e.g. 4K,32K.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents a task; unset: all.")] = None,
    include: Annotated[Path | None, typer.Option(help="A folder with tasks of your own.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Run tasks of lm-evaluation-harness, each document read once with its memory; prints JSON."""
    import json

    from infini_bench.harness import run_harness as run

    sizes = [parse_length(length) for length in lengths.split(",")] if lengths else []
    print(json.dumps(run(model, tasks.split(","), sizes, limit, include, device), indent=1, default=str))


@app.command()
def reproduce(
    what: Annotated[str, typer.Argument(help="A plan; `infini-bench ls plans` lists them.")],
    overrides: Overrides = None,
    models: Annotated[str | None, typer.Option(help="Models with commas; unset: the plan's.")] = None,
    scale: Annotated[str, typer.Option(help="smoke, laptop, gpu or paper.")] = "laptop",
    seeds: Annotated[
        str | None, typer.Option(help="Seeds with commas, e.g. 0,1,2; unset: the plan's.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Jobs side by side.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for runs, records and tables.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with the local sets that a plan names.")] = None,
    only: Annotated[str, typer.Option(help="Jobs with these words in their names, e.g. 'rmt math'.")] = "",
    following: Annotated[
        int | None, typer.Option("--next", min=1, help="Only so many jobs that are not done yet.")
    ] = None,
    missing: Annotated[bool, typer.Option("--missing", help="Run nothing: list what is not done.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="The same, of all jobs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The list as JSON lines.")] = False,
) -> None:
    """Train and evaluate all that a table needs, and print it; overrides hold for every job."""
    from infini_bench import reproduce as module

    chosen = models.split(",") if models else None
    numbers = module.parse_seeds(seeds) if seeds else None
    if missing or listed:
        folder = out or module.default_folder(what)
        found = module.standing(
            module.plan(what, scale, folder, numbers, chosen, overrides or [], data, only)
        )
        shown = [each for each in found if listed or each.state != "done"]
        print((module.standing_json if as_json else module.standing_text)(shown))
        return
    words = overrides or []
    raise typer.Exit(
        module.reproduce(
            what, scale, out, jobs, numbers, chosen, words, data=data, only=only, following=following
        )
    )


@app.command()
def rebuild(
    what: Annotated[str, typer.Argument(metavar="SET", help="books or math.")],
    out: Annotated[Path, typer.Option(help="Folder for train, validation and test.jsonl.xz.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be read and written; no network.")
    ] = False,
) -> None:
    """Make a set to compare with the recorded ones from the hub: PG19's books by number, arXiv mathematics.

    Then data=books_local data.path=OUT reads it (math_local for mathematics).
    """
    from infini_bench.data.rebuild import read_rebuild
    from infini_bench.data.rebuild import rebuild as run

    made = read_rebuild(what)
    print(made.plan(out))
    for path in [] if dry_run else run(made, out):
        print(f"done: {path}")


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
    from rich.markup import escape
    from rich.table import Table

    from infini_bench.cli.doctor import examine
    from infini_bench.show import out

    table = Table("", "what", "found", "to do", box=None)
    broken = False
    for finding in examine(offline):
        mark = (
            "[green]ok[/]" if finding.ok else "[red]missing[/]" if finding.essential else "[yellow]missing[/]"
        )
        words = finding.name, finding.detail, "" if finding.ok else finding.advice
        table.add_row(mark, *map(escape, words))
        broken |= finding.essential and not finding.ok
    out().print(table)
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
    if LENGTH_KEYS[task] == "task.lengths":
        return [f"task.lengths=[{','.join(map(str, lengths))}]"]
    if len(lengths) > 1:
        raise UserError(f"eval {task} takes one --length; for several add -m {LENGTH_KEYS[task]}={text}.")
    return [f"{LENGTH_KEYS[task]}={lengths[0]}"]


def _base_overrides(task: str, base: str | None, checkpoint: str | None) -> list[str]:
    """Of a pretrained model, which brings its tokenizer; retrieval by it is the paper's zero-shot."""
    if base is None:
        return []
    if checkpoint is not None:
        raise UserError("--base is a pretrained model, --checkpoint one trained here; give one of them.")
    from infini_bench.cli.bridge import quote

    protocol = ["task.protocol=zero_shot"] if task in PROMPTED else []
    return [f"base.model={quote(base)}", f"data.tokenizer={quote(base)}", *protocol]


def _trial_overrides(task: str, depths: str | None, segments: str | None, trials: int | None) -> list[str]:
    """Of the tasks that are made of trials."""
    if task not in PROMPTED and depths is not None:
        raise UserError(f"--depths belongs to eval {' and '.join(PROMPTED)}, not to eval {task}.")
    if task not in COUNTED and segments is not None:
        raise UserError(f"--segments belongs to eval {' and '.join(COUNTED)}, not to eval {task}.")
    if task not in (*PROMPTED, *COUNTED) and trials is not None:
        raise UserError(f"--trials belongs to eval {', '.join((*PROMPTED, *COUNTED))}, not to eval {task}.")
    depth = [] if depths is None else [f"task.depths=[{','.join(parse_depth(d) for d in depths.split(','))}]"]
    if segments is not None and not all(part.strip().isdecimal() for part in segments.split(",")):
        raise UserError(
            f'--segments "{segments}" is no list of numbers; write them with commas, as in 1,64,4096.'
        )
    after = [] if segments is None else [f"task.segments_after=[{segments}]"]
    return depth + after + ([] if trials is None else [f"task.trials={trials}"])
