"""Records as an evaluation writes them, made up, for the tests of reports."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from infini_bench.report.claims import judged
from infini_bench.report.evidence import Evidence
from infini_bench.report.layouts import sheets
from infini_bench.report.records import Record, config_hash
from infini_bench.report.tidy import tidy

CONFIG: dict[str, Any] = {
    "model": "infini_linear",
    "scale": "laptop",
    "seed": 0,
    "decoder": {"dim": 64, "ffn": None},
    "memory": {"kind": "compressive", "segment": 32},
    "data": {"name": "embedded", "tokenizer": "bpe", "vocab_size": 2048, "cache_dir": ".cache"},
    "task": {"name": "lm"},
    "trainer": {"steps": 10, "lr": 0.003, "curriculum": []},
    "runs": "runs",
    "records": "results/records",
    "device": "cpu",
    "force": False,
    "resume": None,
    "checkpoint": None,
}
BLANK = dict.fromkeys(("split", "length", "position", "condition", "protocol", "ci_low", "ci_high", "n"))


def row(metric: str, value: float | None, extra: dict | None = None, **columns: Any) -> dict[str, Any]:
    return {"dataset": "embedded", **BLANK, **columns, "metric": metric, "value": value, "extra": extra or {}}


def record(
    model: str = "infini_linear", seed: int = 0, metrics: list | None = None, **changes: Any
) -> Record:
    """An evaluation's record; ``config`` changes are dotted keys, others are fields of the record."""
    config = copy.deepcopy(CONFIG) | {"model": model, "seed": seed}
    for key, value in changes.pop("config", {}).items():
        group, _, name = key.rpartition(".")
        (config[group] if group else config)[name] = value
    task = config["task"]["name"]
    kind = changes.get("kind", "eval")
    values = {
        "id": f"{kind}-{task}-{model}-{seed}-{config_hash(config)}",
        "kind": kind,
        "status": "done",
        "command": ["infini-bench", kind],
        "config": config,
        "config_hash": config_hash(config),
        "seed": seed,
        "device": "CPU model X, 2 cores",
        "started": "2026-01-01T00:00:00.000000+00:00",
        "task_version": "1",
        "git_commit": "0123456789abcdef",
        "git_dirty": False,
        "params": 100_000,
        "state_floats": 8448,
        "seconds": 2.0,
        "peak_bytes": 2**28,
        "train": {"tokens": 2_000_000},
        "metrics": metrics or [],
    }
    return Record(**{**values, **changes})


def lm(
    model: str = "infini_linear", seed: int = 0, nats: tuple = (100.0, 300.0), ppl: float = 20.0, **changes
) -> Record:
    sums = {"documents": [f"d{i}" for i in range(len(nats))], "nats": list(nats), "bytes": [100] * len(nats)}
    bits = sum(nats) / 100 / len(nats) / 0.6931471805599453
    columns = {"split": "test", "n": len(nats)}
    metrics = [
        row("token_ppl", ppl, ci_low=ppl - 1, ci_high=ppl + 1, **columns),
        row("word_ppl", 400.0, **columns),
        row("bits_per_token", 4.3, **columns),
        row("unigram_bits_per_token", 8.5, **columns),
        row("bits_per_byte", bits, sums, ci_low=bits - 0.1, ci_high=bits + 0.1, **columns),
        row("bits_per_byte_memory_off", bits + 0.5, sums, **columns),
        row("loss", 5.0, split="test", position="1", n=2),
        row("loss", 3.0, split="test", position="1024", n=2),
        row("loss", 3.5, split="test", position="1024", condition="memory_off", n=2),
    ]
    return record(model, seed, metrics, **changes)


def passkey(
    model: str = "infini_linear",
    seed: int = 0,
    on: float = 100.0,
    off: float = 10.0,
    lengths: tuple[int, ...] = (512, 4096),
    segments: int = 8,
    **changes,
) -> Record:
    metrics = []
    for length in lengths:
        for place in ("start", "middle", "end_outside"):
            back = 1 if place == "end_outside" else segments
            for condition, value in (("constant", on), ("memory_off", off)):
                columns = {
                    "length": length,
                    "position": place,
                    "condition": condition,
                    "protocol": "curriculum",
                }
                extra = {"segments": back, "chance": 100 / 9}
                metrics.append(row("exact_match", value, extra, n=20, ci_low=0.0, ci_high=1.0, **columns))
                metrics.append(row("token_accuracy", value, extra, n=20, **columns))
    task = {
        "name": "passkey",
        "digits": 1,
        "segments": 16,
        "lengths": list(lengths),
        "depths": ["start"],
        "trials": 20,
    }
    config = {"task": task, **changes.pop("config", {})}
    return record(model, seed, metrics, config=config, **changes)


def booksum(model: str = "infini_linear", seed: int = 0, **changes) -> Record:
    columns = {"split": "test", "protocol": "sampled", "n": 8}
    names = {
        "rouge1": 30.0,
        "rouge2": 8.0,
        "rougeL": 20.0,
        "rougeLsum": 25.0,
        "overall": 16.9,
        "summary_tokens": 70.0,
        "summary_words": 55.0,
    }
    metrics = [row(name, value, condition="pairwise", **columns) for name, value in names.items()]
    metrics += [row(name, value + 1, condition="best", **columns) for name, value in names.items()]
    metrics.append(row("overall", 12.0, condition="memory_off", **columns))
    config = {"task": {"name": "booksum"}, **changes.pop("config", {})}
    return record(model, seed, metrics, config=config, **changes)


def booksum_lengths(model: str = "infini_linear", data: str = "booksum_local", **changes) -> Record:
    """Evaluated at two input lengths against all references and one kind, with the gain of the longer."""
    columns = {"split": "test", "protocol": "sampled", "dataset": data, "ci_low": 1.0, "ci_high": 30.0}
    metrics = []
    for length, value, cut in ((16384, 15.0, 8), (32768, 17.0, 5)):
        for kind, n in ((None, 8), ("wikipedia", 4)):
            place = {"length": length, "position": kind, "n": n, **columns}
            books = {"cut_books": cut, "books": [f"b{i}" for i in range(n)]}
            for condition, each in (("pairwise", value), ("memory_off", value - 3)):
                scores = {"scores": [[each, each, each, 0.0]] * n}
                metrics.append(row("overall", each, {**books, **scores}, condition=condition, **place))
    gain = {"length": 32768, "n": 8, **columns}
    metrics.append(row("overall_gain", 2.0, {"over": 16384}, condition="pairwise", **gain))
    config = {"data.name": data, "task": {"name": "booksum", "lengths": ["16K", "32K"]}}
    config |= changes.pop("config", {})
    return record(model, 0, metrics, config=config, **changes)


def lead(data: str = "booksum_local", device: str = "CPU model Y, 2 cores") -> Record:
    """A baseline without weights, run on another machine and at another scale."""
    columns = {"split": "test", "protocol": "extractive", "condition": "pairwise", "n": 8, "dataset": data}
    scores = {"books": [f"b{i}" for i in range(8)], "scores": [[12.0, 12.0, 12.0, 0.0]] * 8}
    metrics = [row("overall", 12.0, scores, **columns), row("copied", 100.0, **columns)]
    task = {"name": "booksum", "baseline": "lead"}
    config = {"data.name": data, "task": task, "scale": "smoke", "trainer.lr": 0.1}
    return record("lead", 0, metrics, config=config, device=device, params=None, state_floats=None)


def pick(rows: list, metric: str, **match: Any) -> Any:
    """The only row of a metric that matches."""
    found = [
        r for r in rows if r["metric"] == metric and all(r[key] == value for key, value in match.items())
    ]
    assert len(found) == 1, found
    return found[0]


def sheet_text(records: list, name: str) -> tuple[list[str], Any]:
    """Column titles and the only sheet of a table."""
    (sheet,) = sheets(tidy(records), records, [name])
    return [column.title for column in sheet.columns], sheet


def recall(
    model: str = "infini_linear", seed: int = 0, values: dict[int, float] | None = None, **changes
) -> Record:
    """Exact match by segments after the fact; text is ten points below constant filler."""
    metrics = []
    for k, value in (values or {0: 100.0, 1: 100.0, 64: 90.0, 1024: 40.0}).items():
        for condition, hit in (("constant", value), ("text", value - 10), ("memory_off", 0.0)):
            columns = {"split": "test", "position": str(k), "condition": condition, "length": (k + 1) * 32}
            columns |= {"protocol": "curriculum", "ci_low": hit - 2, "ci_high": hit + 2}
            metrics.append(row("exact_match", hit, {"chance": 100 / 256}, n=100, **columns))
            metrics.append(row("token_accuracy", hit, {"chance": 100 / 16}, n=200, **columns))
    for place, gate in (("filler", 0.25), ("question", 0.75)):
        metrics.append(row("gate", gate, split="test", position=place, condition="constant", n=100))
    task = {
        "name": "recall",
        "segments": 16,
        "segments_after": [0, 1, 64, 1024],
        "fillers": ["constant", "text"],
    }
    config = {"task": task, "trainer.curriculum": [1, 16], **changes.pop("config", {})}
    return record(model, seed, metrics, config=config, **changes)


def mqar(model: str = "infini_linear", seed: int = 0, value: float = 80.0, **changes) -> Record:
    metrics = []
    for pairs in (4, 16):
        for d in (0, 4):
            for end, hit in (("", value - pairs - d), (", memory_off", 2.0)):
                columns = {
                    "position": str(d),
                    "condition": f"{pairs} pairs{end}",
                    "length": 64,
                    "n": 50 * pairs,
                }
                extra = {"pairs": pairs, "chance": 3.125}
                columns |= {"ci_low": hit - 1, "ci_high": hit + 1}
                metrics.append(row("token_accuracy", hit, extra, **columns))
    task = {"name": "mqar", "segments": 4, "train_pairs": [2, 4]}
    return record(model, seed, metrics, config={"task": task, **changes.pop("config", {})}, **changes)


def taught(run: Record, *levels: int) -> list[Record]:
    """An evaluation and its model's training, which logged a step at each of these levels and ended."""
    name = f"train-{run.id}"
    points = [{"step": step, "level": level} for step, level in enumerate(levels, 1)]
    run.train |= {"id": name, "steps": len(levels)}
    train = {"folder": f"runs/{name}", "curve": points}
    return [replace(run, id=name, kind="train", metrics=[], train=train), run]


LOST = "UserError: Step 7 gave loss nan; lower trainer.lr."


def training(task: str = "lm", norms: tuple[float, float] | None = (0.5, 4.0), **changes) -> Record:
    """Of a training that ended well, or with an error (``norms`` None)."""
    config = {"task": {"name": task}, **changes.pop("config", {})}
    values: dict[str, Any] = {"kind": "train", "config": config, "tokens": 4000, "train": {"folder": "x"}}
    if norms is None:
        values |= {
            "status": "failed",
            "error": "Traceback\nUserError: Step 7 gave loss nan; lower trainer.lr.",
        }
    else:
        facts = {"seconds": 2.0, "final_loss": 1.5, "grad_norm_mean": norms[0], "grad_norm_max": norms[1]}
        values["train"] |= facts
    return record(**{**values, **changes})


def verdicts(records) -> dict[str, tuple[str, str]]:
    """Verdict and sentence of each claim, by its id."""
    lines = judged(Evidence(tidy(records), records))
    return {line[0]: (line[3], line[4]) for line in lines}
