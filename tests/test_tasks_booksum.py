"""Book summaries: what is read before a summary is written, how it is scored, and what is trained on."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from infini_bench.errors import UserError
from infini_bench.models import build_model
from infini_bench.schema import BooksumConfig, DataConfig, DecoderConfig, MemoryConfig, RunConfig
from infini_bench.tasks import build_task
from infini_bench.tasks.booksum import SEPARATOR

SEGMENT = 64  # every prompt's last segment holds the end of its book and the whole separator
BOOKS = [
    ("a" * 150, ["the king died", "a king has died"]),
    ("b" * 200, ["they lived"]),
    ("c" * 210, ["nobody knows"]),
]


@pytest.fixture
def make(tmp_path):
    def task(books=BOOKS, **settings):
        for split in ("train", "validation", "test"):
            lines = [
                {
                    "id": f"{split}{i}",
                    "text": text,
                    "summaries": [{"source": "x", "text": s} for s in summaries],
                }
                for i, (text, summaries) in enumerate(books)
            ]
            (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        source = {"name": "mine", "source": "local", "path": str(tmp_path), "id_column": "id"}
        source["summary_column"] = "summaries"
        data = DataConfig(tokenizer="bytes", cache_dir=str(tmp_path / "cache"), **source)
        task = BooksumConfig(**{"greedy": True, "max_new_tokens": 40, "chunk": 40, **settings})
        return build_task(RunConfig(data=data, memory=MemoryConfig(segment=SEGMENT), task=task))

    return task


class Carried:
    def __init__(self, text: bytes):
        self.text = text

    def select_rows(self, index):
        assert index.tolist() == [0] * len(index)
        return self


class Writer(torch.nn.Module):
    """Writes the summary of the book whose first letter it remembers, and nothing if it remembers none."""

    device = torch.device("cpu")
    segment = SEGMENT
    has_memory = True

    def __init__(self, eos_id):
        super().__init__()
        self.summaries = {ord("a"): b"the king died", ord("b"): b"they lived", ord("c"): b"wrong words"}
        self.eos_id, self.prompts, self.off = eos_id, [], False

    @contextmanager
    def memory_off(self):
        self.off = True
        yield
        self.off = False

    def step(self, ids, state, keep):
        text = (b"" if state is None else state.text) + bytes(ids[0].tolist())
        if keep == "none":
            return None, Carried(text)
        before, _, written = text.partition(SEPARATOR.encode())
        if not written:
            self.prompts.append(before)
        short = self.off or len(before) < SEGMENT
        summary = b"" if short else self.summaries[before[0]]
        token = [*summary, self.eos_id][len(written)]
        return torch.nn.functional.one_hot(torch.tensor([[token]] * len(ids)), 300).float(), Carried(text)


def value(rows, metric, condition="pairwise"):
    (row,) = [r for r in rows if r["metric"] == metric and r["condition"] == condition]
    return row


def test_summaries_are_scored_in_every_condition(make):
    task = make()
    model = Writer(task.tokenizer.eos_id)
    rows = task.evaluate(model)
    scorer = RougeScorer(["rouge1", "rouge2"], use_stemmer=True)
    first, second = (scorer.score(reference, "the king died") for reference in BOOKS[0][1])
    r1 = (first["rouge1"].fmeasure + second["rouge1"].fmeasure) / 2
    assert value(rows, "rouge1")["value"] == pytest.approx(100 * (r1 + 1 + 0) / 3)
    assert value(rows, "rouge1", "best")["value"] == pytest.approx(200 / 3)
    overall = value(rows, "overall")
    means = [value(rows, kind)["value"] for kind in ("rouge1", "rouge2", "rougeL")]
    assert overall["value"] == pytest.approx(np.prod(means) ** (1 / 3))
    assert overall["extra"]["summaries"] == [["the king died"], ["they lived"], ["wrong words"]]
    assert overall["extra"]["books"] == ["test0", "test1", "test2"]
    assert overall["n"] == 3 and overall["ci_low"] <= overall["value"] <= overall["ci_high"]
    assert value(rows, "summary_tokens")["value"] == pytest.approx((13 + 10 + 11) / 3)
    assert (overall["protocol"], overall["split"], overall["length"]) == ("greedy", "test", None)


def test_controls(make):
    task = make()
    rows = task.evaluate(Writer(task.tokenizer.eos_id))
    assert value(rows, "rouge1", "memory_off")["value"] == 0
    assert value(rows, "empty", "memory_off")["value"] == 100 and value(rows, "empty")["value"] == 0
    other = value(rows, "overall", "other_memory")["extra"]["summaries"]
    assert other == [["they lived"], ["wrong words"], ["the king died"]]


def test_what_is_read(make):
    task = make()
    model = Writer(task.tokenizer.eos_id)
    task.evaluate(model)
    own, off, other = model.prompts[:3]
    assert own == b"a" * 150 and off == b"a" * 22  # 150 + 31 tokens, the last segment starts at 128
    # the second book's state at its own last segment's start, then the first book's last segment
    assert other == b"b" * 192 + b"a" * 22


def test_input_and_number_of_books_are_limited(make):
    task = make(input_tokens=160, max_books=2, controls=False)
    model = Writer(task.tokenizer.eos_id)
    rows = task.evaluate(model)
    assert model.prompts == [b"a" * 150, b"b" * 160]
    assert {row["condition"] for row in rows} == {"pairwise", "best"} and rows[0]["length"] == 160


def test_samples_are_averaged_and_repeat(make, decoder):
    task = make(greedy=False, samples=3, max_new_tokens=6, temperature=2.0, max_books=1)
    model = build_model(decoder, MemoryConfig(segment=SEGMENT), task.tokenizer.vocab_size)
    rows = [
        t.evaluate(model)
        for t in (task, make(greedy=False, samples=3, max_new_tokens=6, temperature=2.0, max_books=1))
    ]
    assert rows[0] == rows[1]
    (texts,) = value(rows[0], "overall")["extra"]["summaries"]
    assert len(texts) == 3 and len(set(texts)) == 3
    assert value(rows[0], "overall")["ci_low"] is None and value(rows[0], "overall")["protocol"] == "sampled"
    assert {row["condition"] for row in rows[0]} == {"pairwise", "best", "memory_off"}


def test_training_batches(make):
    task = make(train_input_tokens=60, train_summary_tokens=12, lm_weight=0.5)
    batch = task.batch(0, 6)
    n = len(task.separator)
    assert batch.tokens.shape == (6, 60 + n + 12 + 1) and batch.weights.sum().item() == pytest.approx(1.5)
    seen = set()
    for row, mask in zip(batch.tokens.numpy(), batch.task_weights.numpy(), strict=True):
        at = np.flatnonzero(mask) + 1
        assert row[at[-1]] == task.tokenizer.eos_id
        book, _, rest = bytes(row[: at[0]].tolist()).partition(SEPARATOR.encode())
        assert rest == b"" and book in (b"a" * 60, b"b" * 60, b"c" * 60)
        seen.add((book[:1], bytes(row[at[:-1]].tolist())))
    assert seen == {
        (b"a", b"the king die"),
        (b"a", b"a king has d"),
        (b"b", b"they lived"),
        (b"c", b"nobody knows"),
    }
    assert torch.equal(
        make(train_input_tokens=60, train_summary_tokens=12).batch(4, 2).tokens, batch.tokens[4:]
    )
    assert task.batch(0, 1, segments=2).tokens.shape == (1, 128 + n + 12 + 1)


def test_books_need_summaries(make):
    with pytest.raises(UserError, match="summar"):
        make(books=[("text", [])]).evaluate(Writer(0))


def test_real_models(make, memory):
    task = make(max_new_tokens=5)
    memory.segment = SEGMENT
    model = build_model(DecoderConfig(dim=32, init_std=0.3), memory, task.tokenizer.vocab_size)
    rows = task.evaluate(model)
    wanted = {"pairwise", "best"} | ({"memory_off", "other_memory"} if model.has_memory else set())
    assert {row["condition"] for row in rows} == wanted
    assert all(0 <= row["value"] <= 100 for row in rows)
