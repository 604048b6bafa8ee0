"""What ``infini-bench reproduce first-steps`` shows: three small experiments that explain Infini-attention.

1. The compressive memory alone, on synthetic pairs and without any training (``eval capacity``).
2. The gate, on a simple sequence task (``passkey``): how far training moves it, and what the memory brings.
3. A whole model on short text (``lm``): it learns, and the memory can be switched off.

Each ends in a short reading whose numbers come from this run's records and training logs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infini_bench.report.records import Record

NAME = "first-steps"
TITLES = ("1. The memory alone", "2. The gate", "3. A whole model on short text")


def reading(records: Sequence[Record]) -> list[str]:
    """What the three experiments showed, a paragraph a model; an experiment without a result has none."""
    done = [record for record in records if record.status == "done"]
    trained = {record.config_hash: record for record in done if record.kind == "train"}
    lines = []
    for title, task in zip(TITLES, ("capacity", "passkey", "lm"), strict=True):
        found = [record for record in done if record.kind == "eval" and record.task == task]
        lines += ["", title] if found else []
        for record in sorted(found, key=lambda record: (record.config["model"], record.seed), reverse=True):
            who = f"  {record.config['model']}, seed {record.seed}: "
            training = trained.get(record.train.get("config_hash", ""))
            lines.append(who + READINGS[task](record, training))
    return lines


def _memory(record: Record, _: Record | None) -> str:
    def at(metric: str, kind: str, ratio: str) -> str:
        return f"{_value(record, metric, condition=kind, position=ratio, protocol=cut):.2f}"

    ratios = sorted({row["position"] for row in record.metrics}, key=float)
    few, many = ratios[0], ratios[-1]
    cut = min((row["protocol"] for row in record.metrics), key=_writes)
    size, copies = record.metrics[0]["extra"]["head_dim"], record.config["task"]["copies"]
    return (
        f"written {cut} and read with the exact key, a value comes back with cosine "
        f"{at('cosine', 'random', few)} from {few} D pairs (D = {size}) and "
        f"{at('cosine', 'random', many)} from {many} D. The part of it that comes back, of {few} D pairs: "
        f"{at('gain', 'random', few)}; of pairs written {copies} times {at('gain', 'duplicated', few)}; of "
        f"overwritten ones {at('gain', 'overwritten', few)}. 1 would be all of it."
    )


def _writes(protocol: str) -> float:
    """Writes a segment, of ``16 a segment``; ``one segment`` holds them all."""
    return float(protocol.split()[0]) if protocol[0].isdigit() else float("inf")


def _gate(record: Record, training: Record | None) -> str:
    rows = [row for row in record.metrics if row["metric"] == "exact_match" and row["extra"]["segments"] > 1]
    words = ""
    if rows:
        on, off = (_mean(rows, condition) for condition in ("constant", "memory_off"))
        chance = rows[0]["extra"]["chance"]
        words = (
            f" A key two or more segments back is found in {on:.0f} % of trials, {off:.0f} % with the memory "
        )
        words += f"off (chance {chance:.0f} %)."
    return _gates(_log(training)) + words


def _gates(log: list[dict[str, Any]]) -> str:
    """Where the gates' training led, from its first and last line."""
    if not log or "gates" not in log[-1]:
        return "the training's log is gone, and with it the gates."
    first, last = log[0], log[-1]
    layers = [
        f"layer {i + 1} from {start:.2f} to {low:.2f} ... {high:.2f} (mean {mean:.2f})"
        for i, (start, low, high, mean) in enumerate(
            zip(
                first["gates"]["mean"], *(last["gates"][name] for name in ("min", "max", "mean")), strict=True
            )
        )
    ]
    return f"the heads' shares of memory, steps {first['step']} to {last['step']}: {'; '.join(layers)}."


def _text(record: Record, training: Record | None) -> str:
    bits, unigram = (_value(record, name) for name in ("bits_per_token", "unigram_bits_per_token"))
    on, off = (_value(record, name) for name in ("bits_per_byte", "bits_per_byte_memory_off"))
    log = _log(training)
    fell = (
        f"the loss went from {log[0]['loss']:.2f} (step {log[0]['step']}) to {log[-1]['loss']:.2f} nats "
        f"(step {log[-1]['step']}). "
        if log
        else ""
    )
    return (
        f"{fell}Unseen text costs {bits:.2f} bits a token, {unigram:.2f} for a unigram model; {on:.3f} bits "
        f"a byte, {off:.3f} with the memory off ({off - on:+.3f})."
    )


READINGS = {"capacity": _memory, "passkey": _gate, "lm": _text}


def _value(record: Record, metric: str, **columns: str) -> float:
    """The record's only value of a metric; NaN if it has none."""
    wanted = {"metric": metric, **columns}
    rows = [row for row in record.metrics if all(row[key] == value for key, value in wanted.items())]
    return rows[0]["value"] if rows and rows[0]["value"] is not None else float("nan")


def _mean(rows: list[dict[str, Any]], condition: str) -> float:
    values = [row["value"] for row in rows if row["condition"] == condition]
    return sum(values) / len(values) if values else float("nan")


def _log(training: Record | None) -> list[dict[str, Any]]:
    from infini_bench.train.log import read_log  # loads torch

    return read_log(Path(training.train["folder"]) / "metrics.jsonl") if training else []
