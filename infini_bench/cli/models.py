"""Verbs that make a model and ask one: train, adapt, export, eval, remember, answer, lm-eval."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from infini_bench.cli.app import INTERRUPTED, ConfigDir, Multirun, Overrides, ShowConfig, app, launch
from infini_bench.cli.listing import list_options
from infini_bench.errors import UserError
from infini_bench.units import parse_depth, parse_length, suggest

LENGTH_KEYS = {"lm": "task.max_tokens", **dict.fromkeys(("passkey", "needles", "booksum"), "task.lengths")}
PROMPTED = ("passkey", "needles")  # whose prompts have lengths and depths
NAMING = ("model", "memory.kind", "runs", "records")  # settings of verbs that take a model as it is
COUNTED = ("recall", "mqar")  # whose distances are segments
Naming = Annotated[
    list[str] | None,
    typer.Argument(metavar="OVERRIDES", help="model=NAME or memory.kind=FILE.py:CLASS of a memory of yours."),
]


def complete_task(incomplete: str) -> list[str]:
    """Completion of the task of ``eval``."""
    return [name for name, _ in list_options("tasks") if name.startswith(incomplete)]


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
    launch("train", overrides or [], multirun, cfg, config_dir)


@app.command()
def adapt(
    model: Annotated[str, typer.Argument(help="Hub id, folder, GGUF file or run folder.")],
    overrides: Overrides = None,
    stages: Annotated[
        str,
        typer.Option(
            help="pretrain, passkey, passkey_far (after passkey: 256 segments), needles, booksum; as the "
            "paper, scaled down: pretrain_paper, passkey_paper. Several with commas, in order."
        ),
    ] = "pretrain",
) -> None:
    """Give a pretrained Llama, Mistral or Qwen2 a memory and train it, in stages that build on each other.

    pretrain reads long documents: data=books_local data.path=FOLDER, or any other data set.

    Overrides hold for every stage; with a stage's name before them for that one: --stages pretrain,booksum
    pretrain.data.path=BOOKS pretrain.task.sequence=512 booksum.data.path=BOOKSUM.

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
    overrides: Naming = None,
    config_dir: ConfigDir = None,
) -> None:
    """Write a model as one Hugging Face folder, LoRA merged, with its tokenizer."""
    from infini_bench.adapt import export as run

    run(_model(checkpoint, overrides, config_dir), out)
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
            help="Run folder, checkpoint folder or model name; unset: the shipped model or the latest run, "
            "with model= that model's."
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
    for word in overrides or []:
        if word.lstrip("+~").startswith("task=") and word != f"task={what}":
            raise UserError(f'"{word}" is another task than eval {what}; leave it out.')
    options = [
        f"task={what}",
        *_length_override(what, length),
        *_trial_overrides(what, depths, segments, trials),
    ]
    options += _base_overrides(what, base, checkpoint)
    if baseline is not None and what != "booksum":
        raise UserError(f"--baseline belongs to eval booksum, not to eval {what}.")
    options += [f"task.baseline={baseline}"] if baseline is not None else []
    if checkpoint is not None:
        from infini_bench.cli.bridge import quote

        options.append(f"checkpoint={quote(checkpoint)}")
    launch("eval", [*options, *(overrides or [])], multirun, cfg, config_dir)


@app.command()
def remember(
    model: Annotated[str, typer.Argument(help="Run, checkpoint, exported folder, model, shipped/passkey.")],
    book: Annotated[Path, typer.Argument(help="A text file.")],
    out: Annotated[Path, typer.Option(help="The file for the memory.")] = Path("memory.safetensors"),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    overrides: Naming = None,
    config_dir: ConfigDir = None,
) -> None:
    """Read a book and keep what the model remembers of it as a file, from which `answer` answers."""
    from infini_bench.remember import remember as run

    about = run(_model(model, overrides, config_dir), book, out, device)
    print(f"{int(about['tokens']):,} tokens of {book.name} in {out}, {out.stat().st_size / 2**20:.1f} MiB")


@app.command()
def answer(
    model: Annotated[str, typer.Argument(help="The model that remembers.")],
    prompt: Annotated[str, typer.Option(help="What to go on from, after the book.")],
    state: Annotated[Path, typer.Option(help="A file written by `remember`.")] = Path("memory.safetensors"),
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the answer.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    overrides: Naming = None,
    config_dir: ConfigDir = None,
) -> None:
    """Answer from a memory file, without the book."""
    from infini_bench.remember import answer as run

    print(run(_model(model, overrides, config_dir), state, prompt, tokens, device))


@app.command("lm-eval")
def harness(
    model: Annotated[str, typer.Argument(help="Run, checkpoint or exported folder.")],
    tasks: Annotated[str, typer.Option(help="Tasks of lm-eval, with commas, e.g. niah_single_1.")],
    lengths: Annotated[str | None, typer.Option(help="Of RULER's tasks: tokens, e.g. 4K,32K.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents a task; unset: all.")] = None,
    include: Annotated[Path | None, typer.Option(help="A folder with tasks of your own.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    overrides: Naming = None,
    config_dir: ConfigDir = None,
) -> None:
    """Run tasks of lm-evaluation-harness, each document read once with its memory; prints JSON."""
    import json

    from infini_bench.harness import run_harness as run

    sizes = [parse_length(length) for length in lengths.split(",")] if lengths else []
    model = _model(model, overrides, config_dir)
    print(json.dumps(run(model, tasks.split(","), sizes, limit, include, device), indent=1, default=str))


def _model(name: str, overrides: list[str] | None, config_dir: Path | None) -> str:
    """The folder that ``name`` means, told on stderr; code outside the package is named as for ``eval``."""
    from infini_bench.cli.bridge import compose_run, given, search_path
    from infini_bench.origin import find_model

    words = overrides or []
    if not Path(name).exists() and name in [known for known, _ in list_options("models", config_dir)]:
        words = [f"model={name}", *words]
    cfg = compose_run([*search_path(config_dir), *words])
    if wrong := sorted(given(words).difference(NAMING)):
        raise UserError(f"{wrong[0]} cannot be set here, only {', '.join(NAMING)}; leave it out.")
    path, what = find_model(name, cfg, given(words))
    print(f"model: {what}", file=sys.stderr)
    return str(path)


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
