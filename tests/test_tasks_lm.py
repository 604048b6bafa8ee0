"""Language modelling: the sums, the states of the controls, positions, by models that tell what they got."""

import json
import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import awake

from infini_bench.errors import UserError
from infini_bench.models import build_model
from infini_bench.schema import DataConfig, DecoderConfig, LMConfig, MemoryConfig, RunConfig
from infini_bench.stream import feed, stream_losses
from infini_bench.tasks import build_task
from infini_bench.tasks.exchange import other_memory_losses

SEGMENT = 8
UNSTEADY = ("word_ppl", "tokens_per_s")
TEXTS = {"train": ["abab" * 30, "b" * 50], "validation": ["ab" * 20], "test": ["a" * 21, "b" * 40, "c" * 13]}


@pytest.fixture
def make(tmp_path):
    def task(texts=None, **settings):
        for split, contents in {**TEXTS, **(texts or {})}.items():
            lines = [json.dumps({"id": f"{split}{i}", "text": text}) for i, text in enumerate(contents)]
            (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
        source = {"name": "mine", "source": "local", "path": str(tmp_path), "id_column": "id"}
        data = DataConfig(tokenizer="bytes", cache_dir=str(tmp_path / "cache"), **source)
        lm = LMConfig(**{"sequence": 32, "chunk": 20, **settings})
        return build_task(RunConfig(data=data, memory=MemoryConfig(segment=SEGMENT), task=lm))

    return task


class Told:
    """Spy's state: the last token of every row, and tokens read."""

    def __init__(self, tokens, count):
        self.tokens, self.count = tokens, count

    def select_rows(self, index):
        return Told(self.tokens[index], self.count)


class Spy(torch.nn.Module):
    """State = (token of the document, tokens read). Loss: 0.5 with no state, the state's count / 100 when its
    token is the input's, 1 + count / 100 when not, 9 with memory off; all tokens of a segment alike."""

    device = torch.device("cpu")
    segment = SEGMENT
    has_memory = True
    off = False

    @contextmanager
    def memory_off(self):
        self.off = True
        yield
        self.off = False

    def losses(self, ids, targets, state):
        loss, count = torch.zeros(ids.shape), 0 if state is None else state.count
        token = torch.full((len(ids),), -1) if state is None else state.tokens
        for i in range(ids.shape[1]):
            if (count + i) % SEGMENT == 0 and i:
                token = ids[:, i]
            border = (count + i) // SEGMENT * SEGMENT
            own = border / 100 + (token != ids[:, 0])
            loss[:, i] = 9 if self.off else 0.5 if border == 0 else own
        return loss, Told(ids[:, -1], count + ids.shape[1])

    def step(self, ids, state, keep):
        assert keep == "none" and not self.off
        return None, Told(ids[:, -1], (0 if state is None else state.count) + ids.shape[1])


def value(rows, metric, **columns):
    found = [r for r in rows if r["metric"] == metric and all(r[k] == v for k, v in columns.items())]
    assert len(found) == 1, (metric, columns, len(found))
    return found[0]


def own_loss(tokens, start=0.0):
    """What Spy gives to a document of so many tokens with its own state, or (start=1) another document's."""
    borders = np.arange(tokens - 1) // SEGMENT * SEGMENT
    return np.where(borders == 0, 0.5, borders / 100 + start)


def test_states_are_carried_and_controlled(make):
    task = make()
    model = Spy().train()
    rows = task.evaluate(model)
    assert model.training and not model.off
    on = value(rows, "bits_per_byte")
    lengths = (21, 40, 13)
    nats = [own_loss(n).sum() for n in lengths]
    assert on["extra"]["nats"] == pytest.approx(nats)
    assert on["extra"]["tokens"] == [20, 39, 12] and on["extra"]["bytes"] == [20, 39, 12]
    assert on["extra"]["documents"] == ["test0", "test1", "test2"] and on["extra"]["words"] == [1, 1, 1]
    assert on["value"] == pytest.approx(sum(nats) / math.log(2) / 71)
    assert value(rows, "bits_per_token")["value"] == pytest.approx(on["value"])
    assert value(rows, "token_ppl")["value"] == pytest.approx(math.exp(sum(nats) / 71))
    assert value(rows, "word_ppl")["value"] == pytest.approx(math.exp(sum(nats) / 3))
    assert value(rows, "bits_per_byte_memory_off")["extra"]["nats"] == pytest.approx([180, 351, 108])
    assert value(rows, "tokens_per_s")["value"] > 0
    assert on["n"] == 3 and on["ci_low"] < on["value"] < on["ci_high"] and on["dataset"] == "mine"


def test_another_documents_memory_is_at_the_same_position(make):
    rows = make().evaluate(Spy())
    nats = value(rows, "bits_per_byte_other_memory")["extra"]["nats"]
    # document 1 (40 tokens) gets the state of document 2 (13 tokens): at most its one whole segment
    second = np.where(np.arange(39) < SEGMENT, 0.5, 1 + SEGMENT / 100)
    assert nats == pytest.approx([own_loss(21, 1).sum(), second.sum(), own_loss(13, 1).sum()])


def test_positions_in_powers_of_two(make):
    rows = make().evaluate(Spy())
    places = [r["position"] for r in rows if r["metric"] == "loss" and r["condition"] is None]
    assert places == ["1", "2", "4", "8", "16", "32"]
    first = value(rows, "loss", position="1", condition=None)
    assert first["value"] == 0.5 and first["n"] == 3
    last = value(rows, "loss", position="32", condition=None)
    extra = {"first": 32, "last": 63, "tokens": 8, "counts": [8], "nats": [pytest.approx(8 * last["value"])]}
    assert last["n"] == 1 and last["ci_low"] is None and last["extra"] == extra
    assert last["value"] == pytest.approx(own_loss(40)[31:].mean())
    assert value(rows, "loss", position="8", condition="memory_off")["value"] == pytest.approx(9)


def test_unigram_counts_plus_one(make):
    rows = make(texts={"test": ["ab" * 5, "ac"]}).evaluate(Spy())
    total = 120 + 50 + 257  # tokens of the train split, and one for each of the vocabulary
    p = {"a": (60 + 1) / total, "b": (110 + 1) / total, "c": 1 / total}
    bits = [-math.log2(p[c]) for c in "babababab"] + [-math.log2(p["c"])]
    assert value(rows, "unigram_bits_per_token")["value"] == pytest.approx(sum(bits) / 10)


def test_limits_are_recorded(make):
    task = make(texts={"test": ["one two three é four", "x" * 90, "y" * 9]}, max_documents=2, max_tokens=16)
    row = value(task.evaluate(Spy()), "bits_per_byte")
    assert row["length"] == 16 and row["extra"]["max_documents"] == 2
    assert (
        row["extra"]["tokens"] == [15, 15]
        and row["extra"]["words"] == [4, 1]
        and row["extra"]["bytes"] == [15, 15]
    )


def test_controls_can_be_left_out(make):
    metrics = {r["metric"] for r in make(controls=False).evaluate(Spy())}
    assert not any("memory" in metric for metric in metrics)
    model = Spy()
    model.has_memory = False
    assert {r["metric"] for r in make().evaluate(model)} == metrics
    alone = {r["metric"] for r in make(max_documents=1).evaluate(Spy())}
    assert "bits_per_byte_memory_off" in alone and "bits_per_byte_other_memory" not in alone


def test_nothing_to_score(make):
    with pytest.raises(UserError, match='split "test"'):
        make(texts={"test": ["a"]}).evaluate(Spy())


def test_a_diverged_model_is_shown_as_such(make):
    model = Spy()
    model.losses = lambda ids, targets, state: (torch.full(ids.shape, math.nan), Told(ids[:, -1], 0))
    row = value(make().evaluate(model), "token_ppl")
    assert row["value"] is None and row["ci_low"] is None and row["extra"]["not_finite"] == "nan"


def test_batches(make):
    task = make()
    batch = task.batch(0, 4)
    assert batch.tokens.shape == (4, 33) and batch.tokens.dtype == torch.int64
    assert batch.weights.sum().item() == pytest.approx(1) and batch.task_weights is None
    assert batch.weights.sum(1).tolist() == pytest.approx([0.25] * 4)
    assert torch.equal(make().batch(2, 2).tokens, batch.tokens[2:])
    assert task.batch(0, 4, segments=2).tokens.tolist() == batch.tokens[:, :17].tolist()
    assert task.batch(0, 1, split="validation").tokens.shape == (1, 33)
    with pytest.raises(UserError, match=r"task\.sequence to at least 40"):
        task.batch(0, 4, segments=5)


def test_real_models(make, memory):
    """The state makes a difference, the chunk none."""
    letters = np.random.default_rng(0).choice(list("abcdefgh"), (3, 40))
    texts = {"test": ["".join(row) for row in letters]}
    task = make(texts)
    model = awake(build_model(DecoderConfig(dim=32, init_std=0.2), memory, task.tokenizer.vocab_size))
    rows = task.evaluate(model)
    again = make(texts, chunk=8).evaluate(model)
    assert [r["metric"] for r in rows] == [r["metric"] for r in again]
    for one, other in zip(rows, again, strict=True):
        assert one["value"] == pytest.approx(other["value"], abs=2e-4) or one["metric"] in UNSTEADY
    carried = value(rows, "bits_per_byte")["extra"]["nats"]
    ids = torch.from_numpy(task.texts()[0].ids[None].astype(np.int64))
    with torch.no_grad():
        assert carried[0] == pytest.approx(model.losses(ids[:, :-1], ids[:, 1:])[0].sum().item(), abs=1e-3)
    if model.has_memory:
        off, other = (
            value(rows, f"bits_per_byte_{name}")["extra"]["nats"] for name in ("memory_off", "other_memory")
        )
        assert abs(off[0] - carried[0]) > 1e-3 and abs(other[0] - carried[0]) > 1e-3


def one_by_one(model, documents):
    """Another document's memory as the protocol says it, segment by segment."""
    losses = []
    for i, own in enumerate(documents):
        other, state, parts = documents[(i + 1) % len(documents)], None, []
        whole = len(other) // SEGMENT * SEGMENT
        for start in range(0, len(own) - 1, SEGMENT):
            parts.append(stream_losses(model, own[None, start : start + SEGMENT + 1], SEGMENT, state)[0][0])
            if start + SEGMENT <= whole:
                state = feed(model, [other[None, start : start + SEGMENT]], state)
        losses.append(np.concatenate(parts))
    return losses


def test_memories_are_exchanged_side_by_side_as_one_by_one(memory):
    """Lengths that divide by the segment or not, shorter than one, and far longer than the donor's."""
    model = awake(build_model(DecoderConfig(dim=32, init_std=0.2), memory, 64)).eval()
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 64, length) for length in (41, 5, 16, 90, 24, 9, 33)]
    expected = one_by_one(model, documents)
    for rows in (1, 3, 16):
        found = other_memory_losses(model, documents, rows)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def test_joined_documents_are_one_stream(make):
    model, texts = Spy(), {"test": ["a" * 21, "b" * 40, "c" * 13]}
    rows = make(texts, joined=True).evaluate(model)
    on = value(rows, "bits_per_byte")
    stream = own_loss(74)  # Spy takes its first token's document for the whole: each later one is another
    assert on["protocol"] == "joined" and on["extra"]["tokens"] == [20, 39, 12]
    assert on["extra"]["documents"] == ["test0", "test1", "test2"]
    assert on["extra"]["nats"][0] == pytest.approx(stream[:20].sum())
    assert not [r for r in rows if "other_memory" in (r["metric"], r["condition"])]
    places = {r["position"]: r for r in rows if r["metric"] == "loss" and r["condition"] == "memory_off"}
    assert [*places] == ["1", "2", "4", "8", "16", "32", "64"]
    # positions 16 to 31: 5 targets of the first document, 10 of the second, whose first token is at 21
    assert (places["16"]["n"], places["16"]["extra"]["tokens"]) == (2, 15)
    cut = value(make(texts, joined=True, max_tokens=30).evaluate(model), "bits_per_byte")
    assert cut["extra"]["tokens"] == [20, 8] and cut["length"] == 30
    with pytest.raises(UserError, match=r"joined has 74 tokens, not task\.max_tokens=99"):
        make(texts, joined=True, max_tokens=99).evaluate(model)


def test_a_joined_stream_carries_the_state_of_a_real_model(make):
    letters = ["".join(np.random.default_rng(i).choice(list("abcdefgh"), 30)) for i in range(3)]
    task = make({"test": letters}, joined=True)
    memory = MemoryConfig(segment=SEGMENT)
    model = build_model(DecoderConfig(dim=32, init_std=0.2), memory, task.tokenizer.vocab_size)
    ids = torch.from_numpy(np.concatenate([t.ids for t in task.texts()])[None].astype(np.int64))
    with torch.no_grad():
        loss = model.losses(ids[:, :-1], ids[:, 1:])[0][0]
    nats = value(task.evaluate(model), "bits_per_byte")["extra"]["nats"]
    assert nats == pytest.approx([loss[a : a + 29].sum().item() for a in (0, 30, 60)], rel=1e-5)
