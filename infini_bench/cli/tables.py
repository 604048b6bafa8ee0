"""Verbs that compare models and show what there is: reproduce to doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from infini_bench.cli.app import ConfigDir, Overrides, ShowConfig, app, launch
from infini_bench.cli.listing import GROUPS, KINDS, list_options, list_runs
from infini_bench.errors import UserError
from infini_bench.units import parse_length, suggest

PROFILED = {  # by level: what is profiled unless the user says so
    "model": "local_block,infini_linear,infini_delta,full",
    "operator": "infini_linear,infini_delta",
}
OPERATORS = "flash-linear-attention"  # it has no model
MATCHES = {  # and with --vs: the models that a package can be compared with
    "infini-transformer-pytorch": "infini_linear,infini_delta",
    "memorizing-transformers-pytorch": "memorizing",
    "recurrent-memory-transformer-pytorch": "rmt",
    OPERATORS: "infini_linear,infini_delta_token",
}


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
    from infini_bench.planned import plan
    from infini_bench.standing import standing, standing_json, standing_text

    chosen = models.split(",") if models else None
    numbers = module.parse_seeds(seeds) if seeds else None
    if missing or listed:
        folder = out or module.default_folder(what)
        found = standing(plan(what, scale, folder, numbers, chosen, overrides or [], data, only))
        every = listed and following is None  # --next counts what is not done
        print((standing_json if as_json else standing_text)(found, every, following))
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
    models: Annotated[
        str | None, typer.Option(help="Models with commas; unset: by level, or those that --vs compares.")
    ] = None,
    level: Annotated[
        str | None,
        typer.Option(help="model, or operator: one layer's memory; unset: model, or that of --vs."),
    ] = None,
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
    peers = vs.split(",") if vs else []
    for name in peers:
        if name not in MATCHES:
            there = ", ".join(MATCHES)
            raise UserError(f'There is no peer "{name}"{suggest(name, MATCHES)}; choose from {there}.')
    level = level or ("operator" if OPERATORS in peers else "model")
    matches = [MATCHES[name] for name in peers]
    names = models or ",".join(matches) or PROFILED.get(level, PROFILED["model"])
    options = ["task=efficiency", f"scale={scale}", f"task.level={level}", f"model={names}"]
    if lengths is not None:
        options.append(f"task.lengths=[{','.join(str(parse_length(n)) for n in lengths.split(','))}]")
    if vs is not None:
        options.append(f"task.vs=[{vs}]")
    launch("eval", [*options, *(overrides or [])], "," in names, cfg, config_dir)


@app.command()
def report(
    records: Annotated[Path, typer.Option(help="Folder of records.")] = Path("results/records"),
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("results/tables"),
    formats: Annotated[
        str, typer.Option("--format", help="csv, md, latex, html; several with commas.")
    ] = "csv,md",
    figures: Annotated[
        Path | None,
        typer.Option(help="Folder for the figures; unset: `figures` beside the tables' folder, or the page."),
    ] = None,
) -> None:
    """Make the tables from the records, beside the paper's numbers, and the figures."""
    from infini_bench.report.tables import write_report

    for path in write_report(records, out, formats.split(","), figures):
        print(path)


@app.command()
def pack(
    records: Annotated[Path, typer.Option(help="Folder of records.")] = Path("results/records"),
) -> None:
    """Compress the records of finished runs, a file each (.jsonl.xz); every command reads them as before.

    A plain file that is there packed, too, is deleted if the two are the same.
    """
    from infini_bench.report.records import pack_records

    print(f"packed {len(pack_records(records))} files of {records}")


@app.command()
def summaries(
    record: Annotated[str, typer.Argument(help="Of an eval booksum: its id, or a part of it.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder of the books; unset: where the record read them.")
    ] = None,
    books: Annotated[int, typer.Option(min=1, help="How many, from the split's first on.")] = 5,
    kind: Annotated[
        str | None, typer.Option(help="Of the references, as the data name it, e.g. wikipedia; unset: all.")
    ] = None,
    length: Annotated[str | None, typer.Option(help="Input tokens, e.g. 16K; unset: the longest.")] = None,
    condition: Annotated[str, typer.Option(help="pairwise, or a control, e.g. memory_off.")] = "pairwise",
    records: Annotated[Path, typer.Option(help="Folder of records.")] = Path("results/records"),
    out: Annotated[Path | None, typer.Option(help="A file for the Markdown; unset: print it.")] = None,
) -> None:
    """Show generated summaries beside their references, whole, with each book's ROUGE.

    The references come from the data, which must be those of the record, and have licences of their own:
    keep OUT out of repositories.
    """
    from infini_bench.files import atomic_write
    from infini_bench.report.beside import Shown, beside

    tokens = None if length is None else parse_length(length)
    text = beside(records, record, data, Shown(books, condition, tokens, kind))
    if out is None:
        print(text, end="")
    else:
        atomic_write(out, text)
        print(out)


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
    from infini_bench.show import PAGE, out

    table = Table("", "what", "found, and what to do", box=None)
    broken = False
    for finding in examine(offline):
        lack = "[dim]optional[/]" if finding.optional else "[yellow]missing[/]"
        mark = "[green]ok[/]" if finding.ok else "[red]missing[/]" if finding.essential else lack
        words = finding.detail if finding.ok else f"{finding.detail}\n{finding.advice}"
        table.add_row(mark, escape(finding.name), escape(words))
        broken |= finding.essential and not finding.ok
    console = out()
    console.print(table, width=min(console.width, PAGE))
    raise typer.Exit(int(broken))
