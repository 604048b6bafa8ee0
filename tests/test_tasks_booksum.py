"""Book summaries: what is read before a summary is written, how it is scored, and what is trained on."""

import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from infini_bench.config import build_config
from infini_bench.errors import UserError
from infini_bench.memory.retrieval import RetrievalMemory
from infini_bench.models import build_model
from infini_bench.progress import NullProgress
from infini_bench.schema import BooksumConfig, DataConfig, DecoderConfig, MemoryConfig, RunConfig
from infini_bench.summaries import read_summaries
from infini_bench.tasks import build_task
from infini_bench.tasks.booksum import SEPARATOR
from infini_bench.tasks.booksum_write import Writer as Reading
from infini_bench.tasks.booksum_write import fixed_gates

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
            (tmp_path / "books").mkdir(exist_ok=True)
            (tmp_path / "books" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        source = {"name": "mine", "source": "local", "path": str(tmp_path / "books")}
        source["id_column"] = "id"
        source["summary_column"] = "summaries"
        data = DataConfig(tokenizer="bytes", cache_dir=str(tmp_path / "cache"), **source)
        task = BooksumConfig(**{"greedy": True, "max_new_tokens": 40, "chunk": 40, **settings})
        cfg = RunConfig(data=data, memory=MemoryConfig(segment=SEGMENT), task=task)
        cfg.records = str(tmp_path / "records")
        return build_task(cfg)

    return task


class Carried:
    """What each row has read."""

    def __init__(self, texts: list[bytes]):
        self.texts = texts

    def select_rows(self, index):
        return Carried([self.texts[i] for i in index])

    @classmethod
    def stack(cls, states):
        return cls([b"" if state is None else state.texts[0] for state in states])


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

    def gates(self):
        return None

    def step(self, ids, state, keep, mask=None):
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        ids = ids.clamp(max=255)  # rows that ended are given their end again
        new = [bytes(row[here].tolist()) for row, here in zip(ids, mask, strict=True)]
        texts = [a + b for a, b in zip([b""] * len(new) if state is None else state.texts, new, strict=True)]
        if keep == "none":
            return None, Carried(texts)
        tokens = torch.tensor([[self.answer(text)] for text in texts])
        return torch.nn.functional.one_hot(tokens, 300).float(), Carried(texts)

    def answer(self, text):
        before, _, written = text.partition(SEPARATOR.encode())
        if not written:
            self.prompts.append(before)
        short = self.off or len(before) < SEGMENT
        summary = b"" if short else self.summaries[before[0]]
        return [*summary, self.eos_id][min(len(written), len(summary))]


def texts(task, row):
    """Book -> the summaries that a row of ``overall`` names, in the order of its samples."""
    found = {}
    for line in read_summaries(Path(task.cfg.records), row["extra"]["summaries"]):
        if (line["condition"], line["length"]) == (row["condition"], row["length"]):
            found.setdefault(line["book"], []).append(line["text"])
    return found


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
    assert texts(task, overall) == {
        "test0": ["the king died"],
        "test1": ["they lived"],
        "test2": ["wrong words"],
    }
    assert overall["extra"]["books"] == ["test0", "test1", "test2"]
    assert overall["n"] == 3 and overall["ci_low"] <= overall["value"] <= overall["ci_high"]
    assert value(rows, "summary_tokens")["value"] == pytest.approx((13 + 10 + 11) / 3)
    assert (overall["protocol"], overall["split"], overall["length"]) == ("greedy", "test", None)


def test_controls(make):
    task = make()
    rows = task.evaluate(Writer(task.tokenizer.eos_id))
    assert value(rows, "overall", "shuffled")["value"] == value(rows, "overall")["value"]
    assert value(rows, "rouge1", "memory_off")["value"] == 0
    assert value(rows, "empty", "memory_off")["value"] == 100 and value(rows, "empty")["value"] == 0
    other = texts(task, value(rows, "overall", "other_memory"))
    assert [*other.values()] == [["they lived"], ["wrong words"], ["the king died"]]


def test_what_is_read(make):
    task = make()
    model = Writer(task.tokenizer.eos_id)
    task.evaluate(model)
    own, other, shuffled, off = model.prompts[::3]
    assert own == b"a" * 150 and off == b"a" * 22  # the unfinished segment starts at 128
    # the second book's state at its own last border, then the first book's unfinished segment
    assert other == b"b" * 192 + b"a" * 22
    assert shuffled == own and model.prompts[1] == b"b" * 200


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


def test_training_batches(make):
    task = make(train_input_tokens=60, train_summary_tokens=12, lm_weight=0.5)
    batch = task.batch(0, 6)
    n = len(task.separator)
    assert batch.tokens.shape == (6, 60 + n + 12 + 1) and batch.weights.sum().item() == pytest.approx(1.5)
    seen = set()
    for row, mask in zip(batch.tokens.numpy(), batch.task_weights.numpy(), strict=True):
        at = np.flatnonzero(mask) + 1
        book, _, rest = bytes(row[: at[0]].tolist()).partition(SEPARATOR.encode())
        assert rest == b"" and book in (b"a" * 60, b"b" * 60, b"c" * 60)
        ended = row[at[-1]] == task.tokenizer.eos_id
        seen.add((book[:1], bytes(row[at[: -1 if ended else None]].tolist()), bool(ended)))
    # whole summaries have an end, those that were cut do not
    assert seen == {
        (b"a", b"the king die", False),
        (b"a", b"a king has d", False),
        (b"b", b"they lived", True),
        (b"c", b"nobody knows", True),
    }
    assert torch.equal(
        make(train_input_tokens=60, train_summary_tokens=12).batch(4, 2).tokens, batch.tokens[4:]
    )
    assert task.batch(0, 1, segments=2).tokens.shape == (1, 128 + n + 12 + 1)


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


def test_training_on_one_kind_of_summary(make):
    task = make(train_input_tokens=60, train_summary_tokens=20, train_kind="plot")
    path = Path(task.cfg.data.path) / "train.jsonl"
    lines = path.read_text().splitlines()
    lines[0] = '"source": "plot"'.join(lines[0].rsplit('"source": "x"', 1))  # "a king has died"
    path.write_text("\n".join([*lines[:2], lines[2].replace('"x"', '"plot"')]))
    batch = task.batch(0, 4)  # two epochs
    found = [
        bytes(row[1:][mask > 0].tolist()[:-1])
        for row, mask in zip(batch.tokens.numpy(), batch.task_weights.numpy(), strict=True)
    ]
    assert sorted(found[:2]) == sorted(found[2:]) == [b"a king has died", b"nobody knows"]
    with pytest.raises(UserError, match=r'"train" has no summary of task\.train_kind=prose; its kinds: x\.'):
        make(train_kind="prose").check_training()


def test_books_need_summaries(make):
    with pytest.raises(UserError, match="summar"):
        make(books=[("text", [])]).evaluate(Writer(0))


def test_real_models(make, memory):
    task = make(max_new_tokens=5)
    memory.segment = SEGMENT
    model = build_model(DecoderConfig(dim=32, init_std=0.3), memory, task.tokenizer.vocab_size)
    rows = task.evaluate(model)
    wanted = {"pairwise", "best"} | (
        {"memory_off", "other_memory", "shuffled"} if model.has_memory else set()
    )
    assert {row["condition"] for row in rows} == wanted
    assert all(0 <= row["value"] <= 100 for row in rows)


# --- input lengths ----------------------------------------------------------------------------------------

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


# --- does it read the book? -------------------------------------------------------------------------------


def test_gates_are_fixed_while_a_control_lasts(make, decoder):
    task = make(gates=[0.0, 1.0], max_new_tokens=4)
    model = build_model(decoder, MemoryConfig(segment=SEGMENT), task.tokenizer.vocab_size)
    before = model.gates().clone()
    with fixed_gates(model, 0.25):
        assert torch.allclose(model.gates(), torch.tensor(0.25))
    rows = task.evaluate(model)
    assert torch.equal(model.gates(), before)
    assert {"gate_0", "gate_1"} < {row["condition"] for row in rows}
    # a closed gate is a memory switched off, also while the book is read
    off, closed = (texts(task, value(rows, "overall", name)) for name in ("memory_off", "gate_0"))
    assert off == closed != texts(task, value(rows, "overall", "gate_1"))
    local = build_model(decoder, MemoryConfig(kind="block", segment=SEGMENT), task.tokenizer.vocab_size)
    with pytest.raises(UserError, match=r"task\.gates: .* has no gates"):
        task.evaluate(local)


def test_shuffled_books_keep_their_segments_and_their_end(make):
    text = "".join(letter * SEGMENT for letter in "abcabcabc") + "a" * 7
    task = make([(text, ["they lived"])] * 2)
    model = Writer(task.tokenizer.eos_id)
    rows = task.evaluate(model)
    shuffled = model.prompts[-3].decode()  # without memory last
    assert shuffled != text and shuffled.endswith("a" * 7)
    parts = [shuffled[i : i + SEGMENT] for i in range(0, 9 * SEGMENT, SEGMENT)]
    assert sorted(parts) == sorted(letter * SEGMENT for letter in "abcabcabc")
    assert value(rows, "overall", "shuffled")["n"] == 2


def test_kinds_of_references_have_rows_of_their_own(make):
    task = make(controls=False)
    for split in ("train", "test"):
        path = Path(task.cfg.data.path) / f"{split}.jsonl"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([lines[0].replace('"x"', '"y"', 1), *lines[1:]]))
    rows = task.evaluate(Writer(task.tokenizer.eos_id))
    ones = {
        row["position"]: row for row in rows if (row["metric"], row["condition"]) == ("rouge1", "pairwise")
    }
    assert {kind: row["n"] for kind, row in ones.items()} == {None: 3, "x": 3, "y": 1}
    assert ones["y"]["value"] == pytest.approx(100)  # "the king died", word for word


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


# --- training on whole books ------------------------------------------------------------------------------


def test_whole_books_are_read_and_their_end_has_the_gradient(make):
    task = make(protocol="whole_book", gradient_segments=1, train_summary_tokens=12, lm_weight=0.5)
    batch, n = task.batch(0, 3), len(task.separator)
    assert batch.tokens.shape == (3, SEGMENT + 12 + 1)
    for row, before, mask in zip(batch.tokens.numpy(), batch.before, batch.task_weights.numpy(), strict=True):
        answer = np.flatnonzero(mask) + 1
        prompt = bytes([*before.tolist(), *row[: answer[0]].tolist()])
        assert prompt in [text.encode() + SEPARATOR.encode() for text, _ in BOOKS]
        ended = row[answer[-1]] == task.tokenizer.eos_id
        assert len(before) == (len(prompt) - 1) // SEGMENT * SEGMENT and ended == (prompt[:1] != b"a")
    assert batch.read == batch.weights.numel() + sum(map(len, batch.before))
    longer = task.batch(0, 3, segments=9)
    assert longer.tokens.shape == (3, 9 * SEGMENT + 12 + 1) and not any(map(len, longer.before))
    capped = make(protocol="whole_book", gradient_segments=1, input_tokens=100).batch(0, 3)
    assert [len(before) for before in capped.before] == [(100 + n - 1) // SEGMENT * SEGMENT] * 3
    with pytest.raises(UserError, match=r"task\.protocol must be one of prefix, whole_book"):
        build_config({"task": {"name": "booksum", "protocol": "curriculum"}})
    with pytest.raises(UserError, match=r"task\.lengths must rise"):
        build_config({"task": {"name": "booksum", "lengths": ["4K", "1K"]}})
