"""Claims on summaries of books, as in test_report_claims.py."""

from __future__ import annotations

import pytest
from report_fakes import record, row, verdicts

from infini_bench.report.claims import NO, OPEN, YES


def summaries(name, overall, gains, kind=None, **changes):
    """An evaluation at several lengths; gains: of all lengths but the shortest."""
    place = {
        "condition": "pairwise",
        "split": "test",
        "position": kind,
        "protocol": changes.pop("protocol", None),
    }
    place |= {"dataset": "booksum_local"}
    metrics = [row("overall", value, length=n, **place) for n, value in overall.items()]
    for length, gain in zip([*overall][1:], gains, strict=True):
        bounds = {"ci_low": gain - 1, "ci_high": gain + 1}
        metrics.append(row("overall_gain", gain, length=length, **place, **bounds))
    config = {"task": {"name": "booksum"}, "scale": "gpu", **changes}
    return record(name, metrics=metrics, config=config)


def test_summaries_grow_where_each_input_adds_to_the_books_cut_before():
    lengths = {1: 10.0, 2: 9.0, 4: 9.5}
    found = verdicts([summaries("infini_linear", lengths, (2.0, 1.5))])["rouge_grows"]
    assert found[0] == YES and "infini_linear +2.0 [+1.0, +3.0] to 2 tokens, +1.5" in found[1]
    assert verdicts([summaries("infini_linear", lengths, (2.0, 0.5))])["rouge_grows"][0] == NO
    assert verdicts([summaries("infini_linear", {1: 10.0, 4: 13.0}, (3.0,))])["rouge_grows"][0] == OPEN
    both = [summaries("infini_linear", lengths, (2.0, 1.5)), summaries("infini_delta", lengths, (-2.0, 1.5))]
    assert verdicts(both)["rouge_grows"][0] == NO, "each model that was measured"
    ours = verdicts([summaries("infini_delta_token", lengths, (2.0, 1.5))])["rouge_grows"]
    assert ours[0] == YES and "infini_delta_token +2.0" in ours[1]
    assert verdicts([summaries("smollm2_4k", lengths, (2.0, 1.5))])["rouge_grows"][0] == OPEN


def test_summaries_of_different_kinds_protocols_models_and_settings_are_no_curve():
    low, high = {1: 5.0}, {4: 25.0}
    middle = {2: 15.0}
    kinds = [
        summaries("infini_linear", low, (), "wikipedia"),
        summaries("infini_delta", middle, (), "wikipedia"),
        summaries("infini_delta", high, (), "worlds-greatest-books", memory={"kind": "x", "segment": 64}),
    ]
    assert verdicts(kinds)["rouge_grows"][0] == OPEN
    settings = [
        summaries("infini_delta", values, (), memory={"kind": "compressive", "segment": 16 * 2**n})
        for n, values in enumerate((low, middle, high))
    ]
    assert verdicts(settings)["rouge_grows"][0] == OPEN
    protocols = [
        summaries("infini_delta", values, (), protocol=name)
        for name, values in (("sampled", low), ("greedy", middle), ("map_reduce, greedy", high))
    ]
    assert verdicts(protocols)["rouge_grows"][0] == OPEN
    whole = summaries("infini_delta", {1: 5.0, 2: 6.0, 4: 7.0}, (2.0, 2.0), "worlds-greatest-books")
    plots = summaries("infini_delta", {1: 5.0, 2: 6.0, 4: 7.0}, (2.0, -2.0), "wikipedia")
    plots.metrics += whole.metrics
    assert verdicts([plots])["rouge_grows"][0] == NO, "the kind is plots"


def plots(model, deltas, overall=20.0, length=512_000, **changes):
    """An adapted model's summaries of plots, with its differences made up."""
    place = {"split": "test", "position": "wikipedia", "length": length, "protocol": "sampled"}
    scores = {"books": ["a", "b", "c"], "scores": [[overall] * 4] * 3}
    metrics = [row("overall", overall, scores, condition="pairwise", n=3, **place)]
    for name in ("memory_off", "other_memory"):
        if name in deltas:
            other = [[overall - each] * 4 for each in deltas[name]]
            metrics.append(row("overall", overall, {**scores, "scores": other}, condition=name, n=3, **place))
    for metric in metrics:
        metric["dataset"] = "booksum_local"
    config = {"task": {"name": "booksum"}, "scale": "gpu", "data.name": "booksum_local"}
    config |= {"base": {"model": "bases/smol.gguf"}, **changes}
    train = {"id": f"t-{model}", "steps": 400, "tokens": 9}
    return record(model, metrics=metrics, config=config, train=train)


def beside(overalls):
    """What has no memory, and the books' first sentences."""
    runs = [plots(name, {}, value, length=1024) for name, value in overalls.items() if name != "lead"]
    if "lead" in overalls:
        runs.append(plots("lead", {}, overalls["lead"], length=None))
        runs[-1].config |= {"base": {"model": None}, "task": {"name": "booksum", "baseline": "lead"}}
        runs[-1].metrics[0]["protocol"] = "extractive"
    return runs


def test_summaries_are_better_where_every_difference_is():
    rivals = {"smollm2_4k": 15.0, "smollm2_1k": 16.0, "lead": 17.0}
    own = plots("infini_delta_token", {})
    verdict, sentence = verdicts([own, *beside(rivals)])["summaries_better"]
    assert verdict == YES and sentence == (
        "infini_delta_token in smol.gguf after 512,000 tokens of 3 books: overall ROUGE 20.0 against plots; "
        "less that of smollm2_4k +5.0 [+5.0, +5.0], smollm2_1k +4.0 [+4.0, +4.0], lead +3.0 [+3.0, +3.0]. "
        "Judged on 1 seed: how other seeds would spread is not known."
    )
    for name in rivals:
        found = verdicts([own, *beside({**rivals, name: 21.0})])["summaries_better"]
        assert found[0] == NO and f"{name} -1.0 [-1.0, -1.0]" in found[1]
        rest = {other: value for other, value in rivals.items() if other != name}
        assert verdicts([own, *beside(rest)])["summaries_better"][0] == OPEN, "each is needed"
    full = beside({**rivals, "smollm2_full": 20.5})
    assert verdicts([own, *full])["summaries_better"][0] == NO, "counts where it was run"
    best = plots("infini_delta", {}, 18.0)
    assert "infini_delta_token in" in verdicts([best, own, *beside(rivals)])["summaries_better"][1]
    shorter = plots("infini_delta_token", {}, 30.0, length=16_384)
    for metric in shorter.metrics:
        own.metrics.append(metric)
    sentence = verdicts([own, *beside(rivals)])["summaries_better"][1]
    assert "after 512,000 tokens" in sentence, "the longest input, not the one that came out best"


@pytest.mark.parametrize("change", [{"scale": "laptop"}, {"base": {"model": None}}])
def test_summaries_of_small_scales_and_of_models_from_scratch_prove_nothing(change):
    deltas = {"memory_off": (2.0, 3.0, 4.0), "other_memory": (1.0, 2.0, 3.0)}
    assert verdicts([plots("infini_delta", deltas)])["summaries_of_the_book"][0] == YES
    assert verdicts([plots("infini_delta", deltas, **change)])["summaries_of_the_book"][0] == OPEN


def test_a_summary_depends_on_the_book_where_another_books_memory_makes_it_worse():
    both = {"memory_off": (2.0, 3.0, 4.0), "other_memory": (1.0, 2.0, 3.0)}
    verdict, sentence = verdicts([plots("infini_delta", both)])["summaries_of_the_book"]
    assert verdict == YES and "less that of other_memory +2.0 [+1.0, +3.0], memory_off +3.0" in sentence
    for name in both:
        run = plots("infini_delta", {**both, name: (-1.0, 2.0, 3.0)})
        assert verdicts([run])["summaries_of_the_book"][0] == NO, "an interval that has 0 in it"
        alone = plots("infini_delta", {name: both[name]})
        assert verdicts([alone])["summaries_of_the_book"][0] == OPEN
