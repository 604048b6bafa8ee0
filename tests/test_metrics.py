"""Metrics against numbers worked out by hand, and ROUGE against rouge_score called directly."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from infini_bench.metrics import intervals, perplexity, retrieval, rouge


def test_wilson_published_values():
    # 80 of 100: 0.711..0.867 (Brown, Cai, DasGupta 2001 use the same formula)
    assert intervals.wilson(80, 100) == pytest.approx((0.71117, 0.86664), abs=1e-5)
    assert intervals.wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert intervals.wilson(10, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share(case):
    hits, n = case
    low, high = intervals.wilson(hits, n)
    assert 0 <= low <= hits / n <= high <= 1


def test_bootstrap_is_seeded_and_as_wide_as_theory_says():
    rows = np.random.default_rng(0).normal(10, 2, 400)
    first = intervals.bootstrap(rows, np.mean, seed=3)
    assert first == intervals.bootstrap(rows, np.mean, seed=3)
    assert first != intervals.bootstrap(rows, np.mean, seed=4)
    standard_error = rows.std() / 20
    assert first.high - first.low == pytest.approx(2 * 1.96 * standard_error, rel=0.15)
    assert intervals.bootstrap(rows[:1], np.mean) is None


def test_paired_bootstrap_sees_what_is_common():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 5, 50)
    value, interval = intervals.paired_bootstrap(base + 1 + rng.normal(0, 0.01, 50), base, np.mean)
    assert value == pytest.approx(1, abs=0.01)
    assert 0.98 < interval.low < interval.high < 1.02
    with pytest.raises(ValueError, match="50 and 49"):
        intervals.paired_bootstrap(base, base[1:], np.mean)


def test_perplexities_by_hand():
    nats, tokens, words, sizes = [2 * math.log(8), math.log(8)], [2, 1], [1, 1], [8, 4]
    assert perplexity.perplexity(nats, tokens) == pytest.approx(8)
    assert perplexity.perplexity(nats, words) == pytest.approx(8**1.5)
    assert perplexity.bits_per(nats, sizes) == pytest.approx(9 / 12)
    assert perplexity.mean_nats(nats, tokens) == pytest.approx(math.log(8))
    assert perplexity.perplexity([1000.0], [1]) == math.inf


def test_perplexity_intervals_over_documents():
    nats, units = [10.0, 20.0, 33.0], [10, 10, 10]
    low, high = perplexity.interval(perplexity.mean_nats, nats, units)
    assert 1.0 <= low < 2.1 < high <= 3.3
    value, bounds = perplexity.difference(perplexity.mean_nats, nats, [n - 5 for n in nats], units)
    assert value == pytest.approx(0.5) and bounds == pytest.approx((0.5, 0.5))


def test_retrieval_counts():
    expected = np.array([[1, 2], [3, 4], [5, 6]])
    predicted = np.array([[1, 2], [3, 9], [9, 9]])
    exact = retrieval.exact_match(predicted, expected)
    assert (exact.value, exact.n) == (pytest.approx(100 / 3), 3)
    tokens = retrieval.token_accuracy(predicted, expected)
    assert (tokens.value, tokens.n) == (50, 6)
    assert (tokens.low, tokens.high) == pytest.approx([100 * x for x in intervals.wilson(3, 6)])


TEXTS = (
    ("The cat sat on the mats. It was happy.", "A cat was sitting on the mat. It was very happy there."),
    ("Nothing in common", "entirely different words"),
    ("same words", "same words"),
)


def test_rouge_equals_the_package():
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    for prediction, reference in TEXTS:
        lines = [text.replace(". ", ".\n") for text in (reference, prediction)]
        wanted = [100 * scorer.score(*lines)[kind].fmeasure for kind in rouge.KINDS]
        assert rouge.score_pair((prediction, reference)).tolist() == wanted


def by_the_package(prediction, reference) -> list[float]:
    lines = ["\n".join(rouge.split_sentences(text)) for text in (reference, prediction)]
    scores = RougeScorer([*rouge.KINDS], use_stemmer=True).score(*lines)
    return [100 * scores[kind].fmeasure for kind in rouge.KINDS]


WORDS = ["abcdefg", "hij", "the", "The.", "running", "runs", "Runs!", "..."]


@settings(max_examples=100)
@given(*[st.lists(st.sampled_from(WORDS), max_size=40)] * 2)
def test_rouge_equals_the_package_on_any_text(first, second):
    """Words that come again and again: of many longest common subsequences it has to be the same one."""
    prediction, reference = " ".join(first), " ".join(second)
    assert rouge.score_pair((prediction, reference)).tolist() == by_the_package(prediction, reference)


def test_rouge_equals_the_package_on_summaries_of_a_books_length():
    rng = np.random.default_rng(0)
    words = np.array(["key", "king", "castle", "castles", "losing", "lost", *map(str, range(60))])

    def text(sentences):
        return " ".join(f"The {' '.join(rng.choice(words, rng.integers(3, 25)))}." for _ in range(sentences))

    prediction, reference = text(20), text(60)
    found = rouge.score_pair((prediction, reference)).tolist()
    assert found == by_the_package(prediction, reference) and min(found) > 1


@pytest.mark.parametrize(
    ("prediction", "reference", "kind", "precision", "recall"),
    [
        # the examples of the package's own tests
        ("testing", "testing one two", "rouge1", 1, 1 / 3),
        ("testing one", "testing one two", "rouge2", 1, 1 / 2),
        ("testing one", "testing one two", "rougeL", 1, 2 / 3),
        ("testing two", "testing one two", "rougeL", 1, 2 / 3),
        # of its README
        *(
            ("The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog", *rest)
            for rest in (("rouge1", 6 / 8, 6 / 9), ("rougeL", 5 / 8, 5 / 9))
        ),
        # Lin (2004), section 3: S2 and S3 against S1, and the union over sentences
        ("police kills the gunman", "police killed the gunman", "rouge2", 1, 1),  # stemmed they are the same
        ("the gunman kill police", "police killed the gunman", "rougeL", 2 / 4, 2 / 4),
        ("w1 w2 w6 w7 w8\n\nw1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", "rougeLsum", 4 / 10, 4 / 5),
    ],
)
def test_published_examples_of_rouge(prediction, reference, kind, precision, recall):
    value = rouge.score_pair((prediction, reference))[rouge.KINDS.index(kind)]
    assert value == pytest.approx(100 * 2 * precision * recall / (precision + recall))


def test_rouge_by_hand():
    r1, r2, rl, rlsum = rouge.score_pair(("the cat sat", "the cat ran away"))
    assert (r1, rl, rlsum) == pytest.approx([100 * 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)] * 3)
    assert r2 == pytest.approx(100 * 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert rouge.score_pair(("", "the cat")).tolist() == [0, 0, 0, 0]


def test_rouge_lsum_needs_the_sentences():
    swapped = ("It rained all day. The king died.", "The king died. It rained all day.")
    _, _, rl, rlsum = rouge.score_pair(swapped)
    assert rlsum == pytest.approx(100) and rl < 60


def test_references_are_combined():
    scores = rouge.score_documents([["a b c", ""], ["x y"]], [["a b c", "a b d"], ["x z"]])
    assert [[part.shape for part in document] for document in scores] == [[(2, 4), (2, 4)], [(1, 4)]]
    first = scores[0][0]
    assert rouge.best(first)[0] == pytest.approx(100)
    assert rouge.pairwise(first)[0] == pytest.approx((100 + 200 / 3) / 2)
    assert rouge.overall(np.array([[8, 4, 2, 9.0], [8, 4, 2, 1]])) == pytest.approx(4)
    assert not rouge.has_words(" ... ") and rouge.has_words("... A")


def test_rouge_in_processes_is_the_same_and_scored_once(monkeypatch):
    alone = rouge.score_pairs(TEXTS, processes=1)
    monkeypatch.setattr(rouge, "_SCORES", {})
    assert np.array_equal(rouge.score_pairs(TEXTS, processes=2), alone)
    monkeypatch.setattr(rouge, "score_pair", None)  # a second call would fail
    assert np.array_equal(rouge.score_pairs(TEXTS), alone)


def test_rouge_is_kept_on_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(rouge, "_SCORES", {})
    first = rouge.score_pairs(TEXTS, folder=tmp_path)
    monkeypatch.setattr(rouge, "_SCORES", {})
    monkeypatch.setattr(rouge, "score_pair", None)  # a second call would fail
    assert np.array_equal(rouge.score_pairs(TEXTS[::-1], folder=tmp_path), first[::-1])
    with pytest.raises(TypeError):
        rouge.score_pairs([("another", "pair")], folder=tmp_path)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ('He said "no." She left.', ['He said "no."', "She left."]),
        ("Mr. Smith met J. Doe. They ate, e.g. Soup.", ["Mr. Smith met J. Doe.", "They ate, e.g. Soup."]),
        ("a line\nbroken. but small. 3 more", ["a line broken. but small.", "3 more"]),
        ("Title\n\nText", ["Title", "Text"]),
        ("  ", []),
    ],
)
def test_sentence_rule(text, sentences):
    assert rouge.split_sentences(text) == sentences


@settings(max_examples=50)
@given(st.text("aB. !?\n\"'(1", max_size=60))
def test_sentences_lose_no_word(text):
    assert " ".join(rouge.split_sentences(text)).split() == text.split()
