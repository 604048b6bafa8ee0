"""What a run prints when it is over, and what its libraries do not."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from infini_bench.report.cells import ABSENT, three
from infini_bench.report.efficiency import MiB
from infini_bench.report.records import Record
from infini_bench.schema import ANY_ALIGNMENT
from infini_bench.units import format_length

KEYS = ("dataset", "split", "length", "position", "metric", "n")
PAGE = 100  # characters: where the output is no terminal, conditions stand side by side up to this width
FILE_WIDTH = 1000  # and a table that is wider by itself has every row in one line
OFF = ", memory_off"  # ends the name of a condition's own control
SHADES = "·░▒▓█"  # of the keys that were asked for, found: none, ..., all
PICTURED = ("passkey", "needles")
TIMED = {  # what stands in a line about a call that was timed, and in which unit
    "ms": ("ms", 1),
    "bound": ("bound, ms", 1),
    "tokens_per_s": ("tokens/s", 1),
    "percent_of_peak": ("% of peak", 1),
    "peak_bytes": ("peak, MiB", MiB),
    "state_bytes": ("state, MiB", MiB),
    "local": ("x local", 1),
    "full": ("full / this", 1),
    "peer": ("peer / this", 1),
}

Lines = dict[tuple[str, ...], dict[str, str]]  # values by condition, of what the keys' cells name


def say(text: str) -> None:
    print(text, flush=True)


def out() -> Console:
    """Standard output for tables."""
    console = Console()
    console.width = console.width if console.is_terminal else FILE_WIDTH
    return console


def quiet() -> None:
    """Libraries speak up for errors only, and our progress is the only one."""
    from datasets.utils import logging as of_datasets
    from transformers.utils import logging as of_transformers

    for library in (of_datasets, of_transformers):
        library.set_verbosity_error()
        library.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries when there is no network


class _Choices(logging.Handler):
    """What the program decides by itself, on stderr: above the bars, where there are any."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr, flush=True)


def tell_choices() -> None:
    """From here on what the package logs, such as which form computes a memory, is shown."""
    log = logging.getLogger("infini_bench")
    log.setLevel(logging.INFO)
    if not any(isinstance(handler, _Choices) for handler in log.handlers):
        log.addHandler(_Choices())


def show_training(record: Record, folder: Path) -> None:
    """Two lines about a training run."""
    loss = record.train["final_loss"]
    shown = "no step" if loss is None else f"loss {loss:.3f}"
    what = f"{record.train['steps']} steps, {format_length(record.tokens or 0)} tokens"
    say(
        f"{record.status}: {record.config['model']} on {record.task}, {what}, {record.seconds:.0f} s, {shown}"
    )
    say(f"run folder: {folder}")


def show_metrics(record: Record) -> None:
    """The metric rows; what is the same in all stands above them."""
    if record.task == "efficiency":
        return show_times(record)
    rows = record.metrics
    keys = [key for key in KEYS if record.task != "lm" or key != "length"]  # lm's is a limit: `show_scored`
    varying = [key for key in (*keys, "protocol") if len({row.get(key) for row in rows}) > 1]
    facts = [
        f"{key} {_cell(rows[0][key])}" for key in keys if key not in varying and rows[0].get(key) is not None
    ]
    facts += [ANY_ALIGNMENT] if str(rows[0].get("protocol")).endswith(ANY_ALIGNMENT) else []
    lines: Lines = {}
    for row in rows:
        line = lines.setdefault(tuple(_cell(row.get(key)) for key in varying), {})
        line[row.get("condition") or "value"] = _value(row)
    say(", ".join([f"{record.config['model']} on {record.task}", *facts]))
    console = out()
    for table in _side_by_side(console, varying, lines):
        console.print(table)
    if record.task in PICTURED:
        show_picture(record)
    if record.task == "lm":
        show_scored(record)


def show_scored(record: Record) -> None:
    """How many tokens the numbers of language modelling are of."""
    task = record.config["task"]
    for row in record.metrics:
        if row["metric"] == "bits_per_byte":
            limit, of = task.get("max_tokens"), "all together" if task.get("joined") else "each"
            most = "" if limit is None else f", at most {limit:,} read of {of}"
            where = "1 document" if row["n"] == 1 else f"{row['n']} documents"
            say(f"{sum(row['extra']['tokens']):,} tokens scored in {where}{most}")


def _side_by_side(console: Console, keys: list[str], lines: Lines) -> Iterator[Table]:
    """Tables with as many conditions side by side as fit on a page, each left of its own control."""
    groups: dict[str, list[str]] = {}
    for condition in dict.fromkeys(name for line in lines.values() for name in line):
        groups.setdefault(condition.removesuffix(OFF), []).append(condition)
    page = console.width if console.is_terminal else PAGE
    unbound = console.options.update(width=FILE_WIDTH)
    shown: list[str] = []
    for group in groups.values():
        wider = _table(keys, [*shown, *group], lines)
        if shown and console.measure(wider, options=unbound).maximum > page:
            yield _table(keys, shown, lines)
            shown = []
        shown = [*shown, *group]
    yield _table(keys, shown, lines)


def _table(keys: list[str], conditions: list[str], lines: Lines) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for name in (*keys, *conditions):
        own = OFF.removeprefix(", ") if name.endswith(OFF) else name  # of what stands before it
        table.add_column(own, overflow="fold")  # a value is never cut
    for words, line in lines.items():
        if any(name in line for name in conditions):
            table.add_row(*words, *(line.get(name, "") for name in conditions))
    return table


def _value(row: dict[str, Any]) -> str:
    """The value with its interval; of one that there is not, why."""
    if row["value"] is None:
        return str(row["extra"].get("failed") or row["extra"].get("not_finite", ""))
    low, high = row.get("ci_low"), row.get("ci_high")
    return _cell(row["value"]) + ("" if low is None else f" ({_cell(low)} to {_cell(high)})")


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def show_picture(record: Record) -> None:
    """Keys found of keys asked, depth by length, a picture for each condition but the controls."""
    rows = [row for row in record.metrics if row["metric"] == "exact_match" and row["value"] is not None]
    rows = [row for row in rows if "memory_off" not in str(row["condition"])]
    console = out()
    for condition in dict.fromkeys(row["condition"] for row in rows):
        cells = {(row["position"], row["length"]): row for row in rows if row["condition"] == condition}
        depths, lengths = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
        found = sum(map(_hits, cells.values()))
        say(f"{condition}: {found} of {sum(row['n'] for row in cells.values())} found")
        table = Table(box=None, padding=(0, 1))
        table.add_column("depth", no_wrap=True)
        for length in lengths:
            table.add_column(format_length(length), no_wrap=True)
        for depth in depths:
            shown = [cells.get((depth, length)) for length in lengths]
            table.add_row(depth, *("" if row is None else _shade(row) for row in shown))
        console.print(table)


def _hits(row: dict[str, Any]) -> int:
    return round(row["value"] / 100 * row["n"])


def _shade(row: dict[str, Any]) -> str:
    """A bar as dark as the share of keys found, and the counts."""
    bar = SHADES[int(row["value"] / 100 * (len(SHADES) - 1))] * 4
    return f"{bar} {_hits(row)}/{row['n']}"


def show_times(record: Record) -> None:
    """A line for each call that was timed, below what this machine reaches and above what is missing."""
    lines: dict[tuple[str, str, int], dict[str, Any]] = {}
    for row in record.metrics:
        name, call = _timed(row)
        # a peer's rows have the shape as their condition
        peer = row["condition"] and row["protocol"] == "model"
        form = row["extra"]["variant"] if peer else row["condition"] or record.config["model"]
        lines.setdefault((form, call, row["length"]), {})[name] = row
    for (form, _, length), line in lines.items():
        if "bound_ms" in (facts := line.get("ms", {}).get("extra", {})):
            line["bound"] = {"value": facts["bound_ms"]}
        line["backend"] = f" ({facts['backend']})" if facts.get("backend") else ""
        if state := lines.get((form, "", length)):
            line["state_bytes"] = state["state_bytes"]
    _say_rates(record)
    _print_times({words: line for words, line in lines.items() if words[1]})
    for why in dict.fromkeys(row["extra"]["failed"] for row in record.metrics if row["value"] is None):
        say(f"{ABSENT} {why}")


def _print_times(lines: dict[tuple[str, str, int], dict[str, Any]]) -> None:
    """Intervals below their values on a terminal; what all lines are of stands above the table only."""
    console = out()
    interval = "\n[{}, {}]" if console.is_terminal else " [{}, {}]"
    names = [name for name in TIMED if any(name in line for line in lines.values())]
    several = len({form + line["backend"] for (form, *_), line in lines.items()}) > 1
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for title in (*[""] * several, "call", "tokens", *(TIMED[name][0] for name in names)):
        table.add_column(title, overflow="fold")
    for (form, call, length), line in lines.items():
        cells = (_spread(line.get(name), TIMED[name][1], interval) for name in names)
        table.add_row(*[form + line["backend"]] * several, call, format_length(length), *cells)
    console.print(table)


def _say_rates(record: Record) -> None:
    facts = record.metrics[0]["extra"]
    flops, copied = (three(facts[key]) for key in ("peak_tflops", "copy_gb_per_s"))
    say(f"{record.config['model']} on efficiency, {facts['variant']}")
    say(f"bound: at a matrix product's {flops} TFLOP/s and a copy's {copied} GB/s, measured here")
    say(
        "medians [10th, 90th percentile]; x local: local attention alone is 1; full, peer / this: their times"
    )


def _timed(row: dict[str, Any]) -> tuple[str, str]:
    """Which of ``TIMED`` a row is, and of which call; of none: of the document."""
    metric, *words = row["metric"].split("_")
    if metric == "ratio":  # _to_local_train
        return words[1], "forward" if words[2] == "inference" else words[2]
    return ("ms", metric) if words == ["ms"] else (row["metric"], row["position"] or "")


def _spread(row: dict[str, Any] | None, unit: float, interval: str) -> str:
    """Three digits of the value and of its interval."""
    if row is None or row["value"] is None:
        return "" if row is None else ABSENT
    ends = [three(row[key] / unit) for key in ("ci_low", "ci_high") if row.get(key) is not None]
    return three(row["value"] / unit) + (interval.format(*ends) if ends else "")
