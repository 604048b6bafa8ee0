"""What the records say to a claim: rules that turn tidy rows into a verdict and a sentence with the numbers.

A rule returns None where nothing was measured. Language models count from `SCALES` on and on test splits:
smaller runs prove the pipeline, and validation splits served the choice of settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from infini_bench.report.cells import grouped, number
from infini_bench.report.compare import memory, paired_delta
from infini_bench.report.records import Record
from infini_bench.report.retrieval import far
from infini_bench.units import counted

Row = dict[str, Any]
SCALES = ("gpu", "paper")
BOOKS, MATH = ("books", "pg19"), ("math", "arxiv_math")
INFINI = ("infini_linear", "infini_delta")  # the paper's two
MILLION = 1024 * 1024
FEW = 3  # seeds
TRIALS = 20  # at each position; of 20 keys found the 95 % interval begins at 84 %, of 3 at 44 %
FOUND, LOST = 90.0, 20.0  # percent: a key counts as found from here on, and as not found up to there
LINE = ("model", "variant", "scale", "device", "dataset", "base")


@dataclass(frozen=True)
class Evidence:
    """Tidy rows of all tables, and all records."""

    rows: list[Row]
    records: list[Record] = field(default_factory=list)

    def find(self, table: str, metric: str, **match: Any) -> list[Row]:
        """Rows with a value; a tuple in ``match`` allows any of its entries."""
        wanted = {"table": table, "metric": metric, **match}
        return [row for row in self.rows if row["value"] is not None and _fits(row, wanted)]


@dataclass(frozen=True)
class Finding:
    """Whether what is claimed was found, the numbers in a sentence, and ids of the records.

    holds: None where what was measured cannot tell.
    """

    holds: bool | None
    sentence: str
    records: list[str]


Rule = Callable[[Evidence], Finding | None]


def _fits(row: Row, wanted: dict[str, Any]) -> bool:
    return all(
        row[key] in value if isinstance(value, tuple) else row[key] == value for key, value in wanted.items()
    )


def finding(holds: bool | None, sentence: str, rows: Iterable[Row]) -> Finding:
    return Finding(holds, sentence, sorted({record for row in rows for record in row["records"]}))


def best_known(rows: list[Row]) -> Row | None:
    """The row that most seeds stand behind, the first of them."""
    return max(rows, key=lambda row: row["seeds"], default=None)


def signed(row: Row, digits: int = 3) -> str:
    value, low, high = (number(row[key], digits, "+") for key in ("value", "ci_low", "ci_high"))
    return f"{value} [{low}, {high}]"


def _basis(row: Row) -> str:
    """On how much a number stands."""
    return f"({counted(row['seeds'], 'seed')}, {row['n']:,} documents)"


def few(rows: Iterable[Row]) -> str:
    """A sentence where fewer than FEW seeds were drawn from: their bootstrap reaches hardly past them."""
    least = min(row["seeds"] for row in rows)
    seeds = counted(least, "seed")
    return "" if least >= FEW else f" Judged on {seeds}: how other seeds would spread is not known."


# --- language modelling ---------------------------------------------------------------------------------


def better(models: tuple[str, ...], reference: str, datasets: tuple[str, ...], seeds: int = 2) -> Rule:
    """Every model needs fewer bits a byte than the reference: the paired interval lies below 0."""

    def rule(evidence: Evidence) -> Finding | None:
        match = {"condition": reference, "dataset": datasets, "split": "test", "scale": SCALES}
        found = evidence.find("table2_lm", "delta_bits_per_byte", protocol=None, **match)
        found = [row for row in found if _enough(row, seeds)]
        rows = [best_known([row for row in found if row["model"] == model]) for model in models]
        known = [row for row in rows if row is not None]
        if len(known) < len(models):
            return None
        words = [f"{row['model']} {signed(row)} {_basis(row)}" for row in known]
        text = f"Bits per byte less {reference}'s on {known[0]['dataset']} (test): {', '.join(words)}."
        text += few(known)
        return finding(all(row["ci_high"] < 0 for row in known), text, known)

    return rule


def memory_used(models: tuple[str, ...], reference: str = "local_block", seeds: int = 2) -> Rule:
    """Every model is better than the reference, which has no memory, and switching its own off costs bits:
    both paired intervals leave 0 out.
    """
    ahead = better(models, reference, BOOKS, seeds)

    def rule(evidence: Evidence) -> Finding | None:
        words: list[str] = []
        rows: list[Row] = []
        lead = ahead(evidence)
        if lead is None:
            return None
        holds = lead.holds
        for model in models:
            place = {"model": model, "dataset": BOOKS, "split": "test", "scale": SCALES, "protocol": None}
            off = best_known(evidence.find("table2_lm", "bits_per_byte_memory_off", **place))
            known = evidence.find("table2_lm", "bits_per_byte", **place)
            if off is None:
                return None
            on = next(row for row in known if same_line(row, off) and row["dataset"] == off["dataset"])
            cost = _paired(off, on)
            if not _enough(cost, seeds):
                return None
            holds, rows = holds and cost["ci_low"] > 0, [*rows, on, off]
            words.append(f"{model} {signed(cost, 4)} {_basis(cost)}")
        text = f"Bits per byte that memory off costs: {', '.join(words)}. {lead.sentence}"
        made = finding(holds, text, rows)
        return replace(made, records=sorted({*made.records, *lead.records}))

    return rule


def _paired(one: Row, other: Row) -> Row:
    """Bits per byte of ``one`` less the other's, over documents and the runs that both have."""
    runs = {part["seed"]: part["extra"] for part in other["parts"]}
    pairs = {
        part["seed"]: (part["extra"], runs[part["seed"]]) for part in one["parts"] if part["seed"] in runs
    }
    estimate = dict(zip(("value", "ci_low", "ci_high"), paired_delta([*pairs.values()]), strict=True))
    return {**one, **estimate, "seeds": len({seed[0] for seed in pairs})}


def wins(rival: str, times: float, seeds: int = 2) -> Rule:
    """One Infini memory that carries at least so many times less than the rival needs fewer bits a byte on
    books and on mathematics: both paired intervals lie below 0.
    """

    def rule(evidence: Evidence) -> Finding | None:
        place = {"condition": rival, "split": "test", "scale": SCALES, "protocol": None}
        deltas = [
            row for row in evidence.find("table2_lm", "delta_bits_per_byte", **place) if _enough(row, seeds)
        ]
        ratios = evidence.find("table2_lm", "state_ratio", **place)
        small = [row for row in ratios if row["model"].startswith("infini") and row["value"] >= times]
        found = []
        for own in dict.fromkeys(memory(row) for row in small):
            rows = [row for row in deltas if memory(row) == own and any(same_line(row, one) for one in small)]
            both = [best_known([row for row in rows if row["dataset"] in each]) for each in (BOOKS, MATH)]
            found += [[row for row in both if row is not None]] if None not in both else []
        if not found:
            return None
        best = min(found, key=lambda rows: max(row["ci_high"] for row in rows))
        words = ", ".join(f"{row['dataset']} {signed(row)} {_basis(row)}" for row in best)
        text = f"Of {len(found)} such memories {best[0]['model']} is best; bits per byte less {rival}'s: "
        return finding(all(row["ci_high"] < 0 for row in best), f"{text}{words}.{few(best)}", best)

    return rule


def _enough(row: Row, seeds: int) -> bool:
    return row["seeds"] >= seeds and row["ci_low"] is not None


# --- state ----------------------------------------------------------------------------------------------


def bounded(models: tuple[str, ...]) -> Rule:
    """The carried state has as many floats after every length."""

    def rule(evidence: Evidence) -> Finding | None:
        rows = evidence.find("table1_memory", "state_floats", model=models)
        lengths = sorted({row["length"] for row in rows})
        if len(lengths) < 2 or {row["model"] for row in rows} != {*models}:
            return None
        sizes: dict[tuple, set[float]] = {}
        for row in rows:
            key = (row["model"], row["variant"], row["scale"], row["device"])
            sizes.setdefault(key, set()).add(row["value"])
        most = max(len(values) for values in sizes.values())
        text = f"Live state of {' and '.join(models)} after {lengths[0]:,} to {lengths[-1]:,} tokens: "
        text += "the same floats at every length." if most == 1 else f"up to {most} different sizes."
        return finding(most == 1, text, rows)

    return rule


def smaller(model: str, rival: str, times: float, scale: str = "paper") -> Rule:
    """The rival's largest live state is at least ``times`` the model's at the same sizes."""

    def rule(evidence: Evidence) -> Finding | None:
        own = evidence.find("table1_memory", "state_floats", model=model, scale=scale)
        other = evidence.find("table1_memory", "state_floats", model=rival, scale=scale)
        if not own or not other:
            return None
        one, two = (max(rows, key=lambda row: row["value"]) for rows in (own, other))
        ratio = two["value"] / one["value"]
        text = (
            f"{two['value']:,.0f} floats of {rival} to {one['value']:,.0f} of {model} at the paper's sizes: "
        )
        return finding(ratio >= times, f"{text}{ratio:.1f} times.", [one, two])

    return rule


# --- retrieval ------------------------------------------------------------------------------------------


def key_at_a_million(
    protocols: tuple[str, ...],
    positions: tuple[str, ...],
    models: tuple[str, ...] = (),
    pretrained: bool = False,
) -> Rule:
    """At each position of a 1M-token haystack the key is found, and with the memory off it is not, unless it
    lies in the question's own segment.

    models: all of these do it; none given: some Infini memory does. Of a model's trainings the best counts,
    of equals the one asked most often, and only those asked for TRIALS keys or more at each position.
    pretrained: only what a pretrained model was given counts. protocols: of training; any of them.
    The paper's score is token accuracy; exact match is asked for here, which is harder.
    """

    def rule(evidence: Evidence) -> Finding | None:
        place = {"protocol": protocols, "length": MILLION, "position": positions}
        cells = evidence.find("table3_passkey", "exact_match", condition="constant", **place)
        cells = [row for row in cells if row["model"].startswith("infini")]
        cells = [row for row in cells if row["n"] >= TRIALS and (row["base"] or not pretrained)]
        lines = [line for line in grouped(cells, LINE) if {row["position"] for row in line} == {*positions}]
        lines.sort(key=lambda line: [min(row[key] for row in line) for key in ("value", "n")], reverse=True)
        wanted = models or tuple(line[0]["model"] for line in lines[:1])
        best = [next((line for line in lines if line[0]["model"] == model), None) for model in wanted]
        on = [row for line in best if line for row in line]
        if not on or None in best:
            return None
        off = evidence.find("table3_passkey", "exact_match", condition="memory_off", **place)
        off = [row for row in off if far(row) and any(same_line(row, other) for other in on)]
        least, most = min(row["value"] for row in on), max((row["value"] for row in off), default=None)
        where = f" in {on[0]['base']}" if pretrained else ""
        where += f" ({on[0]['protocol']})" if len(protocols) > 1 else ""
        text = f"{' and '.join(wanted)}{where} at 1M tokens: at least {number(least, 0)} % of "
        text += f"{min(row['n'] for row in on)} keys at each of {', '.join(positions)}"
        text += "." if most is None else f", at most {number(most, 0)} % with the memory off."
        tried = sum(line[0]["model"] in wanted for line in lines)
        text += f" The best of {tried} settings asked so." if tried > len(wanted) else ""
        holds = least >= FOUND and (most is None or most <= LOST)
        return finding(holds, text + few(on), [*on, *off])

    return rule


def same_line(one: Row, other: Row) -> bool:
    return all(one[key] == other[key] for key in LINE)
