"""Models compared in pairs on the same documents, each difference with a 95 % interval."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from statistics import mean
from typing import Any

import numpy as np

from infini_bench.metrics.intervals import paired_bootstrap
from infini_bench.metrics.rouge import overall

Row = dict[str, Any]
Seed = tuple[int, int, int]  # of the training, how often that was run before, of the evaluation
Estimate = tuple[float, float | None, float | None]  # value, ci_low, ci_high

# The last one is set beside other Infini memories only.
REFERENCES = ("local_block", "transformer_xl", "memorizing", "infini_linear")
FLOOR = REFERENCES[0]
LESS = "loss_less_local_block"  # by position
SHORTER = "shorter training"  # what a model trained on longer sequences is compared with
RATE = "trainer.lr"
LENGTH = ("task.sequence", "trainer.batch")
SIZES = 0.02  # share by which the parameters of two compared models may differ
RESAMPLES = 2000
SHEET = ("scale", "device", "dataset", "split", "protocol")
# Two models are compared when all of this is the same: one budget, one corpus, one machine.
BUDGET = ("scale", "device", "dataset", "split", "length", "protocol", "train_tokens", "budget")


def rate(row: Row) -> float:
    return float(row["config"]["trainer"]["lr"])


def memory(row: Row) -> tuple:
    """What a model is on every budget: its name and its memory, without the width that makes room for it."""
    return (row["scale"], row["model"], tuple(pair for pair in row["own"] if pair[0].startswith("memory.")))


def deltas(measured: list[Row], best: dict[tuple, float]) -> Iterator[tuple[list[Row], tuple]]:
    """Each model against each reference on one budget: (a row a seed, (value, ci_low, ci_high, n documents)).

    Only seeds that both have are compared. The reference's name is the rows' ``condition``. best: `memory` ->
    learning rate (`rates.chosen`); where it knows both and both were run, a model at its own best rate is
    compared with the reference at its own, and otherwise both at one rate.
    """
    runs: dict[tuple, dict[Seed, Row]] = defaultdict(dict)
    for row in measured:
        if row["table"] == "table2_lm" and row["metric"] == "bits_per_byte":
            runs[row["model"], row["variant"], *(row[key] for key in BUDGET)][row["seed"]] = row
    for (model, variant, *budget), by_seed in runs.items():
        own = next(iter(by_seed.values()))
        for reference in REFERENCES if model.startswith("infini") else REFERENCES[:-1]:
            rivals = {
                key: run for key, run in runs.items() if (key[0], *key[2:-1]) == (reference, *budget[:-1])
            }
            others = _at_rates(own, rivals, best)
            other = others.get(variant) if len(others) != 1 else next(iter(others.values()))
            pairs = [(row, other[seed]) for seed, row in by_seed.items() if seed in other] if other else []
            if model != reference and pairs and _same_documents(pairs) and _same_size(pairs):
                yield _compared(pairs, reference)


def _at_rates(own: Row, rivals: dict[tuple, dict[Seed, Row]], best: dict[tuple, float]) -> dict:
    """Of a reference's runs those to compare with, by variant: both at their best rates, or else at one."""
    same, tuned = {}, {}
    for (_, variant, *_), run in rivals.items():
        other = next(iter(run.values()))
        if other["budget"] == own["budget"]:
            same[variant] = run
        if _but_rate(other) == _but_rate(own) and all(best.get(memory(r)) == rate(r) for r in (own, other)):
            tuned[variant] = run
    return tuned or same


def _but_rate(row: Row) -> list:
    return [pair for pair in row["budget"] if pair[0] != RATE]


def longer(measured: list[Row]) -> Iterator[tuple[list[Row], tuple]]:
    """Each model against itself trained on the shortest sequences, in as many tokens; as `deltas`."""
    groups: dict[tuple, dict[int, dict[Seed, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in measured:
        sequence = row["config"]["task"].get("sequence")
        if row["table"] == "table2_lm" and row["metric"] == "bits_per_byte" and sequence is not None:
            budget = [pair for pair in row["budget"] if pair[0] not in LENGTH]
            config = row["config"]
            memory = json.dumps([config["memory"], config["task"].get("memory") or {}], sort_keys=True)
            place = (row["model"], memory, *(row[key] for key in BUDGET[:-1]), *budget)
            groups[place][sequence][row["seed"]] = row
    for by_sequence in groups.values():
        shortest, *others = sorted(by_sequence)
        for sequence in others:
            short, long = by_sequence[shortest], by_sequence[sequence]
            pairs = [(row, short[seed]) for seed, row in long.items() if seed in short]
            if pairs and _same_documents(pairs):
                yield _compared(pairs, SHORTER)


def position_deltas(measured: list[Row]) -> Iterator[tuple[list[Row], tuple]]:
    """Loss at each position less local_block's on one budget, of the same seeds, nats a token; as `deltas`.

    Paired by document, with an interval, where every evaluation kept each document's sums (those of before
    2026-11-22 did not), else the mean difference alone.
    """
    runs: dict[tuple, dict[Seed, Row]] = defaultdict(dict)
    for row in measured:
        if row["table"] == "lm_position" and row["condition"] is None and row["metric"] == "loss":
            key = (row["model"], row["position"], *(row[name] for name in BUDGET), row["variant"])
            runs[key][row["seed"]] = row
    for (model, *place, variant), by_seed in runs.items():
        floors = {key[-1]: run for key, run in runs.items() if key[:-1] == (FLOOR, *place)}
        floor = floors.get(variant) if len(floors) != 1 else next(iter(floors.values()))
        pairs = [(row, floor[seed]) for seed, row in by_seed.items() if seed in floor] if floor else []
        if model != FLOOR and pairs:
            heads = [{**_head(*pair, None), "metric": LESS} for pair in pairs]
            yield heads, (*_paired_by_token(pairs), pairs[0][0]["n"])


def _paired_by_token(pairs: list[tuple[Row, Row]]) -> Estimate:
    """Mean over seeds of the difference in nats a token, and its interval where documents' sums are known."""
    if not all("nats" in row["extra"] for pair in pairs for row in pair):
        return float(np.mean([left["value"] - right["value"] for left, right in pairs])), None, None
    sums = [({**row["extra"], "bytes": row["extra"]["counts"]} for row in pair) for pair in pairs]
    value, *bounds = paired_delta([(left, right) for left, right in sums])
    low, high = (None if bound is None else bound * math.log(2) for bound in bounds)
    return value * math.log(2), low, high


def compressions(rows: list[Row]) -> list[Row]:
    """How many times smaller each model's carried state is than Memorizing Transformers' on the same sheet.

    rows: tidy. Where several settings of it were run, the largest store counts: it is the one to be saved.
    """
    sheets: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        if row["table"] == "table2_lm" and row["metric"] == "bits_per_byte":
            sheets[tuple(row[key] for key in SHEET)].append(row)
    made = []
    for sheet in sheets.values():
        most = max((row["state_floats"] or 0 for row in sheet if row["model"] == "memorizing"), default=0)
        for row in sheet if most else []:
            if row["state_floats"]:
                blank = {"metric": "state_ratio", "condition": "memorizing", "ci_low": None, "ci_high": None}
                made.append({**row, **blank, "value": most / row["state_floats"], "extra": {}})
    return made


def _same_size(pairs: list[tuple[Row, Row]]) -> bool:
    """Whether the models have as many parameters, as far as is known."""
    known = [(left["params"], right["params"]) for left, right in pairs if left["params"] and right["params"]]
    return all(abs(one - other) <= SIZES * other for one, other in known)


def _compared(pairs: list[tuple[Row, Row]], reference: str) -> tuple[list[Row], tuple]:
    heads = [_head(left, right, reference) for left, right in pairs]
    estimate = paired_delta([(left["extra"], right["extra"]) for left, right in pairs])
    return heads, (*estimate, len(pairs[0][0]["extra"]["documents"]))


def _head(left: Row, right: Row, reference: str | None) -> Row:
    names = {"metric": "delta_bits_per_byte", "condition": reference}
    return {**left, **names, "records": left["records"] + right["records"]}


def _same_documents(pairs: list[tuple[Row, Row]]) -> bool:
    read = [row["extra"]["documents"] for pair in pairs for row in pair]
    return all(documents == read[0] for documents in read)


def paired_delta(pairs: list[tuple[dict, dict]], resamples: int = RESAMPLES) -> Estimate:
    """Mean over seeds of the difference in bits per byte, left minus right, with its percentile interval
    (none with one seed and one document).

    pairs: for each seed the two runs' ``nats`` and ``bytes``, one entry a document, documents in one order.
    Documents and seeds are drawn with replacement; a draw of documents serves both models and all seeds,
    since they all read the same ones. Legend: R resamples, S seeds, D documents.
    """
    n_bytes_D = np.asarray(pairs[0][0]["bytes"], dtype=np.float64)
    nats_SD = np.array([np.subtract(left["nats"], right["nats"]) for left, right in pairs])
    seeds, documents = nats_SD.shape
    value = float(nats_SD.sum(1).mean() / n_bytes_D.sum() / math.log(2))
    if seeds == documents == 1:
        return value, None, None
    rng = np.random.default_rng(0)
    drawn_RD = rng.multinomial(documents, np.full(documents, 1 / documents), size=resamples)
    drawn_RS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    delta_RS = drawn_RD @ nats_SD.T / (drawn_RD @ n_bytes_D)[:, None] / math.log(2)
    low, high = np.percentile((delta_RS * drawn_RS).sum(1), [2.5, 97.5])
    return value, float(low), float(high)


# --- book summaries -------------------------------------------------------------------------------------

CONTROLS = ("memory_off", "other_memory", "shuffled")
SUMMARIES = ("map_reduce", "lead", "local_block")
PLACE = ("dataset", "split", "position")
PRETRAINED = "smollm2_"  # how the names of Table 4's controls begin: the same language model without a memory
# An adapted model and such a control share all of this; not input length, learning rate and earlier stages.
ALIKE = ("scale", "base", "protocol", *PLACE)
TAUGHT = (
    *("data_fingerprint", "trained.data", "trained.train_kind", "trained.steps", "trainer.batch"),
    *("trainer.accumulate", "task.temperature", "task.top_p", "task.max_new_tokens"),
)


def booksum_deltas(measured: list[Row]) -> Iterator[tuple[list[Row], tuple]]:
    """Overall of each model less that of its own controls and of other summaries of the same books.

    The others: of the same model by map and reduce, of ``lead``, which has no weights, of ``local_block`` on
    one budget, and of each control of the same pretrained model, taught alike; of several such runs the best.
    As `deltas`; paired over books, on means over the seeds that both have.
    """
    runs: dict[tuple, dict[Seed, Row]] = defaultdict(dict)
    for row in measured:
        if row["table"] == "table4_booksum" and row["metric"] == "overall" and "scores" in row["extra"]:
            runs[_booksum_key(row)][row["seed"]] = row
    for by_seed in runs.values():
        own = next(iter(by_seed.values()))
        if own["condition"] != "pairwise" or own["protocol"] == "extractive":
            continue
        for name in (*CONTROLS, *SUMMARIES, *controls(measured)):
            others = [run for run in runs.values() if _comparable(own, next(iter(run.values())), name)]
            found = [pairs for run in others if (pairs := _summary_pairs(by_seed, run, fixed=name == "lead"))]
            if pairs := max(found, key=_strength, default=[]):
                heads = [{**_head(*pair, name), "metric": "delta_overall"} for pair in pairs]
                first, second = (
                    np.mean([row["extra"]["scores"] for row in side], 0) for side in zip(*pairs, strict=True)
                )
                value, bounds = paired_bootstrap(first, second, overall, resamples=RESAMPLES)
                yield heads, (value, *(bounds or (None, None)), len(first))


def controls(rows: list[Row]) -> list[str]:
    """Names of the pretrained model's own rows in Table 4."""
    return sorted({row["model"] for row in rows if row["model"].startswith(PRETRAINED)})


def _strength(pairs: list[tuple[Row, Row]]) -> float:
    return mean(right["value"] for _, right in pairs)


def _summary_pairs(own: dict[Seed, Row], other: dict[Seed, Row], fixed: bool) -> list[tuple[Row, Row]]:
    """Rows of the seeds that both have, if of the same books. fixed: seeds mean nothing to ``other``."""
    constant = next(iter(other.values())) if fixed else None
    pairs = [(row, constant or other[seed]) for seed, row in own.items() if fixed or seed in other]
    return pairs if all(left["extra"]["books"] == right["extra"]["books"] for left, right in pairs) else []


def _booksum_key(row: Row) -> tuple:
    return tuple(row[key] for key in ("model", "variant", "condition", "protocol", "position", *BUDGET))


def _comparable(own: Row, other: Row, name: str) -> bool:
    """Whether ``other`` is what ``own`` is compared with under this name."""
    wanted = {**own, "condition": name} if name in CONTROLS else own
    if name == "map_reduce" and other["protocol"].startswith(name):
        other = {**other, "protocol": other["protocol"].partition(", ")[2]}
    elif name == "map_reduce":
        return False
    if name == "lead":
        return (
            other["model"] == name
            and other["condition"] == "pairwise"
            and all(other[key] == own[key] for key in PLACE)
        )
    if name.startswith(PRETRAINED):
        taught, other_taught = (dict(row["budget"]) for row in (own, other))
        same = all(own[key] == other[key] for key in ALIKE) and other["condition"] == "pairwise"
        same = same and all(taught.get(key) == other_taught.get(key) for key in TAUGHT)
        return same and other["model"] == name and not own["model"].startswith(PRETRAINED)
    if name == "local_block":
        return own["model"] != name == other["model"] and _booksum_key(other)[2:] == _booksum_key(own)[2:]
    return _booksum_key(other) == _booksum_key(wanted)
