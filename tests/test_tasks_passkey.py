"""Passkey: prompts obey the length and depth rules, and the evaluation sees exactly what a model can do."""

import zlib
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infini_bench.errors import UserError
from infini_bench.models import build_model
from infini_bench.schema import DataConfig, DecoderConfig, MemoryConfig, PasskeyConfig, RunConfig
from infini_bench.tasks import build_task
from infini_bench.tasks.haystack import Haystack, prompt_text, side_by_side

SEGMENT = 32


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def make(cache_dir):
    def task(tokenizer="bpe", segment=SEGMENT, **settings):
        settings = {"digits": 2, "trials": 6, "batch": 4, "lengths": ["512", "1K"], "chunk": 100, **settings}
        data = DataConfig(cache_dir=cache_dir, tokenizer=tokenizer)
        return build_task(
            RunConfig(data=data, memory=MemoryConfig(segment=segment), task=PasskeyConfig(**settings))
        )

    return task


@pytest.fixture(scope="module")
def haystack(cache_dir):
    cfg = RunConfig(data=DataConfig(cache_dir=cache_dir), task=PasskeyConfig(digits=5))
    return build_task(cfg).haystack


class History:
    def __init__(self, ids):
        self.ids = ids

    def tensors(self):
        return {"0.read": self.ids}

    def select_rows(self, index):
        return History(self.ids[index])


class Oracle(torch.nn.Module):
    """Reads the key off everything in its state; says ``guess`` where it saw none."""

    device = torch.device("cpu")
    has_memory = True

    def __init__(self, task, guess: str = "7", segment: int = SEGMENT):
        super().__init__()
        self.vocab, self.segment = task.tokenizer.vocab_size, segment
        self.guess = int(task.tokenizer.encode(f" {guess}")[-1])
        self.question, self.answer = task.haystack._question("1" * task.task.digits)
        self.mark = self.question[
            -5:
        ].tolist()  # "The pass key is" and a space stand before needle and answer
        self.off, self.read, self.longest = False, 0, 0

    @contextmanager
    def memory_off(self):
        self.off = True
        yield
        self.off = False

    def step(self, ids, state, keep="all"):
        self.read += ids.numel()
        self.longest = max(self.longest, ids.shape[1])
        history = History(ids if state is None else torch.cat([state.ids, ids], 1))
        if keep == "none":
            return None, history
        ends = range(history.ids.shape[1] - (ids.shape[1] if keep == "all" else 1), history.ids.shape[1])
        rows = [[self.best(row[: end + 1]) for end in ends] for row in history.ids.tolist()]
        return torch.nn.functional.one_hot(torch.tensor(rows), self.vocab).float(), history

    def best(self, seen):
        marks = [i + 5 for i in range(len(seen) - 4) if seen[i : i + 5] == self.mark]
        given = len(seen) - marks[-1]
        in_needle = len(marks) > 1
        return seen[marks[0] + given] if in_needle else self.guess


def by(rows, **columns):
    found = [row for row in rows if all(row[key] == value for key, value in columns.items())]
    assert found
    return found


def test_pieces_are_the_tokenised_text(haystack):
    for key, before, sentences in (("12345", 0, 0), ("90807", 3, 12), ("55555", 12, 12)):
        prompt = haystack.prompt(key, before, sentences)
        text = prompt_text(key, before, sentences)
        assert np.array_equal(prompt.tokens(), haystack.tokenizer.encode(f"{text} {key}")[: len(prompt)])
        assert haystack.tokenizer.decode(np.concatenate([prompt.tokens(), prompt.answer])) == f"{text} {key}"
        assert haystack.tokenizer.decode(prompt.answer) == key and len(prompt.answer) == 5
        needle = haystack.tokenizer.decode(prompt.tokens(*prompt.needle))
        assert needle.strip() == f"The pass key is {key}. Remember it. {key} is the pass key."
        assert (
            haystack.tokenizer.decode(prompt.tokens(prompt.question))
            .strip()
            .startswith("What is the pass key?")
        )


def test_every_word_of_the_prompt_is_one_token(haystack):
    text = prompt_text("1", 2, 5)
    marks = sum(text.count(c) for c in ".?") + text.count(
        "1"
    )  # a space before the digit is a token of its own
    assert len(haystack.tokenizer.encode(text)) == len(text.split()) + marks


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_length_and_depth_rules(haystack, data):
    length = data.draw(st.integers(haystack.shortest, 3000))
    segment = data.draw(st.sampled_from([32, 100, 128]))
    sentences = haystack.sentences(length)
    total = haystack.shortest + haystack.filler_tokens(sentences)
    assert total <= length < haystack.shortest + haystack.filler_tokens(sentences + 1)
    percent = data.draw(st.integers(0, 100))
    before = haystack.place(str(percent), sentences, segment)
    prompt = haystack.prompt("31415", before, sentences)
    assert len(prompt) + len(prompt.answer) == total
    assert abs(before - sentences * percent / 100) <= 0.5
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    assert np.array_equal(prompt.tokens(start, stop), prompt.tokens()[start:stop])
    try:
        outside = haystack.prompt("31415", haystack.place("end_outside", sentences, segment), sentences)
    except UserError:
        asked = prompt.question // segment - 1
        for place in range(sentences + 1):
            start, stop = haystack.prompt("31415", place, sentences).needle
            assert not start // segment == (stop - 1) // segment == asked
        return
    assert (
        outside.needle[0] // segment == (outside.needle[1] - 1) // segment == outside.question // segment - 1
    )


def test_named_depths(haystack):
    sentences = haystack.sentences(1000)
    assert [haystack.place(depth, sentences, 128) for depth in ("start", "middle", "100")] == [
        0, round(sentences / 2), sentences,
    ]  # fmt: skip
    prompt = haystack.prompt("12345", haystack.place("end", sentences, 128), sentences)
    assert prompt.needle[0] // 128 == (len(prompt) - 1) // 128
    with pytest.raises(UserError, match='leave out depth "end"'):
        haystack.place("end", sentences, 16)
    with pytest.raises(UserError, match='leave out depth "end_outside"'):
        haystack.place("end_outside", sentences, 16)


def test_a_length_below_the_prompt_says_the_shortest(haystack):
    assert haystack.sentences(haystack.shortest) == 0
    with pytest.raises(UserError, match=f"ask for {haystack.shortest} or more"):
        haystack.sentences(haystack.shortest - 1)


def test_long_haystacks_are_lazy(haystack):
    prompt = haystack.prompt("12345", 10**6, 3 * 10**6)
    assert len(prompt) > 10**7
    end = prompt.needle[1]
    assert haystack.tokenizer.decode(prompt.tokens(end - 4, end)).strip() == "the pass key."
    chunks = [*side_by_side([prompt], 10**7 - 7, 10**7 + 25, 20)]
    assert [chunk.shape for chunk in chunks] == [(1, 7), (1, 20), (1, 5)], "cut at multiples of 20"
    assert (np.concatenate(chunks, 1)[0] == prompt.tokens(10**7 - 7, 10**7 + 25)).all()
    assert [*side_by_side([prompt], 7, 7, 20)] == []


def test_unfit_tokenizers_are_refused(haystack):
    class Merged:
        name, eos_id, vocab_size = "merged", 0, 999

        def __init__(self):
            self.words = {}

        def encode(self, text):  # one token a word: the key sticks to the point behind it
            return np.array([self.words.setdefault(w, len(self.words)) for w in text.split()], np.int32)

        def decode(self, ids):
            names = list(self.words)
            return " ".join(names[i] for i in ids)

    Haystack(Merged(), 3)  # words are kept apart, so this one will do

    class Grouped(Merged):
        def encode(self, text):  # numbers below 200 are one token, others two
            split = [
                p
                for w in text.split()
                for p in ((w[0], w[1:]) if w[:3].isdigit() and w[:3] > "200" else (w,))
            ]
            return super().encode(" ".join(split))

        def decode(self, ids):
            return super().decode(ids).replace(" ", "") if len(ids) == 2 else super().decode(ids)

    with pytest.raises(UserError, match="gives keys of equal length different numbers of tokens"):
        Haystack(Grouped(), 3)


def test_training_batches(make):
    task = make(lm_weight=0.5)
    batch = task.batch(10, 64)
    length = 4 * SEGMENT
    assert batch.tokens.shape == (64, length + 1) and batch.weights.shape == (64, length)
    assert batch.weights.sum().item() == pytest.approx(1.5)
    assert (batch.weights * batch.task_weights).sum(1).tolist() == pytest.approx([1 / 64] * 64)
    keys, depths, ends = set(), set(), set()
    for row, mask in zip(batch.tokens.numpy(), batch.task_weights.numpy(), strict=True):
        at = np.flatnonzero(mask) + 1
        key = task.tokenizer.decode(row[at])
        text = task.tokenizer.decode(row[: at[-1] + 1])
        assert f"The pass key is {key}. Remember it. {key} is the pass key." in text
        assert text.endswith(f"What is the pass key? The pass key is {key}")
        assert length - SEGMENT + 1 <= at[-1] <= length
        keys.add(key)
        depths.add(text.index("Remember") // 60)
        ends.add(at[-1])
    assert len(keys) > 30 and len(depths) > 4 and len(ends) > 4 and min(keys) >= "10"


@pytest.mark.parametrize("segments", [1, 2, 4, 16])
def test_a_share_of_the_rows_has_needle_and_question_in_one_segment(make, segments):
    n, rows = 96, 400

    def near(share):
        batch = make(segment=n, own_segment=share).batch(0, rows, segments=segments)
        found = []
        for row, mask in zip(batch.tokens.numpy(), batch.task_weights.numpy(), strict=True):
            end = np.flatnonzero(mask)[0] + 1  # of the prompt
            text = task.tokenizer.decode(row[:end])
            head = task.tokenizer.encode(text[: text.index(" The pass key is")])
            assert (end - 1) // n == segments - 1
            found.append((len(head) // n == (end - 1) // n, end - len(head)))
        return found

    task = make()
    hits, distances = zip(*near(0.25), strict=True)
    by_chance = np.mean([hit for hit, _ in near(0.0)])
    expected = 0.25 + 0.75 * by_chance
    assert abs(np.mean(hits) - expected) < 4 * (expected * (1 - expected) / rows) ** 0.5 + 1e-9
    assert by_chance > 0.99 if segments == 1 else by_chance < 1 / segments
    close = {d for hit, d in zip(hits, distances, strict=True) if hit}
    assert min(close) < 40 and max(close) > 60  # from directly before the question to the segment's start


def test_share_zero_leaves_every_row_as_it_was_and_what_cannot_fit_is_told(make):
    task = make(own_segment=0.0)
    rng = np.random.default_rng([0, zlib.crc32(b"train"), 7])
    most = task.haystack.sentences(4 * SEGMENT + 1)
    least = task.haystack.sentences(3 * SEGMENT + 1) + 1
    sentences = int(rng.integers(least, most + 1))
    prompt = task.haystack.prompt(task.haystack.key(rng), int(rng.integers(0, sentences + 1)), sentences)
    assert np.array_equal(task.batch(7, 1).tokens[0, : len(prompt)].numpy(), prompt.tokens())
    with pytest.raises(UserError, match=r"task\.own_segment=0, or memory\.segment to more than 3\d"):
        make(own_segment=1.0, segment=16).batch(0, 1, segments=8)


def test_batches_are_a_function_of_the_cursor(make):
    task = make()
    whole = task.batch(0, 6)
    assert torch.equal(make().batch(2, 3).tokens, whole.tokens[2:5])
    assert not torch.equal(task.batch(0, 6, split="validation").tokens, whole.tokens)
    assert task.batch(0, 2, segments=9).tokens.shape == (2, 9 * SEGMENT + 1)
    with pytest.raises(UserError, match=r"task\.segments and trainer\.curriculum to \d or more"):
        task.batch(0, 2, segments=1)


def test_an_oracle_scores_100_and_nothing_with_its_memory_off(make):
    task = make(depths=["start", "50", "end_outside"])
    model = Oracle(task).train()
    rows = task.evaluate(model)
    assert model.training and not model.off
    assert [row["value"] for row in by(rows, condition="constant")] == [100.0] * 12
    assert max(row["value"] for row in by(rows, condition="memory_off", metric="exact_match")) <= 100 / 6
    assert {(row["length"], row["position"]) for row in rows} == {
        (length, depth) for length in (512, 1024) for depth in ("start", "50", "end_outside")
    }
    row = by(rows, condition="constant", length=1024, position="start", metric="exact_match")[0]
    assert (
        row["n"] == 6 and row["ci_low"] == pytest.approx(60.97, abs=0.01) and row["protocol"] == "curriculum"
    )
    assert row["extra"]["segments"] == (1024 // SEGMENT) - 2 and row["extra"]["chance"] == pytest.approx(
        100 / 90
    )
    assert by(rows, position="end_outside")[0]["extra"]["segments"] == 1
    assert by(rows, metric="token_accuracy")[0]["n"] == 12


def test_common_text_is_read_once(make):
    task = make(depths=["90", "100"], lengths=["1K"], controls=False)
    model = Oracle(task)
    task.evaluate(model)
    cells = task.cells(SEGMENT)
    prompts = [task.prompts(cell)[0] for cell in cells]
    behind = sum(len(prompt) - prompt.needle[0] for prompt in prompts)
    # answers: one token generated and one forced for each of 6 trials of 2 cells
    assert model.read == prompts[1].needle[0] + 6 * behind + 2 * 6 * 2
    assert model.longest <= 100 // SEGMENT * SEGMENT


def test_end_is_solved_without_memory(make):
    task = make(depths=["end"], lengths=["1000"], segment=64)
    rows = task.evaluate(Oracle(task, segment=64))
    assert [row["value"] for row in rows] == [100.0] * 4
    assert rows[0]["extra"]["segments"] == 0


def test_a_constant_answer_scores_by_chance(make):
    task = make(digits=1, trials=200, batch=100, lengths=["128"], depths=["start"])
    model = Oracle(task, guess="7")
    model.best = lambda seen: model.guess
    value = by(task.evaluate(model), condition="constant", metric="token_accuracy")[0]
    assert value["ci_low"] < 100 / 9 < value["ci_high"]


def test_keys_depend_on_seed_length_depth_and_trial(make):
    task = make(digits=5)
    cells = task.cells(SEGMENT)
    keys = [tuple(task.tokenizer.decode(p.answer) for p in task.prompts(cell)) for cell in cells]
    assert len({key for cell in keys for key in cell}) == 6 * len(cells)
    assert keys == [
        tuple(task.tokenizer.decode(p.answer) for p in make(digits=5).prompts(cell)) for cell in cells
    ]


def test_models_without_memory_have_no_control(make):
    task = make(depths=["start"], lengths=["256"])
    model = Oracle(task)
    model.has_memory = False
    assert {row["condition"] for row in task.evaluate(model)} == {"constant"}


def test_memory_off_needs_the_last_segment_only(make, memory):
    """What the control leaves unread changes nothing, for every real memory that can be switched off."""
    task = make(segment=8)
    model = build_model(DecoderConfig(dim=32, init_std=0.3), memory, task.tokenizer.vocab_size).eval()
    prompt = task.haystack.prompt("12", 3, 9)
    border = (len(prompt) - 1) // 8 * 8
    with torch.no_grad(), model.memory_off():
        whole = model.step(torch.from_numpy(prompt.tokens()[None].astype(np.int64)))[0][:, -1]
        short = model.step(torch.from_numpy(prompt.tokens(border)[None].astype(np.int64)))[0][:, -1]
    assert torch.allclose(whole, short, atol=1e-5) or not model.has_memory
    rows = make(segment=8, lengths=["128"], depths=["start"], trials=2).evaluate(model)
    scores = [row for row in rows if row["metric"] != "write_strength"]
    assert len(scores) == (4 if model.has_memory else 2)
    assert ("memory_norm" in rows[0]["extra"]) == (memory.kind in ("compressive", "armt"))


def test_a_share_of_the_training_rows_hides_the_key_in_documents_text(make):
    task, plain = make(text_share=0.5, lm_weight=1.0), make(lm_weight=1.0)
    alone = plain.fingerprint
    assert task.fingerprint == alone
    found = task.batch(0, 200, 4)
    text = task.text("train")
    cycle = set(task.haystack.cycle.tolist())
    inside = [row for row in found.tokens.numpy() if len(set(row.tolist()) - cycle) > 40]
    assert 80 < len(inside) < 120
    windows = np.lib.stride_tricks.sliding_window_view(text, 8)
    begins = [row[len(task.haystack.head) :][:8] for row in inside[:20]]
    assert sum((windows == begin).all(1).any() for begin in begins) > 14  # the others begin with the needle
    answers = found.task_weights.sum(1)
    assert (answers > 0).all() and found.weights.sum().item() == pytest.approx(2.0, rel=1e-5)
    ends = [np.flatnonzero(row)[-1] for row in found.task_weights.numpy()]
    assert all(3 * SEGMENT <= end < 4 * SEGMENT for end in ends)
    assert task.fingerprint != alone and plain.fingerprint == alone  # its rows depend on the documents
    assert (make(text_share=0.0).batch(0, 5, 4).tokens == plain.batch(0, 5, 4).tokens).all()
