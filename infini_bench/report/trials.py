"""How much was tried before the test split was read, and how often it was: counted from the records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from infini_bench.report.records import Record
from infini_bench.report.variants import pretrained, setup_of

PLACE = ("data.path", "trained.corpus")  # the fingerprint knows the corpus by content


def reads(records: Iterable[Record], split: str, scale: str) -> list[Record]:
    """Finished evaluations of language models from scratch, document by document, of repeated runs all."""
    done = [r for r in records if (r.kind, r.status, r.task) == ("eval", "done", "lm")]
    done = [r for r in done if not pretrained(r.config) and not r.config["task"].get("joined", False)]
    return [r for r in done if (r.config["task"].get("split", "test"), r.config["scale"]) == (split, scale)]


def tried(records: Iterable[Record], scale: str) -> tuple[int, int]:
    """Infini memories on the validation split: (different configurations, different memories among them).

    Seeds, machines and settings that change no number make no other configuration.
    """
    found = [r for r in reads(records, "validation", scale) if r.config["model"].startswith("infini")]
    setups = [{k: v for k, v in setup_of(r).items() if k not in PLACE} for r in found]
    memories = [
        {k: v for k, v in setup.items() if k == "model" or k.startswith("memory.")} for setup in setups
    ]
    whole, own = ({frozenset(setup.items()) for setup in each} for each in (setups, memories))
    return len(whole), len(own)


def repeated(records: Iterable[Record], rows: list[dict[str, Any]]) -> list[str]:
    """Models whose weights read the test split of the rows' corpus more than once, with how often."""
    found = reads(records, "test", rows[0]["scale"])
    counts = Counter(_weights(r) for r in found if _corpus(r) == rows[0]["dataset"])
    return [f"{model} seed {seed}: {n}" for (model, seed, _), n in sorted(counts.items()) if n > 1]


def _weights(record: Record) -> tuple[str, int, str]:
    seed, digest = (record.train.get(key) for key in ("seed", "config_hash"))
    return record.config["model"], record.seed if seed is None else seed, digest or record.config_hash


def _corpus(record: Record) -> str:
    return next((row["dataset"] for row in record.metrics), record.config["data"]["name"])


def sentence(records: Iterable[Record], rows: list[dict[str, Any]]) -> str:
    """For the caption of a sheet of Table 2."""
    known = list(records)
    configurations, memories = tried(known, rows[0]["scale"])
    text = (
        f"Tried on the validation split at this scale: {configurations} configurations, of {memories} "
        "different Infini memories."
    )
    if rows[0]["split"] != "test":
        return text
    more = repeated(known, rows)
    if not more:
        return f"{text} All weights read the test split once."
    return f"{text} Weights that read the test split more than once: {'; '.join(more)}."
