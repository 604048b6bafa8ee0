"""Summaries without weights: which sentences they take, where k comes from, what a record keeps."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from infini_bench.cli.bridge import compose_run
from infini_bench.errors import UserError
from infini_bench.metrics import rouge
from infini_bench.report.records import read_records
from infini_bench.run import run_eval, run_train
from infini_bench.summaries import read_summaries
from infini_bench.tasks.booksum_extract import (
    WINDOW,
    Gauge,
    Job,
    extract_one,
    import_lexrank,
    lexrank,
    oracle,
)

SENTENCES = [
    "The king rode out.",
    "It rained on the road.",
    "A wolf came from the wood.",
    "The king slew the wolf.",
    "They feasted till dawn.",
    "Nobody knew his name.",
]
TEXT = " ".join(SENTENCES)


def job(method, samples=1, goals=()):
    return Job(method, TEXT, (2, 4), samples, (0, 3), goals)


def test_lead_and_random():
    assert extract_one(job("lead")) == {2: [[0, 1]], 4: [[0, 1, 2, 3]]}
    drawn = extract_one(job("random", 3))
    assert drawn == extract_one(job("random", 3)) and len({tuple(each) for each in drawn[4]}) > 1
    for k, samples in drawn.items():
        assert all(len(set(each)) == k and each == sorted(each) for each in samples)
        assert all(set(drawn[2][i]) <= set(drawn[4][i]) for i in range(3))


def test_the_oracle_takes_what_raises_rouge_and_stops():
    goal = "The king slew a wolf from the wood."
    chosen = oracle([rouge.tokens(sentence) for sentence in SENTENCES], [goal])
    assert chosen == [2, 3]
    assert extract_one(job("oracle", goals=((goal,), ()))) == {0: [chosen], 1: [[]]}

    def value(numbers):
        scores = rouge.score_pair(("\n\n".join(SENTENCES[i] for i in numbers), goal))
        return scores[:2].mean()

    pairs = itertools.combinations(range(6), 2)
    assert value(chosen) == pytest.approx(max(map(value, pairs)))
    assert all(value([*chosen, i]) < value(chosen) for i in range(6) if i not in chosen)


def test_the_oracles_f1_is_rouge():
    words = [rouge.tokens(sentence) for sentence in SENTENCES]
    goal = "The king, the king slew him on the road to the wood"
    gauge = Gauge(words, rouge.tokens(goal), 1)
    for taken in ([], [3], [3, 0]):
        for i in taken[-1:]:
            gauge.take(i)
        for i in set(range(6)) - set(taken):
            text = " ".join(SENTENCES[j] for j in [*taken, i])
            assert 100 * gauge.values()[i] == pytest.approx(rouge.score_pair((text, goal))[0])


def test_lexrank_of_a_window_is_sumys_and_of_a_book_has_the_right_size():
    pytest.importorskip("sumy")
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(300)]
    long = [" ".join(rng.choice(words, 8)) for _ in range(3 * WINDOW)]
    found = lexrank(long, [5, 150])
    assert [len(found[k]) for k in (5, 150)] == [5, 150]
    assert all(chosen == sorted(set(chosen)) for chosen in found.values())
    document, paragraph, sentence, summarizer = import_lexrank()

    class Words:
        def to_words(self, text):
            return tuple(text.split())

    window = long[:WINDOW]  # of one window it is sumy's own answer
    wanted = summarizer(document([paragraph([sentence(text, Words()) for text in window])]), 7)
    assert [window[i] for i in lexrank(window, [7])[7]] == [str(each) for each in wanted]


def test_without_sumy_it_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "sumy.models.dom", None)
    with pytest.raises(UserError, match=r"pip install 'infini-bench\[extract\]'"):
        import_lexrank()


# --- the whole evaluation -------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path):
    """Validation, where two sentences are best for "long" references and one for "short" ones."""
    folder = tmp_path / "books"
    folder.mkdir()
    short = {"source": "short", "text": "The king rode out."}
    long = {"source": "long", "text": "The king rode out. It rained on the road."}
    for split, kinds in {"train": [long], "validation": [long, short], "test": [short, long]}.items():
        rows = [{"id": f"{split}{i}", "text": TEXT, "summaries": [kind]} for i, kind in enumerate(kinds)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ["data=local", f"data.path={folder}", "data.id_column=id", "data.summary_column=summaries"]
    places = [f"records={tmp_path / 'records'}", f"data.cache_dir={tmp_path / 'cache'}", "scale=smoke"]
    return ["task=booksum", *data, *places, "task.sentences=[1,2]"]


def overall(record, kind=None, condition="pairwise"):
    (row,) = [
        row
        for row in record.metrics
        if (row["metric"], row["position"], row["condition"]) == ("overall", kind, condition)
    ]
    return row


def test_k_is_chosen_on_validation_for_each_kind_of_reference(settings, tmp_path):
    given = {"task.baseline", "data"}
    record = run_eval(compose_run([*settings, "task.baseline=lead"]), given=given)
    assert (record.config["model"], record.params, record.state_floats) == ("lead", None, None)
    assert record.config["task"]["max_books"] is None  # the recipe's limit is for models
    assert [overall(record, kind)["extra"]["sentences"] for kind in ("short", "long")] == [1, 2]
    assert [overall(record, kind)["value"] for kind in ("short", "long")] == pytest.approx([100, 100])
    assert [overall(record, kind)["n"] for kind in (None, "short", "long")] == [2, 1, 1]
    assert overall(record, "short")["extra"]["chosen_on"] == "validation"
    saved = overall(record)["extra"]["summaries"]
    lines = read_summaries(tmp_path / "records", saved)
    assert len(lines) == saved["lines"] == 4 and not any("text" in line for line in lines)
    assert {tuple(line["sentences"]) for line in lines if line["references"] == ["short"]} == {(0,)}
    path = tmp_path / "records" / saved["file"]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="restore the file"):
        read_summaries(tmp_path / "records", saved)
    assert len(read_records(tmp_path / "records")) == 1


def test_the_oracle_bounds_the_lead_and_needs_no_validation(settings):
    record = run_eval(compose_run([*settings, "task.baseline=oracle"]), given=set())
    assert overall(record)["value"] == pytest.approx(100)
    assert "chosen_on" not in overall(record)["extra"]


def test_baselines_have_no_weights(settings):
    lead = compose_run([*settings, "task.baseline=lead"])
    with pytest.raises(UserError, match=r"lead is no model; leave memory\.segment out"):
        run_eval(lead, given={"memory.segment"})
    lead.checkpoint = "runs/x"
    with pytest.raises(UserError, match="has no weights; leave --checkpoint out"):
        run_eval(lead, given=set())
    with pytest.raises(UserError, match=r"task\.baseline is for eval"):
        run_train(lead)
    with pytest.raises(UserError, match=r"task\.baseline must be one of lead, random"):
        compose_run([*settings, "task.baseline=led"])
    assert Path(lead.records).exists() is False
