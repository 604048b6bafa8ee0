"""Needles in text: prompts keep their rules at any length, and an oracle scores what its state can tell."""

import re
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from infini_bench.config import build_config
from infini_bench.errors import UserError
from infini_bench.models import build_model
from infini_bench.schema import DataConfig, DecoderConfig, MemoryConfig, NeedlesConfig, RunConfig
from infini_bench.tasks import build_task
from infini_bench.tasks.needle_prompts import prompt

SEGMENT = 64
NEEDLE = re.compile(r" The secret code for the (\w+ \w+) is ([0-9a-f-]+)\.")
ASKED = re.compile(r"The secret codes? for the (\w+ \w+) (is|are)\s")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def make(cache_dir):
    def task(segment=SEGMENT, **settings):
        settings = {"digits": 3, "trials": 4, "batch": 3, "lengths": ["512", "1K"], "chunk": 200, **settings}
        data = DataConfig(cache_dir=cache_dir, max_documents=3, vocab_size=512)
        cfg = RunConfig(data=data, memory=MemoryConfig(segment=segment), task=NeedlesConfig(**settings))
        return build_task(cfg)

    return task


class Oracle(torch.nn.Module):
    """Finds every needle in all that its state has seen, and answers the question at the end."""

    device, has_memory, segment = torch.device("cpu"), True, SEGMENT

    def __init__(self, task):
        super().__init__()
        self.task, self.read = task, 0

    @contextmanager
    def memory_off(self):
        yield

    def step(self, ids, state, keep="all"):
        self.read += ids.numel()
        seen = ids if state is None else torch.cat([state, ids], 1)
        if keep == "none":
            return None, seen
        best = torch.zeros_like(ids)
        for row, tokens in enumerate(seen.tolist()):
            answer = torch.from_numpy(self.answer(tokens).astype(np.int64))
            best[row, -len(answer) :] = answer
        return torch.nn.functional.one_hot(best, self.task.tokenizer.vocab_size).float(), seen

    def answer(self, tokens):
        text = self.task.tokenizer.decode(tokens)
        *_, asked = ASKED.finditer(text)
        values = [value for key, value in NEEDLE.findall(text) if key == asked[1]] or ["000"]
        return self.task.needles._asked(text[: asked.end()].strip()[-60:], ", ".join(values))[1]


def values_of(rows, **columns):
    return [row["value"] for row in rows if all(row[key] == value for key, value in columns.items())]


def test_an_oracle_scores_100_in_every_condition_and_nothing_without_its_state(make):
    task = make(depths=["start", "middle"])
    model = Oracle(task)
    rows = task.evaluate(model)
    names = ["number", "uuid", "multikey", "multivalue", "number, constant filler", "number, asked before"]
    for name in names:
        assert values_of(rows, condition=name, metric="exact_match") == [100.0] * 4, name
        assert values_of(rows, condition=f"{name}, memory_off", metric="exact_match") == [0.0] * 4, name
    assert {row["condition"] for row in rows} == {*names, *(f"{name}, memory_off" for name in names)}
    row = next(r for r in rows if r["length"] == 1024 and r["metric"] == "exact_match")
    assert row["n"] == 4 and row["ci_low"] == pytest.approx(51.01, abs=0.01) and row["split"] == "test"
    assert row["extra"]["segments"] == 15  # from the first segment to the last


def test_half_right_is_half_right(make):
    task = make(kinds=["number"], fillers=["text"], questions=["after"], trials=40, lengths=["512"])
    model = Oracle(task)
    model.answer = lambda tokens: task.tokenizer.encode("777")
    rows = task.evaluate(model)
    share = values_of(rows, metric="token_accuracy", condition="number", position="middle")[0]
    assert 0 < share < 30 and values_of(rows, metric="exact_match", condition="number") == [0.0] * 5


@pytest.mark.parametrize("name", ["number", "uuid", "multikey", "multivalue"])
@pytest.mark.parametrize("depth", ["start", "37", "100"])
def test_prompts_have_the_length_the_depth_and_whole_sentences(make, name, depth):
    task = make(trials=8)
    condition = next(c for c in task.conditions() if c.name == name)
    decode = task.tokenizer.decode
    for made in task.prompts(condition, 1000, depth):
        assert len(made) + len(made.answer) == 1000
        text = decode(np.concatenate([made.tokens(), made.answer]))
        needles, asked = NEEDLE.findall(text), [*ASKED.finditer(text)][-1]
        assert len(needles) == {"multikey": 4, "multivalue": 4}.get(name, 1)
        expected = ", ".join(value for key, value in needles if key == asked[1])
        assert decode(made.answer).strip() == expected and text.endswith(expected)
        assert asked[1] in decode(made.tokens(*made.needle))
        assert NEEDLE.fullmatch(decode(made.tokens(*made.needle)))
        filler = made.question - sum(len(task.tokenizer.encode(m[0])) for m in NEEDLE.finditer(text))
        inside = [m for m in NEEDLE.finditer(decode(made.tokens(0, made.needle[0])))]
        place = made.needle[0] - sum(len(task.tokenizer.encode(m[0])) for m in inside)
        wanted = {"start": 0, "37": 0.37, "100": 1}[depth] * filler
        assert wanted - 300 < place <= wanted + 1  # it moves back to the sentence's end
        if depth != "100":
            before = decode(made.tokens(0, made.needle[0])).rstrip(" \n\"'")
            assert not before or before[-1] in ".!?_)" or before.endswith(".")
    head = [task.prompts(condition, 1000, depth)[i].needle for i in range(3)]
    assert head == [make(trials=8).prompts(condition, 1000, depth)[i].needle for i in range(3)]


def test_long_prompts_are_lazy_and_text_is_the_asked_split(make):
    task = make(trials=1)
    (made,) = task.prompts(task.conditions()[0], 1 << 26, "middle")
    assert made.tokens(1 << 25, (1 << 25) + 9).shape == (9,) and len(made) > 1 << 25
    ids = task.text("text", "test").ids
    train = task.text("text", "train").ids
    assert not np.array_equal(ids[:200], train[:200])
    piece = made.tokens(0, made.needle[0])[:50]
    joined = np.concatenate([ids, ids])
    assert any(np.array_equal(joined[i : i + 50], piece) for i in np.flatnonzero(ids == piece[0]))


@pytest.mark.parametrize("segments", [3, 8])
def test_training_rows_end_in_the_last_segment_and_keep_the_share(make, segments):
    rows, n = 300, 128

    def near(share):
        task = make(segment=n, own_segment=share, train_kinds=["number", "multikey"], lm_weight=0.5)
        batch = task.batch(0, rows, segments=segments)
        assert batch.weights.sum().item() == pytest.approx(1.5)
        hits = []
        for tokens, mask in zip(batch.tokens.numpy(), batch.task_weights.numpy(), strict=True):
            at = np.flatnonzero(mask) + 1
            text = task.tokenizer.decode(tokens[: at[-1] + 1])
            value = task.tokenizer.decode(tokens[at]).strip()
            asked = [*ASKED.finditer(text)][-1]
            found = [m for m in NEEDLE.finditer(text) if m[1] == asked[1]]
            assert len(found) == 1 and found[0][2] == value
            assert (at[-1] - 1) // n == segments - 1
            start = len(task.tokenizer.encode(text[: found[0].start()]))
            hits.append(start >= (segments - 1) * n)
        return np.mean(hits)

    chance, share = near(0.0), near(0.4)
    expected = 0.4 + 0.6 * chance
    assert chance < 1 / segments and abs(share - expected) < 4 * (expected * (1 - expected) / rows) ** 0.5


def test_batches_are_a_function_of_the_cursor_and_misfits_are_told(make):
    whole = make().batch(0, 6, segments=6)
    assert torch.equal(make().batch(2, 3, segments=6).tokens, whole.tokens[2:5])
    assert not torch.equal(make().batch(0, 6, segments=6, split="validation").tokens, whole.tokens)
    with pytest.raises(UserError, match=r"task\.segments and trainer\.curriculum to \d or more"):
        make(train_kinds=["multivalue"]).batch(0, 1, segments=1)
    with pytest.raises(UserError, match=r"Needles \(uuid\) do not fit in 100 tokens; take \d+ or more"):
        make(lengths=["100"]).evaluate(Oracle(make()))
    with pytest.raises(UserError, match="The depth end belongs to task=passkey"):
        build_config({"task": {"name": "needles", "depths": ["end"]}})


def test_the_asked_needle_never_starts_before_the_earliest_place(make):
    task = make()
    rng, text = np.random.default_rng(0), make().text("text", "test")
    for number in range(40):
        trial = task.needles.trial(rng, task.kinds["multikey" if number % 2 else "number"], False)
        made = prompt(trial, text, 600, rng.random(), rng, earliest=500)
        assert made.needle[0] >= 500 and len(made) + len(made.answer) == 600


def test_models_run(make, memory):
    task = make(kinds=["number", "multikey"], lengths=["200"], depths=["middle"], trials=2)
    torch.manual_seed(0)
    model = build_model(DecoderConfig(dim=32), memory, task.tokenizer.vocab_size)
    task = make(segment=model.segment, kinds=["number"], lengths=["200"], depths=["middle"], trials=2)
    rows = task.evaluate(model)
    assert len(rows) == (12 if model.has_memory else 6) and all(row["value"] is not None for row in rows)
