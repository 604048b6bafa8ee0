"""Book summaries: how they are scored, which controls there are, and what is trained on."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from booksum_fakes import BOOKS, SEGMENT, Writer, booksum_task, texts, value
from rouge_score.rouge_scorer import RougeScorer

from infini_bench.config import build_config
from infini_bench.errors import UserError
from infini_bench.models import build_model
from infini_bench.schema import DecoderConfig, MemoryConfig
from infini_bench.tasks.booksum import SEPARATOR
from infini_bench.tasks.booksum_write import fixed_gates


@pytest.fixture
def make(tmp_path):
    return partial(booksum_task, tmp_path)


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


# --- training -------------------------------------------------------------------------------------------


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
