"""Recall against compressions: batches, an oracle, a constant answer, controls, and real memories."""

from __future__ import annotations

import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from infini_bench.data import SymbolTokenizer
from infini_bench.data.tokenizers import ByteTokenizer
from infini_bench.errors import UserError
from infini_bench.models import build_model
from infini_bench.schema import DataConfig, DecoderConfig, MemoryConfig, RecallConfig, RunConfig
from infini_bench.tasks import build_task
from infini_bench.tasks.recall import CYCLE

SEGMENT = 16
FIRST = 257  # the symbols: behind bytes and eos
KEYS = FIRST + 2 + CYCLE


@pytest.fixture
def make(tmp_path):
    """A task on two small text files; ``settings`` are the task's."""
    (tmp_path / "text").mkdir()
    for split in ("train", "validation", "test"):
        (tmp_path / "text" / f"{split}.txt").write_text(f"This is the text of {split}. " * 20)

    def made(tokenizer=None, **settings):
        task = {"segments": 4, "segments_after": [0, 1, 3, 8], "trials": 10, "batch": 4, "chunk": 64}
        data = DataConfig(
            "local", "local", str(tmp_path / "text"), tokenizer="bytes", cache_dir=str(tmp_path)
        )
        cfg = RunConfig(
            data=data, memory=MemoryConfig(segment=SEGMENT), task=RecallConfig(**{**task, **settings})
        )
        return build_task(cfg, tokenizer)

    return made


class State(SimpleNamespace):
    def select_rows(self, index):
        return State(seen=self.seen[index])


class Oracle(torch.nn.Module):
    """Knows every token so far and answers by looking the fact up; ``guess``: always answers this symbol."""

    segment, has_memory, device, memories = SEGMENT, True, torch.device("cpu"), ()

    def __init__(self, guess: int | None = None):
        super().__init__()
        self.guess, self.off, self.read, self.longest = guess, False, 0, 0

    def gates(self):
        return torch.tensor([[0.25, 0.75]])

    def memory_off(self):
        oracle = self

        class Off:
            def __enter__(self):
                oracle.off = True

            def __exit__(self, *error):
                oracle.off = False

        return Off()

    def step(self, ids, state=None, keep="all"):
        self.read += ids.numel() * (not self.off)
        self.longest = max(self.longest, ids.numel())
        seen = ids if state is None else torch.cat([state.seen, ids], 1)
        shown = range(1) if keep == "none" else range(seen.shape[1] - ids.shape[1], seen.shape[1])
        logits = torch.zeros(len(ids), len(shown), FIRST + 64)
        for row in range(len(ids)):
            for column, end in enumerate(shown):
                logits[row, column, self.best(seen[row, : end + 1].tolist())] = 1
        return (None if keep == "none" else logits[:, -1:] if keep == "last" else logits), State(seen=seen)

    def best(self, seen: list[int]) -> int:
        if self.guess is not None or FIRST not in seen or FIRST + 1 not in seen:
            return self.guess or 0
        given = len(seen) - 1 - (seen.index(FIRST + 1) + 2)  # symbols of the answer that are there already
        return seen[seen.index(FIRST) + 3 + given] if 0 <= given < 2 else 0


def by(rows: list, **match):
    return [row for row in rows if all(row[key] == value for key, value in match.items())]


def parts(row: np.ndarray) -> tuple[list[int], list[int], int, int]:
    """Fact and question with its answer, without their markers, and where these stand."""
    fact, ask = (int(np.flatnonzero(row == FIRST + i)[0]) for i in (0, 1))
    return row[fact + 1 : fact + 5].tolist(), row[ask + 1 : ask + 5].tolist(), fact, ask


def test_training_batches(make):
    task = make(lm_weight=0.5)
    batch = task.batch(10, 200)
    assert batch.tokens.shape == (200, 4 * SEGMENT + 1) and batch.weights.shape == (200, 4 * SEGMENT)
    assert batch.weights.sum().item() == pytest.approx(1.5)
    apart, text = [], 0
    for row, answer in zip(batch.tokens.numpy(), batch.task_weights.numpy(), strict=True):
        fact, asked, written, ask = parts(row)
        assert fact == asked and all(t >= KEYS for t in fact) and (row >= FIRST).sum() >= 10
        assert (np.flatnonzero(answer) + 1).tolist() == [ask + 3, ask + 4]
        assert (ask + 4) % SEGMENT == 0 and written + 4 < ask
        assert written // SEGMENT == (written + 4) // SEGMENT, "the fact lies in one segment"
        apart.append((ask // SEGMENT - written // SEGMENT, ask // SEGMENT))
        text += int((row < FIRST).any())
    assert {distance for distance, _ in apart} == {0, 1, 2, 3} == {last for _, last in apart}
    assert 60 < text < 140, "half of the rows have text"
    assert len({tuple(parts(row)[0]) for row in batch.tokens.numpy()}) > 190


def test_batches_are_a_function_of_the_cursor(make):
    task = make()
    whole = task.batch(0, 6)
    assert torch.equal(make().batch(2, 3).tokens, whole.tokens[2:5])
    assert not torch.equal(task.batch(0, 6, split="validation").tokens, whole.tokens)
    assert task.batch(0, 2, segments=1).tokens.shape == (2, SEGMENT + 1)


def test_text_comes_from_the_split(make):
    task = make(train_fillers=["text"])
    row = next(iter(task.batch(0, 1, split="validation").tokens.numpy()))
    text = ByteTokenizer().decode(row[row < FIRST])
    assert "of validation" in text


def test_a_segment_too_short_is_told(make):
    task = make(key=6, value=6)
    with pytest.raises(UserError, match=r"take 25 tokens; give memory\.segment at least as many"):
        task.batch(0, 1)


def test_another_vocabulary_is_told(make):
    for tokenizer in (ByteTokenizer(), SymbolTokenizer(42), SymbolTokenizer(41, ByteTokenizer())):
        with pytest.raises(UserError, match="evaluate a model trained on task=recall"):
            make(tokenizer).evaluate(Oracle())
    make(SymbolTokenizer(42, ByteTokenizer()), segments_after=[1]).evaluate(Oracle())


def test_an_oracle_scores_100_and_nothing_without_its_memory(make):
    model = Oracle().train()
    rows = make().evaluate(model)
    assert model.training and not model.off
    for filler in ("constant", "text"):
        assert [row["value"] for row in by(rows, condition=filler, metric="exact_match")] == [100.0] * 4
    off = by(rows, condition="memory_off", metric="exact_match")
    assert [row["value"] for row in off] == [100.0, 0.0, 0.0, 0.0], (
        "at 0 the fact is in the question's segment"
    )
    other = by(rows, condition="other_memory", metric="exact_match")
    assert [(row["position"], row["value"]) for row in other] == [("1", 0.0), ("3", 0.0), ("8", 0.0)]
    row = by(rows, condition="constant", position="8", metric="exact_match")[0]
    assert (row["n"], row["length"], row["split"]) == (10, 9 * SEGMENT, "test")
    assert row["ci_low"] == pytest.approx(72.25, abs=0.01) and row["extra"]["chance"] == 100 / 256
    assert by(rows, metric="token_accuracy")[0]["n"] == 20
    gates = {(row["condition"], row["position"]): row["value"] for row in by(rows, metric="gate")}
    assert gates == {(c, p): 0.5 for c in ("constant", "text") for p in ("filler", "question")}


def test_measured_gates_are_told_apart(make):
    class Gated(Oracle):
        """Its gate opens where a question is read."""

        def step(self, ids, state=None, keep="all"):
            asked = (ids == FIRST + 1).any(1).float()
            self.memories = [SimpleNamespace(gate_values=0.1 + 0.8 * asked[:, None].expand(ids.shape))]
            return super().step(ids, state, keep)

    rows = make(fillers=["constant"]).evaluate(Gated())
    assert [row["value"] for row in by(rows, metric="gate", position="filler")] == [pytest.approx(0.1)]


def test_filler_is_read_once(make):
    task = make(fillers=["constant"], controls=False, segments_after=[1, 8])
    model = Oracle()
    task.evaluate(model)
    # 8 segments once, the question's segment at 2 distances but for 2 answer symbols, of which 1 is forced
    assert model.read == 10 * (8 * SEGMENT + 2 * (SEGMENT - 1 + 1))
    assert model.longest <= 64


def test_a_constant_answer_scores_by_chance(make):
    task = make(symbols=4, trials=400, batch=400, segments_after=[1], fillers=["constant"], controls=False)
    rows = task.evaluate(Oracle(guess=KEYS + 4 + 1))
    token = by(rows, metric="token_accuracy")[0]
    assert token["ci_low"] < token["extra"]["chance"] == 25 < token["ci_high"]
    exact = by(rows, metric="exact_match")[0]
    assert exact["ci_low"] < exact["extra"]["chance"] == 6.25 < exact["ci_high"]


def test_trials_depend_on_seed_filler_and_number_alone(make):
    rows = make(batch=4).evaluate(Oracle(guess=KEYS + 16))
    others = make(batch=10, chunk=1024, segments_after=[3, 8]).evaluate(Oracle(guess=KEYS + 16))
    for filler in ("constant", "text"):
        few, many = (by(r, position="8", condition=filler, metric="token_accuracy") for r in (rows, others))
        assert few == many and len(few) == 1


def test_models_without_memory_have_no_controls(make):
    model = Oracle()
    model.has_memory = False
    assert {row["condition"] for row in make().evaluate(model)} == {"constant", "text"}


def test_real_memories_give_the_answers_of_one_call(make, memory):
    """Cut into chunks and states, a model answers as when it reads a trial whole."""
    memory.segment = SEGMENT
    task = make(trials=3, batch=2, segments_after=[0, 2], fillers=["text"])
    model = build_model(DecoderConfig(dim=32, init_std=0.3), memory, task.tokenizer.vocab_size).eval()
    rows = task.evaluate(model)
    hits = []
    for trial in range(3):
        rng = np.random.default_rng([0, zlib.crc32(b"text"), trial])
        trials = task.trials([rng], "text", "test")
        whole = torch.from_numpy(trials.asked(0, 3 * SEGMENT + 1))
        with torch.no_grad():
            best = model.step(whole[:, :-1])[0].argmax(-1)[0, -2:]
        hits.append((best == whole[0, -2:]).float().mean())
    value = by(rows, condition="text", position="2", metric="token_accuracy")[0]["value"]
    assert value == pytest.approx(100 * float(sum(hits)) / 3)
