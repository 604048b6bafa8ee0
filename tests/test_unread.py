"""Settings that a memory does not read: refused if given and no job reads them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from infini_bench.cli.bridge import compose_run, compose_runs, given
from infini_bench.config import TASKS, evaluated_memory
from infini_bench.errors import UserError
from infini_bench.models import build_model
from infini_bench.origin import evaluated_config
from infini_bench.planned import plan
from infini_bench.schema import LOCALS, MEMORY_KINDS, DecoderConfig, MemoryConfig
from infini_bench.unread import KINDS, reads

TRAINED = [name for name, task in TASKS.items() if not task.untrained]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("model=rmt memory.update=delta", "memory.update is read by memory.kind=compressive, not by rmt; "),
        ("model=transformer_xl memory.features=relu2", "memory.kind=compressive, not by xl; leave it out."),
        ("model=infini_linear memory.entries=9", "memory.kind=knn, not by compressive"),
        ("memory={entries: 9}", "memory.entries is read by memory.kind=knn"),
        ("model=infini_linear memory.window=9", "sink, compressive with memory.local=sliding, not by"),
        ("model=full ++memory.options.alpha=1", "read by memory.kind=FILE.py:CLASS, not by full"),
        ("model=full ++task.memory.window=9", "task.memory.window is read by"),
        ("-m model=rmt,full memory.entries=9", "memory.kind=knn, not by rmt, full"),
    ],
)
def test_what_no_memory_reads_is_refused(words, sentence):
    multirun, words = words.startswith("-m "), words.removeprefix("-m ")
    with pytest.raises(UserError, match=re.escape(sentence)):
        compose_runs("train", re.split(r" (?=[^ ]*=)", words), multirun)


@pytest.mark.parametrize(
    ("level", "word"),
    [
        ("model", "task.forms=[eager]"),
        *(
            ("operator", word)
            for word in ("task.modes=[train]", "memory.backend=triton", "trainer.compile=true")
        ),
    ],
)
def test_what_one_level_of_profile_reads_is_refused_by_the_other(level, word):
    other = {"model": "operator", "operator": "model"}[level]
    words = ["task=efficiency", "scale=gpu", "model=infini_linear"]  # whose recipe sets forms
    key = word.partition("=")[0]
    with pytest.raises(
        UserError, match=rf"^{key} is read by profile --level {other}, not by --level {level}; l"
    ):
        compose_runs("eval", [*words, f"task.level={level}", word])
    compose_runs("eval", [*words, f"task.level={other}", word])


@pytest.mark.parametrize(
    "words",
    [
        "model=infini_linear memory.local=sliding memory.window=9",
        "model=sink memory.window=9 memory.sinks=2 memory.segment=8",
        "model=full ++task.memory.kind=sliding ++task.memory.window=9",
        "model=full memory.window=9 ++task.memory.kind=sliding",
        "-m model=rmt,memorizing memory.entries=9",
        "model=full task=needles scale=gpu",  # whose recipe sets memory.features
        "memory.kind=mine.py:Mine memory.entries=9 ++memory.options.alpha=1",
        "model=rmt memory.update=delta resume=somewhere",  # the resumed run judges it
    ],
)
def test_what_some_memory_reads_is_taken(words):
    compose_runs("train", words.removeprefix("-m ").split(), words.startswith("-m "))


def test_plans_refuse_what_no_job_reads(tmp_path):
    jobs = plan("diag_recall", "smoke", tmp_path, None, ["rmt", "memorizing"], ["memory.entries=9"])
    assert [job.cfg.memory.entries for job in jobs] == [9, 9]
    with pytest.raises(UserError, match=r"memory\.entries is read by memory\.kind=knn, not by rmt"):
        plan("diag_recall", "smoke", tmp_path, None, ["rmt"], ["memory.entries=9"])


@pytest.mark.parametrize("task", TRAINED)
def test_every_task_that_asks_a_trained_model_may_change_its_memory(task):
    """The floor fits the model that has a write gate, whatever model is named by default."""
    gated, floor = ["model=infini_delta_token", "memory.write_gate=true"], ["++task.memory.write_floor=0.5"]
    (asked,) = compose_runs("eval", [f"task={task}", "scale=smoke", *floor])
    trained = compose_run([f"task={task}", "scale=smoke", *gated])
    found = evaluated_config(asked, trained, given(floor))
    assert (found.memory.write_floor, evaluated_memory(found).write_floor) == (0.0, 0.5)
    for words in ([f"task={task}", "scale=smoke", *floor], ["task=capacity", *floor]):
        with pytest.raises(UserError, match=r"trained with memory\.write_gate=true|task\.memory belongs to"):
            compose_runs("train", words)
    with pytest.raises(UserError, match=r"floor=0\.5 .* with memory\.write_gate=true has; leave it"):
        evaluated_config(asked, compose_run([f"task={task}", "scale=smoke"]), given(floor))


def test_an_evaluation_is_judged_by_the_checkpoints_memory():
    words = ["model=memorizing", "++task.memory.entries=9"]
    compose_runs("eval", ["task=lm", "++task.memory.entries=9"])
    asked, trained = compose_run(words), compose_run(["model=memorizing"])
    assert evaluated_config(asked, trained, given(words[1:])).task.memory == {"entries": 9}
    with pytest.raises(UserError, match=r"task\.memory\.entries is read by memory\.kind=knn, not by full"):
        evaluated_config(asked, compose_run(["model=full"]), given(words[1:]))


OTHER = MemoryConfig(
    update="delta", features="relu", normaliser="mean", decay=0.5, write_gate=True, write_start=1.0,
    write_split=1.0, write_cost=0.5, write_floor=0.5, floor_trained=True, gate_start=1.0,
    gate_split=1.0, gate_input=True, gate_frozen=0.5, local="xl", window=3, sinks=2, stride=2, compressed=2,
    rate=2, compression="max", entries=5, neighbours=2, index="torch", layer=0, tokens=3, key_size=4,
    gradient_depth=1,
)  # fmt: skip


@pytest.mark.parametrize("kind", MEMORY_KINDS)
def test_what_a_kind_does_not_claim_changes_nothing(kind):
    """Neither weights, nor losses, nor gradients; backend, an error where it cannot run, is left out."""
    plain = MemoryConfig(kind=kind, segment=8)
    unread = {name: getattr(OTHER, name) for name in KINDS if not reads(plain, name)}
    results = []
    for memory in (plain, replace(plain, **{**unread, "options": {}, "backend": "eager"})):
        torch.manual_seed(0)
        model = build_model(DecoderConfig(layers=2, dim=16, heads=2), memory, 32)
        ids = torch.randint(32, (2, 33))
        loss = model.losses(ids[:, :-1], ids[:, 1:])[0].mean()
        grads = torch.autograd.grad(
            loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True
        )
        results.append([loss.detach(), *(g for g in grads if g is not None)])
    assert len(unread) >= 8 and len(results[0]) == len(results[1])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_every_field_says_who_reads_it():
    assert {kind for kinds in KINDS.values() for kind in kinds} <= set(MEMORY_KINDS)
    assert set(LOCALS) <= set(MEMORY_KINDS)
    assert set(vars(MemoryConfig())) - set(KINDS) == {"kind", "segment", "layers"}
