"""Passkey at every place of a segment: what is trained and asked, and that old rows are what they were."""

from collections import Counter
from hashlib import sha256

import numpy as np
import pytest
import torch
from report_fakes import passkey, sheet_text
from test_tasks_passkey import Oracle, by

from infini_bench.config import build_config
from infini_bench.errors import UserError
from infini_bench.models import build_model
from infini_bench.report.tidy import tidy
from infini_bench.schema import DataConfig, DecoderConfig, MemoryConfig, PasskeyConfig, RunConfig
from infini_bench.stream import generate, prefill
from infini_bench.tasks import build_task

N = 64  # tokens of a segment; of which question and answer take 11 + 2


@pytest.fixture
def make(tmp_path_factory):
    cache = str(tmp_path_factory.getbasetemp() / "cache")

    def task(segment=N, **settings):
        settings = {"digits": 2, "trials": 8, "batch": 4, "lengths": ["700"], "chunk": 100, **settings}
        data = DataConfig(cache_dir=cache)
        return build_task(
            RunConfig(data=data, memory=MemoryConfig(segment=segment), task=PasskeyConfig(**settings))
        )

    return task


def places(task, rows, segments, number=0):
    """Of training rows: places of question's start and of the needle's, from the row's start."""
    question, found = task.haystack._question("1" * task.task.digits)[0], []
    batch = task.batch(number, rows, segments)
    for row, mask in zip(batch.tokens.numpy(), batch.task_weights.numpy(), strict=True):
        answer = np.flatnonzero(mask) + 1
        begin = answer[0] - len(question)
        assert np.array_equal(row[begin : answer[0]], question) and len(answer) == task.task.digits
        text, key = task.tokenizer.decode(row[:begin]), task.tokenizer.decode(row[answer])
        assert text.count(f" The pass key is {key}. Remember it. {key} is the pass key.") == 1
        found.append((begin, len(task.tokenizer.encode(text[: text.index(" The pass key is")]))))
    return np.array(found).T


def digest(*arrays):
    return sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


def test_without_the_settings_rows_and_prompts_are_what_they_were(make):
    rows = {
        "9050045de3c859e1": {},
        "9df3904b26f9aaaa": {"own_segment": 0.3},
        "c587b59b210bb7ef": {"own_segment": 0.2, "text_share": 0.5},
    }
    for pinned, settings in rows.items():
        assert digest(make(segment=96, **settings).batch(0, 40, segments=4).tokens.numpy()) == pinned
    task = make(trials=3, lengths=["1K", "2000"])
    prompts = [prompt for cell in task.cells(96) for prompt in task.prompts(cell)]
    assert digest(*(part for p in prompts for part in (p.tokens(), p.answer))) == "bc3377a7d8e5b447"


@pytest.mark.parametrize("segments", [4, 5])
def test_trained_questions_start_at_all_places_of_a_segment(make, segments):
    few = places(make(), 400, segments)[0]
    assert len(set(few % N)) <= 14  # one sentence of 4 or 5 tokens apart
    begins, needles = places(make(train_any_alignment=True), 1500, segments)
    counts = Counter(begins % N)
    assert set(counts) == set(range(N))
    chi = sum((counts[place] - 1500 / N) ** 2 for place in range(N)) / (1500 / N)
    assert 30 < chi < 105  # 63 degrees of freedom, 99.9 %: 103
    crossing = (begins % N > N - 12).mean()  # 11 + 1 tokens are read
    assert crossing == pytest.approx(11 / N, abs=0.04)
    assert set(begins + 11) == set(range((segments - 1) * N, segments * N))  # last token that is read
    assert needles.min() == len(make().haystack.head) and needles.max() > (segments - 1) * N


def test_shares_of_the_rows_cross_a_border_or_have_the_needle_in_the_questions_segment(make):
    begins, needles = places(make(train_any_alignment=True, crossing=0.4, own_segment=0.3), 1000, 3)
    crossing, near = begins % N > N - 12, needles // N == (begins + 10) // N
    assert crossing.mean() == pytest.approx(0.4 + 0.3 * 11 / N, abs=0.05)
    assert 0.3 < near.mean() < 0.45
    assert set(begins[crossing] % N) == set(range(N - 11, N))
    near_ends = begins[near] % N
    assert set(near_ends[near_ends < N - 11]) == set(range(min(near_ends), N - 11))
    task = make(crossing=1.0, train_any_alignment=True, segment=128)
    assert len(set(places(task, 60, 1)[0])) > 20  # rows of one segment have no border to cross
    hay = make().haystack
    assert min(begins - needles) == hay.bare - len(hay.head) - 11  # the needle directly before the question


@pytest.mark.parametrize("segments", [2, 4])  # of two, some prompts end too soon after the border
@pytest.mark.parametrize("settings", [{}, {"train_any_alignment": True}, {"text_share": 1.0}])
def test_a_border_falls_within_the_needle_of_a_share_of_the_rows(make, settings, segments):
    task, prompts = make(straddling=0.5, **settings), []
    for name in ("hidden", "prompt"):
        of = getattr(task.haystack, name)
        setattr(task.haystack, name, lambda *given, of=of: prompts.append(of(*given)) or prompts[-1])
    found = []
    for number in range(400):
        task._example(number, segments * N + 1, N, "train")
        found.append(prompts[-1].needle)
    first, last = np.array(found).T - [[0], [1]]
    split = first // N != last // N
    by_chance = (last - first)[0] / N
    assert split.mean() == pytest.approx(0.5 + 0.5 * by_chance, abs=0.07)
    assert set((last // N)[split]) == set(range(1, segments)), "any border"
    assert len(set((first % N)[split])) >= 4
    task._example(0, N + 1, N, "train")  # a row of one segment has none


def test_the_middle_of_a_power_of_two_is_at_a_border(make):
    for length, split in (("1K", 1), ("2K", 1), ("1500", 0)):
        task = make(lengths=[length], depths=["middle"], trials=1)
        (prompt,) = task.prompts(task.cells(N)[0])
        assert (prompt.needle[0] // N < (prompt.needle[1] - 1) // N) == split


def test_what_cannot_be_made_is_told(make):
    with pytest.raises(UserError, match=r"task\.straddling=0: no prompt has a border of segments of 400"):
        make(segment=12, straddling=1.0).forms("straddling", 12 * 14 + 1, 400)
    with pytest.raises(UserError, match=r"task\.crossing=0, or task\.train_any_alignment=true"):
        make(segment=12, crossing=1.0).forms("crossing", 12 * 14 + 1, 400)
    with pytest.raises(UserError, match="together they must be at most 1"):
        build_config({"task": {"name": "passkey", "crossing": 0.6, "own_segment": 0.5}})
    for settings, words in (
        ({"depths": ["end"]}, 'depth 100 in place of "end"'),
        ({"lengths": ["120"]}, "passkey prompts longer than 120 tokens"),
    ):
        task = make(any_alignment=True, **settings)
        with pytest.raises(UserError, match=words):
            task.evaluate(Masked(task, segment=N))


@pytest.mark.parametrize("depth", ["start", "middle", "end_outside", "100"])
def test_a_cells_questions_start_evenly_over_the_segment(make, depth):
    task = make(any_alignment=True, trials=N // 2, depths=[depth])
    (cell,) = task.cells(N)
    prompts = task.prompts(cell)
    (longest,) = make(trials=1, depths=["start"]).cells(N)
    whole = len(make().prompts(longest)[0])
    cut = np.array([whole - len(prompt) for prompt in prompts])
    assert np.array_equal(cut // 2, np.arange(N // 2)) and 0 < (cut % 2).mean() < 1
    assert 4 <= sum(prompt.crosses(N) for prompt in prompts) <= 7  # 11 of 64 places
    for prompt in prompts:
        text = task.tokenizer.decode(np.concatenate([prompt.tokens(), prompt.answer]))
        key = task.tokenizer.decode(prompt.answer)
        assert text.endswith(f" What is the pass key? The pass key is {key}")
        needle = task.tokenizer.decode(prompt.tokens(*prompt.needle)).strip()
        assert needle == f"The pass key is {key}. Remember it. {key} is the pass key."
        if depth == "end_outside":
            assert {prompt.needle[0] // N, (prompt.needle[1] - 1) // N} == {prompt.question // N - 1}
        if depth == "100":
            assert prompt.needle[1] == prompt.question
    keys = [task.tokenizer.decode(prompt.answer) for prompt in prompts[:8]]
    (plain,) = make(depths=[depth]).cells(N)
    assert keys == [task.tokenizer.decode(prompt.answer) for prompt in make().prompts(plain)]


def test_evaluation_equals_asking_each_prompt_alone(make, memory):
    """Common text read once, ends of different lengths side by side: for every memory as one by one."""
    task = make(segment=8, any_alignment=True, lengths=["160"], depths=["middle"])
    model = build_model(DecoderConfig(dim=32, init_std=0.3), memory, task.tokenizer.vocab_size)
    model = model.double().eval()  # what processors round differently, 20 segments of RMT multiply
    (cell,) = task.cells(model.segment)
    prompts = task.prompts(cell)
    assert len({len(prompt) for prompt in prompts}) == 8
    start = prompts[0].needle[0]
    with torch.no_grad():
        _, state = model.step(torch.from_numpy(prompts[0].tokens(0, start)[None].astype(np.int64)))
        logits, after = task._read(model, prompts, state, start, None)
        together = generate(model, logits, after, 6)
        ends, _ = task._read_ends(model, prompts)
        for row, prompt in enumerate(prompts):
            alone, own = prefill(model, [prompt.tokens()[None]])
            assert torch.allclose(alone[0], logits[row], atol=1e-4)
            assert np.array_equal(generate(model, alone, own, 6)[0], together[row])
            last, _ = prefill(model, [prompt.tokens((len(prompt) - 1) // 8 * 8)[None]])
            assert torch.allclose(last[0], ends[row], atol=1e-4)


class Masked(Oracle):
    """The oracle, for rows padded at the left. lost: questions at these places of a segment find nothing."""

    lost = range(0)

    def step(self, ids, state, keep="all", mask=None):
        if mask is None:
            return super().step(ids, state, keep)
        read = self.read + int(mask.sum())
        rows = [
            [*old, *row[kept].tolist()] for old, row, kept in zip(state.ids.tolist(), ids, mask, strict=True)
        ]
        width = max(map(len, rows))  # -1 is no token: `best` leaves it out
        found = super().step(torch.tensor([[-1] * (width - len(row)) + row for row in rows]), None, keep)
        self.read = read
        return found

    def best(self, seen):
        seen = [token for token in seen if token != -1]
        asked = max(i for i in range(len(seen)) if seen[i : i + len(self.question)] == self.question.tolist())
        return self.guess if asked % self.segment in self.lost else super().best(seen)


def test_rows_say_protocol_and_what_was_found_at_crossings(make):
    task = make(any_alignment=True, trials=N, batch=16, digits=1, depths=["start", "100"], controls=False)
    model = Masked(task, segment=N)
    assert all(row["value"] == 100 for row in task.evaluate(model))
    model.lost = range(N - 4, N)
    for row in by(task.evaluate(model), metric="exact_match"):
        assert row["protocol"] == "curriculum, any alignment" and row["condition"] == "constant"
        crossing = row["extra"]["crossing"]
        assert crossing[1] == 10 and row["n"] == N  # 11 + 0 tokens are read
        assert crossing[1] - crossing[0] >= 3
    plain = make(trials=2, digits=1, depths=["start"], controls=False)
    (row, _) = plain.evaluate(Masked(plain, segment=N))
    assert row["protocol"] == "curriculum" and "crossing" not in row["extra"]


def test_common_text_is_still_read_once(make):
    task = make(any_alignment=True, depths=["90", "100"], lengths=["2K"], controls=False)
    model = Masked(task, segment=N)
    rows = task.evaluate(model)
    prompts = {cell: task.prompts(cell) for cell in task.cells(N)}
    starts = {cell: min(prompt.needle[0] for prompt in prompts[cell]) for cell in prompts}
    total = sum(len(prompt) - starts[cell] for cell in prompts for prompt in prompts[cell])
    # answers: one token generated and one forced for each of 8 trials of 2 cells
    assert model.read == max(starts.values()) + total + 2 * 8 * 2 < 2048 + 8 * 600
    assert all(row["value"] == 100 for row in rows)


def test_the_table_has_rows_of_their_own_for_any_alignment():
    plain, spread = passkey(on=95.0), passkey(on=80.0, config={"task.any_alignment": True})
    for row in spread.metrics:
        row["protocol"] = "curriculum, any alignment"
    rows = tidy([plain, spread])
    assert {row["variant"] for row in rows} == {None} and all(row["n"] in (20, None) for row in rows)
    values = {(row["protocol"], row["value"]) for row in rows if row["condition"] == "constant"}
    assert values == {("curriculum", 95.0), ("curriculum, any alignment", 80.0)}
    _, sheet = sheet_text([plain, spread], "table3_passkey")
    assert "Any alignment: each trial cuts" in sheet.caption and len(sheet.rows) == 2
    assert [row[2] for row in sheet.rows] == ["curriculum", "curriculum, any alignment"]
    assert "80/80/80" in str(sheet.rows[1]) and "95/95/95" in str(sheet.rows[0])
    assert "Any alignment" not in sheet_text([plain], "table3_passkey")[1].caption
