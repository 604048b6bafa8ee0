"""``results/tables/claims``: what the paper and texts about it claim, and what the records say to it.

A verdict on what can be measured here is computed by a rule of `infini_bench.report.evidence`; nobody types
one in. What cannot be tested here at all says why.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

from infini_bench.report import evidence as on
from infini_bench.report import evidence_length, evidence_summaries, evidence_training
from infini_bench.report.cells import Column
from infini_bench.report.evidence import BOOKS, INFINI, MATH, Evidence, Finding, Rule
from infini_bench.report.layouts import Sheet

NAME = "claims"
COLUMNS = ("claim", "source", "statement", "verdict", "sentence", "records")
YES, NO, OPEN, BEYOND = "reproduced", "not reproduced", "not yet measured", "not testable here"
PAPER, SUMMARY, TEXTBOOK = "paper", "summaries of the paper", "explanations of the paper"
OURS = "aim of this benchmark"


@dataclass(frozen=True)
class Claim:
    """rule unset: it cannot be tested here. remark: why not, or what has to be run."""

    id: str
    source: str
    statement: str
    remark: str
    rule: Rule | None = None

    def judged(self, evidence: Evidence) -> list[str]:
        """The claim's line, in the order of COLUMNS; records joined by spaces."""
        found = self.rule(evidence) if self.rule else None
        if found is None:
            found = Finding(False, self.remark, [])
            verdict = OPEN if self.rule else BEYOND
        else:
            verdict = BEYOND if found.holds is None else YES if found.holds else NO
        return [self.id, self.source, self.statement, verdict, found.sentence, " ".join(found.records)]


TABLE2 = "Needs the test rows of `reproduce table2 --scale gpu`, two seeds at least."
TABLE4 = "Needs test rows of `reproduce table4 --scale gpu`: an adapted model's, its controls' and lead's."
FIGURE3 = "Needs trainings of both at scale gpu, two seeds; `reproduce figure3 --scale gpu` does them."
CLAIMS = [
    Claim(
        "bounded_state",
        PAPER,
        "The memory's size does not depend on the input's length.",
        "Needs `eval footprint` of both Infini memories.",
        on.bounded(INFINI),
    ),
    Claim(
        "constant_cost",
        SUMMARY,
        "Streaming is fast: cost a token and peak memory stay what they are, however long the input.",
        "Needs `profile --scale gpu` over a range of lengths of 100 and more.",
        evidence_length.constant_time(),
    ),
    Claim(
        "compression_114x",
        PAPER,
        "The state is more than 100 times smaller than Memorizing Transformers' (printed: 114).",
        "Needs `eval footprint scale=paper` of both.",
        on.smaller("infini_linear", "memorizing", 100.0),
    ),
    Claim(
        "compression_4x",
        SUMMARY,
        "Memory is 4 times smaller; the text does not say than what. Read as: than Transformer-XL's cache.",
        "Needs `eval footprint scale=paper` of both.",
        on.smaller("infini_linear", "transformer_xl", 4.0),
    ),
    Claim(
        "books_xl",
        PAPER,
        "Both Infini memories model books better than Transformer-XL (PG19: 9.65 and 9.67 to 11.88).",
        TABLE2,
        on.better(INFINI, "transformer_xl", BOOKS),
    ),
    Claim(
        "books_memorizing",
        PAPER,
        "Both model books better than Memorizing Transformers (PG19: 9.65 and 9.67 to 11.37).",
        TABLE2,
        on.better(INFINI, "memorizing", BOOKS),
    ),
    Claim(
        "math_xl",
        PAPER,
        "Both model mathematics better than Transformer-XL (2.24 and 2.23 to 2.42).",
        TABLE2,
        on.better(INFINI, "transformer_xl", MATH),
    ),
    Claim(
        "math_memorizing",
        PAPER,
        "Both model mathematics better than Memorizing Transformers (2.24 and 2.23 to 2.26).",
        TABLE2,
        on.better(INFINI, "memorizing", MATH),
    ),
    Claim(
        "delta_books",
        SUMMARY,
        "The delta rule improves on the linear update: books (the paper itself prints 9.67 to 9.65).",
        TABLE2,
        on.better(("infini_delta",), "infini_linear", BOOKS),
    ),
    Claim(
        "delta_math",
        PAPER,
        "The delta rule improves on the linear update: mathematics (2.23 to 2.24).",
        TABLE2,
        on.better(("infini_delta",), "infini_linear", MATH),
    ),
    Claim(
        "longer_training",
        PAPER,
        "Training on longer sequences helps further (100K instead of 32K; here twice the length).",
        TABLE2,
        on.better(INFINI, "shorter training", MATH),
    ),
    Claim(
        "variant_100x",
        OURS,
        "An Infini memory with a state 100 times smaller or more beats Memorizing Transformers on both sets.",
        TABLE2,
        on.wins("memorizing", 100.0),
    ),
    Claim(
        "memory_used",
        PAPER,
        "The compressive memory contributes to language modelling.",
        TABLE2,
        on.memory_used(INFINI),
    ),
    Claim(
        "local_head_a_layer",
        PAPER,
        "After training every layer has at least one head that attends locally only.",
        FIGURE3,
        evidence_training.gates("local_layers", 100.0, "Layers with a gate of at most 0.1"),
    ),
    Claim(
        "specialised_heads",
        PAPER,
        "Heads specialise: gates go to 0 or 1.",
        FIGURE3,
        evidence_training.gates("local_heads", 10.0, "Heads with a gate of at most 0.1"),
    ),
    Claim(
        "mixer_heads",
        PAPER,
        "Mixer heads emerge, with gates near 0.5.",
        FIGURE3,
        evidence_training.gates("mixer_heads", 5.0, "Heads with a gate between 0.4 and 0.6"),
    ),
    Claim(
        "stable_bptt_linear",
        TEXTBOOK,
        "Backpropagation through all segments is stable with ELU+1 and the sum of keys: Linear.",
        "Needs trainings of Linear at scale gpu.",
        evidence_training.stable(("infini_linear",)),
    ),
    Claim(
        "stable_bptt_delta",
        TEXTBOOK,
        "Backpropagation through all segments is stable with ELU+1 and the sum of keys: Linear + Delta.",
        "Needs trainings of Linear + Delta at scale gpu.",
        evidence_training.stable(("infini_delta",)),
    ),
    Claim(
        "delta_idempotent",
        SUMMARY,
        "The delta rule leaves the memory unchanged if the binding already exists.",
        "A matter of the update, not of a record: z grows by the key each time, so plain Delta reads half of "
        "a value written again; with the corrected normaliser all of it (tests/test_memory.py).",
    ),
    Claim(
        "passkey_1m_paper",
        PAPER,
        "Fine-tuned on 5K inputs only, a 1B model finds a passkey at 1M tokens (94 to 100 %).",
        "Needs passkey rows at 1M tokens of both memories after the paper's protocol, scaled down or not: "
        "start, middle and end, 20 trials each.",
        on.key_at_a_million(("paper", "paper, scaled down"), ("start", "middle", "end"), INFINI),
    ),
    Claim(
        "passkey_1m",
        SUMMARY,
        "A passkey is found at 1M tokens by a model trained on far shorter inputs (any training).",
        "Needs passkey rows of protocol curriculum at 1M tokens, 20 trials a depth.",
        on.key_at_a_million(("curriculum",), ("start", "middle", "end_outside")),
    ),
    Claim(
        "plug_and_play",
        PAPER,
        "A pretrained model takes the memory up by continued training and then handles 1M tokens.",
        "Needs `adapt` and its passkey rows at 1M tokens, 20 trials a depth.",
        on.key_at_a_million(("curriculum",), ("start", "middle", "end_outside"), pretrained=True),
    ),
    Claim(
        "rouge_grows",
        PAPER,
        "Summaries improve with more of the book as input (Figure 4).",
        "Needs table4_booksum at scale gpu, one Infini memory at three input lengths or more, on the test "
        "split.",
        evidence_summaries.grows_with_input(),
    ),
    Claim(
        "summaries_better",
        OURS,
        "The adapted model's summaries are better than the same LLM's without memory and than the book's "
        "first sentences (lead).",
        TABLE4,
        evidence_summaries.ahead_of(("smollm2_4k", "smollm2_1k", "lead"), ("smollm2_full",)),
    ),
    Claim(
        "summaries_of_the_book",
        OURS,
        "The summary depends on the book that was read: another book's memory, or none, makes it worse.",
        TABLE4,
        evidence_summaries.ahead_of(("other_memory", "memory_off")),
    ),
    Claim(
        "booksum_sota",
        PAPER,
        "An 8B model with the memory sets a new state of the art on BookSum at 500K tokens.",
        "The 8B model is unnamed and the rows it is set against are of a model of 140M parameters.",
    ),
    Claim(
        "printed_perplexities",
        PAPER,
        "Token perplexity 9.65 on PG19 and 2.23 on Arxiv-math.",
        "Tokenizer, steps and the mathematics corpus are not public: no perplexity can be compared.",
    ),
]


def judged(evidence: Evidence) -> list[list[str]]:
    """A line a claim, in the order of COLUMNS."""
    return [claim.judged(evidence) for claim in CLAIMS]


def to_csv(lines: list[list[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([COLUMNS, *lines])
    return text.getvalue()


def sheet(lines: list[list[str]]) -> Sheet:
    """The table as it is printed: how many records instead of their names, which the page lists."""
    titles = [*COLUMNS[:-1], "records"]
    rows = [[*line[:-1], str(len(line[-1].split()))] for line in lines]
    counts = {verdict: sum(line[3] == verdict for line in lines) for verdict in (YES, NO, OPEN, BEYOND)}
    caption = "Verdicts are computed from the records by the rules of `infini_bench/report/evidence*.py`: "
    caption += ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    caption += ". Language models count on test splits at scale gpu or paper with two seeds or more; that "
    caption += (
        "something can be done is shown by the best training of a model, however many failed. Intervals "
    )
    caption += "over documents and seeds; of two seeds they hardly reach past the two."
    records = sorted({name for line in lines for name in line[-1].split()})
    columns = [Column(title, lambda line: "") for title in titles]
    return Sheet(NAME, "Claims", columns, rows, caption, records=records)
