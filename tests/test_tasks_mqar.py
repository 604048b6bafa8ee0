"""Multi-query associative recall: the recipe, an oracle, a constant answer, and real memories."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from test_tasks_recall import Oracle, State, by

from infini_bench.data import SymbolTokenizer
from infini_bench.data.tokenizers import ByteTokenizer
from infini_bench.errors import UserError
from infini_bench.models import build_model
from infini_bench.schema import DecoderConfig, MemoryConfig, MQARConfig, RunConfig
from infini_bench.tasks import build_task
from infini_bench.tasks.mqar import Trial

SEGMENT = 16
VOCABULARY = 64


def make(tokenizer=None, **settings):
    task = {"vocabulary": VOCABULARY, "train_pairs": [2, 6], "pairs": [3, 12], "segments_after": [0, 1, 3]}
    task |= {"trials": 10, "batch": 4, "chunk": 64}
    return build_task(
        RunConfig(memory=MemoryConfig(segment=SEGMENT), task=MQARConfig(**task | settings)), tokenizer
    )


class PairOracle(Oracle):
    """Answers with what last stood behind the key, if that was a value and is within its reach."""

    def best(self, seen: list[int]) -> int:
        if self.guess is not None:
            return self.guess
        places = [i for i in range(len(seen) - 1) if seen[i] == seen[-1]]
        return seen[places[0] + 1] if places else 0

    def step(self, ids, state=None, keep="all"):
        if self.off and state is not None:  # nothing from before the segment: states are aligned to it here
            state = State(seen=state.seen[:, state.seen.shape[1] // SEGMENT * SEGMENT :])
        return super().step(ids, state, keep)


def test_a_trial_is_zoologys():
    trial = Trial([1], VOCABULARY, 8)
    assert len({*trial.keys}) == 8 and trial.keys.max() < 32 <= trial.values.min()
    assert trial.written().tolist() == [
        x for pair in zip(trial.keys, trial.values, strict=True) for x in pair
    ]
    filler = trial.filler(4000)
    assert {*filler.tolist()} == {*range(VOCABULARY)} - {*trial.keys.tolist()}
    counts = np.bincount(filler, minlength=VOCABULARY)
    assert counts[counts > 0].min() > 30, "every other token is as likely"
    zone, places = trial.zone(40, 0.01, np.random.default_rng(0))
    assert zone[places].tolist() == trial.values.tolist()
    assert zone[places - 1].tolist() == trial.keys.tolist() and {*places % 2} == {1}
    first = [
        Trial([i], VOCABULARY, 1).zone(200, 0.01, np.random.default_rng(i))[1][0] // 2 for i in range(500)
    ]
    weights = np.arange(1, 101) ** -0.99
    assert np.mean(np.array(first) == 0) == pytest.approx(weights[0] / weights.sum(), abs=0.05)


def test_training_batches():
    task = make()
    batch = task.batch(5, 100, segments=4)
    assert batch.tokens.shape == (100, 4 * SEGMENT + 1)
    assert torch.equal((batch.weights > 0).float(), batch.task_weights)
    assert batch.weights.sum(1).tolist() == pytest.approx([1 / 100] * 100)
    starts, counts = set(), set()
    for row, answer in zip(batch.tokens.numpy(), batch.task_weights.numpy(), strict=True):
        at = np.flatnonzero(answer) + 1
        pairs = dict(row[: 2 * len(at)].reshape(-1, 2).tolist())
        assert {int(row[i - 1]): int(row[i]) for i in at} == pairs and len(pairs) == len(at)
        others = [i for i in range(2 * len(at), len(row)) if i + 1 not in at]
        assert not {*row[others].tolist()} & pairs.keys()
        starts.add((at.min() - 1) // SEGMENT)
        counts.add(len(at))
    assert counts == {2, 6} and starts >= {0, 1, 2, 3}
    assert torch.equal(make().batch(7, 3, segments=4).tokens, batch.tokens[2:5])


def test_pairs_that_do_not_fit_are_left_out_or_told():
    assert {int(row.sum()) for row in make().batch(0, 20, segments=1).task_weights} == {2}
    with pytest.raises(UserError, match=r"task\.segments and trainer\.curriculum to 2 or more: 6 pairs"):
        make(train_pairs=[6]).batch(0, 1, segments=1)


def test_an_oracle_scores_100_and_less_without_its_memory():
    model = PairOracle().train()
    rows = make().evaluate(model)
    assert model.training and len(rows) == 2 * 2 * 3
    for pairs in (3, 12):
        on, off = (by(rows, condition=f"{pairs} pairs{end}") for end in ("", ", memory_off"))
        assert [row["value"] for row in on] == [100.0] * 3 and {row["n"] for row in on} == {10 * pairs}
        assert [row["position"] for row in off] == ["0", "1", "3"]
        assert max(row["value"] for row in off[1:]) < 10
    # 3 pairs, asked at once: 6 tokens, then 16; 12 pairs: 24 tokens fill 2 segments, and so do the questions
    assert [row["length"] for row in by(rows, condition="3 pairs")] == [22, 32, 64]
    assert [row["length"] for row in by(rows, condition="12 pairs")] == [56, 64, 96]
    assert rows[0]["extra"] == {"pairs": 3, "segments_after": 0, "chance": 100 / 32, "by_segment": [100]}
    # 8 pairs fill a segment; without a memory those of the second are known where the questions begin in it
    first, second = off[0]["extra"]["by_segment"]
    assert first < 10 < second and (2 * first + second) / 3 == pytest.approx(off[0]["value"])


def test_memory_off_reads_the_own_segment():
    """Asked at once, pairs of the questions' own segment are known without a memory."""
    rows = by(make(pairs=[3], segments_after=[0]).evaluate(PairOracle()), condition="3 pairs, memory_off")
    assert 30 < rows[0]["value"] <= 100


def test_a_constant_answer_scores_by_chance():
    task = make(vocabulary=8, pairs=[2], segments_after=[1], trials=300, batch=300)
    row = task.evaluate(PairOracle(guess=5))[0]
    assert row["ci_low"] < row["extra"]["chance"] == 25 < row["ci_high"]


def test_trials_do_not_depend_on_how_they_are_read():
    few = make(batch=10, chunk=999, segments_after=[3]).evaluate(PairOracle(guess=40))
    many = make().evaluate(PairOracle(guess=40))
    assert few == [row for row in many if row["position"] == "3"]


def test_another_vocabulary_is_told():
    for tokenizer in (ByteTokenizer(), SymbolTokenizer(63), SymbolTokenizer(64, ByteTokenizer())):
        with pytest.raises(UserError, match="evaluate a model trained on task=mqar"):
            make(tokenizer).evaluate(PairOracle())


def test_real_memories_give_the_answers_of_one_call(memory):
    memory.segment = SEGMENT
    task = make(trials=3, batch=2, pairs=[10], segments_after=[0, 2])
    model = build_model(DecoderConfig(dim=32, init_std=0.3), memory, task.tokenizer.vocab_size).eval()
    rows = task.evaluate(model)
    for d in (0, 2):
        hits = []
        for number in range(3):
            seed = [0, zlib.crc32(b"evaluation"), 10, number]
            trial = Trial(seed, VOCABULARY, 10)
            zone, places = trial.zone(2 * SEGMENT, 0.01, np.random.default_rng([*seed, d]))
            sizes = [12, SEGMENT] if d else []  # to the segment's end, and one more
            whole = np.concatenate([trial.written(), *(trial.filler(size) for size in sizes), zone])
            with torch.no_grad():
                best = model.step(torch.from_numpy(whole[None]))[0].argmax(-1)[0].numpy()
            hits.append(best[len(whole) - len(zone) + places - 1] == trial.values)
        value = by(rows, condition="10 pairs", position=str(d))[0]["value"]
        assert value == pytest.approx(100 * np.mean(hits))
