"""How books are read and summaries written: input lengths, samples, rows side by side, map and reduce."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from booksum_fakes import SEGMENT, Writer, booksum_task, texts, value
from rouge_score.rouge_scorer import RougeScorer

from infini_bench.config import build_config
from infini_bench.errors import UserError
from infini_bench.memory.retrieval import RetrievalMemory
from infini_bench.models import build_model
from infini_bench.progress import NullProgress
from infini_bench.schema import MemoryConfig
from infini_bench.tasks.booksum import SEPARATOR
from infini_bench.tasks.booksum_write import Writer as Reading


@pytest.fixture
def make(tmp_path):
    return partial(booksum_task, tmp_path)


LONG = [
    ("a" * 150, ["the king died"]),
    ("b" * 64 + "c" * 300, ["they lived"]),
    ("c" * 64 + "b" * 90, ["nobody knows"]),
]


class LastLetter(Writer):
    """Writes about the last letter of the book that it has read."""

    def answer(self, text):
        before, _, written = text.partition(SEPARATOR.encode())
        if not written:
            self.prompts.append(before)
        summary = self.summaries[before[-1]]
        return [*summary, self.eos_id][min(len(written), len(summary))]


def at(rows, metric, length, condition="pairwise"):
    (row,) = [r for r in rows if (r["metric"], r["length"], r["condition"]) == (metric, length, condition)]
    return row


def test_what_is_read(make):
    task = make()
    model = Writer(task.tokenizer.eos_id)
    task.evaluate(model)
    own, other, shuffled, off = model.prompts[::3]
    assert own == b"a" * 150 and off == b"a" * 22  # the unfinished segment starts at 128
    # the second book's state at its own last border, then the first book's unfinished segment
    assert other == b"b" * 192 + b"a" * 22
    assert shuffled == own and model.prompts[1] == b"b" * 200


def test_only_books_with_a_kind_of_reference_are_read(make):
    kinds = [("a" * 150, ["other"]), ("b" * 200, ["they lived"]), ("c" * 210, ["nobody knows"])]
    task = make(kinds, controls=False, kind="plot")
    own = Path(task.cfg.data.path) / "test.jsonl"
    lines = [json.loads(line) for line in own.read_text().splitlines()]
    lines[1]["summaries"] += [{"source": "plot", "text": "they died"}]
    lines[2]["summaries"][0]["source"] = "plot"
    own.write_text("\n".join(map(json.dumps, lines)))
    model = Writer(task.tokenizer.eos_id)
    rows = task.evaluate(model)
    assert model.prompts == [b"b" * 200, b"c" * 210]
    assert {row["position"] for row in rows} == {"plot"}
    (first,) = [row for row in rows if row["metric"] == "rouge1" and row["condition"] == "pairwise"]
    assert first["n"] == 2 and first["value"] == 25.0  # "they lived" against "they died" alone, and nothing
    with pytest.raises(UserError, match=r'summary of task\.kind=prose to split "test"'):
        make(kind="prose").evaluate(model)


def test_input_and_number_of_books_are_limited(make):
    task = make(input_tokens=160, max_books=2, controls=False)
    model = Writer(task.tokenizer.eos_id)
    rows = task.evaluate(model)
    assert model.prompts == [b"a" * 150, b"b" * 160]
    assert value(rows, "overall")["extra"]["cut"] == ["test1"]
    assert {row["condition"] for row in rows} == {"pairwise", "best"} and rows[0]["length"] == 160


def test_samples_are_averaged_and_repeat(make, decoder):
    task = make(greedy=False, samples=3, max_new_tokens=6, temperature=2.0, max_books=1)
    model = build_model(decoder, MemoryConfig(segment=SEGMENT), task.tokenizer.vocab_size)
    rows = [
        t.evaluate(model)
        for t in (task, make(greedy=False, samples=3, max_new_tokens=6, temperature=2.0, max_books=1))
    ]
    assert rows[0] == rows[1]
    (written,) = texts(task, value(rows[0], "overall")).values()
    assert len(written) == 3 and len(set(written)) == 3
    assert value(rows[0], "overall")["ci_low"] is None and value(rows[0], "overall")["protocol"] == "sampled"
    assert {row["condition"] for row in rows[0]} == {"pairwise", "best", "memory_off", "shuffled"}


def test_compiled_steps_write_the_same_summaries(make, decoder, monkeypatch):
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compiler(function, **how, backend="eager"))
    torch.compiler.reset()
    found = []
    for settings in ({}, {"compile": True}):
        task = make(max_new_tokens=6, greedy=True, controls=False, **settings)
        torch.manual_seed(0)
        model = build_model(decoder, MemoryConfig(segment=SEGMENT), task.tokenizer.vocab_size).eval()
        found.append(texts(task, value(task.evaluate(model), "overall")))
    assert found[0] == found[1] != {}
    with pytest.raises(UserError, match=r"task\.compile: .* no steps of one shape"):
        make(compile=True).evaluate(Writer(0))
    torch.compiler.reset()


def test_one_evaluation_has_all_lengths(make):
    task = make(LONG, lengths=["64", "160", "1K"], controls=False)
    model = LastLetter(task.tokenizer.eos_id)
    rows = task.evaluate(model)
    assert model.prompts[:3] == [b"a" * 64, b"b" * 64, b"c" * 64]
    assert model.prompts[3:6] == [b"a" * 150, b"b" * 64 + b"c" * 96, b"c" * 64 + b"b" * 90]
    cuts = [at(rows, "overall", n)["extra"]["cut"] for n in (64, 160, 1024)]
    assert cuts == [["test0", "test1", "test2"], ["test1"], []]
    ones = [at(rows, "rouge1", n)["value"] for n in (64, 160, 1024)]
    assert ones == pytest.approx([200 / 3, 100 / 3, 100 / 3])  # only the first letters are the right ones
    assert at(rows, "overall", 1024)["n"] == 3 and task.cfg.task.lengths == ["64", "160", "1K"]


def test_a_gain_is_paired_on_the_books_that_the_shorter_input_cuts(make):
    task = make(LONG, lengths=["64", "160", "1K"], controls=False)
    gains = [
        row for row in task.evaluate(LastLetter(task.tokenizer.eos_id)) if row["metric"] == "overall_gain"
    ]
    assert [(row["length"], row["n"], row["extra"]["over"]) for row in gains] == [
        (160, 3, 64),
        (1024, 1, 160),
    ]
    assert gains[0]["extra"]["books"] == ["test0", "test1", "test2"] and gains[1]["extra"]["books"] == [
        "test1"
    ]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)

    def overall(texts):
        pairs = zip([goals[0] for _, goals in LONG], texts, strict=True)
        scores = [[s.fmeasure for s in scorer.score(*pair).values()] for pair in pairs]
        return 100 * np.prod(np.mean(scores, 0)) ** (1 / 3)

    short, longer = (
        ["the king died", "they lived", "wrong words"],
        ["the king died", "wrong words", "they lived"],
    )
    assert gains[0]["value"] == pytest.approx(overall(longer) - overall(short))
    assert gains[1]["value"] == 0


def test_batches_and_lengths_change_no_summary(make, decoder, memory):
    """Side by side, or after a shorter input, a book's summary is the one that it gets alone."""
    if memory.kind == "knn":
        memory.index = "torch"
    memory.segment = SEGMENT
    settings = {"greedy": False, "samples": 2, "max_new_tokens": 6, "controls": False, "temperature": 1.5}
    tasks = [
        make(LONG, batch=3, lengths=["70", "200"], **settings),
        make(LONG, batch=1, lengths=["200"], **settings),
    ]
    model = build_model(decoder, memory, tasks[0].tokenizer.vocab_size)
    side, alone = ([*Reading(task, model, NullProgress()).write_all(*inputs(task))] for task in tasks)
    found, wanted = (
        {(length, book): [ids.tolist() for ids in samples] for length, _, book, samples in made}
        for made in (side, alone)
    )
    assert len(found) == 6 and len(wanted) == 3
    assert {key: found[key] for key in wanted} == wanted
    assert all(first != second for first, second in wanted.values())


def inputs(task):
    return [task.tokens("test", i) for i in range(3)], [int(length) for length in task.task.lengths]


# --- map and reduce ---------------------------------------------------------------------------------------


class Shortener(Writer):
    """Repeats the first letters of the pieces that it is given."""

    def answer(self, text):
        before, _, written = text.partition(SEPARATOR.encode())
        if not written:
            self.prompts.append(before)
        summary = b"".join(dict.fromkeys(before.replace(b"\n", b"")[i : i + 1] for i in range(len(before))))
        return [*summary, self.eos_id][min(len(written), len(summary))]


def test_map_reduce_summarises_parts_and_then_their_summaries(make):
    text = "".join(letter * 64 for letter in "abcdefghij")
    task = make([(text, ["abcdefghij"])], baseline="map_reduce", map_tokens=16, map_new_tokens=8, batch=3)
    model = Shortener(task.tokenizer.eos_id)
    rows = task.evaluate(model)
    row = value(rows, "overall")
    assert set(map(len, model.prompts[:40])) == {16} and all(len(p) <= 16 for p in model.prompts)
    assert value(rows, "rouge1")["value"] == 100 and row["protocol"] == "map_reduce 16 to 8, greedy"
    assert {r["condition"] for r in rows} == {"pairwise", "best"}
    with pytest.raises(UserError, match="more than half"):
        build_config({"task": {"name": "booksum", "map_tokens": 100, "map_new_tokens": 51}})


def test_parts_of_all_books_and_samples_are_written_side_by_side(make, decoder):
    """The summaries are those that each part would have by itself."""
    found = []
    for batch in (1, 5, 50):
        options = {"map_tokens": 150, "map_new_tokens": 50, "max_new_tokens": 9, "samples": 2}
        task = make(baseline="map_reduce", greedy=False, temperature=2.0, batch=batch, **options)
        torch.manual_seed(0)
        model = build_model(decoder, MemoryConfig(segment=SEGMENT), task.tokenizer.vocab_size).double().eval()
        found.append(texts(task, value(task.evaluate(model), "overall")))
    assert found[0] == found[1] == found[2] and [*found[0]] == ["test0", "test1", "test2"]
    assert all(len(set(each)) == 2 for each in found[0].values())


def test_a_model_with_retrieval_searches_when_it_writes(make, decoder, monkeypatch):
    keys, read = [], RetrievalMemory.read

    def noted(self, b, s, k, *rest):
        keys.append((b.tokens, k.shape[1]))
        return read(self, b, s, k, *rest)

    monkeypatch.setattr(RetrievalMemory, "read", noted)
    task = make(max_new_tokens=3, controls=False, max_books=1)
    model = build_model(decoder, MemoryConfig("retrieval", SEGMENT, neighbours=8), task.tokenizer.vocab_size)
    task.evaluate(model)
    assert max(n for tokens, n in keys if tokens == SEGMENT) <= SEGMENT  # of 128 of the book's 150 tokens
    assert {n for tokens, n in keys if tokens != SEGMENT} == {128}
    assert all(memory.searching for memory in model.memories)
