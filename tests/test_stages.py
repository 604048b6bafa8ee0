"""Variants of a plan that train in stages: a chain each, shared where it is the same, and gone on with."""

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from infini_bench.cli import bridge
from infini_bench.cli.bridge import compose_run
from infini_bench.config import to_dict
from infini_bench.data.tokenizers import build_tokenizer
from infini_bench.errors import UserError
from infini_bench.planned import plan
from infini_bench.plans import Plan
from infini_bench.progress import NullProgress
from infini_bench.report.cells import settings
from infini_bench.report.records import KILLED, config_hash, read_records, write_record
from infini_bench.report.tidy import tidy
from infini_bench.reproduce import reproduce
from infini_bench.schema import DataConfig
from infini_bench.standing import standing, standing_json

BASED = ["base.model=base", "data.tokenizer=${base.model}"]
SIZES = [
    "data=embedded", "data.source=embedded", "data.path=null", "data.max_documents=3", "device=cpu",
    "task.train_kind=chronicle", "task.train_input_tokens=64", "task.train_summary_tokens=40",
    "task.input_tokens=64", "task.lengths=[]", "task.max_new_tokens=4", "task.max_books=1", "task.samples=1",
    "trainer.steps=2", "trainer.warmup=1", "trainer.validate_rows=1", "trainer.checkpoint_segments=null",
    "pretrain.data=embedded", "pretrain.data.max_documents=2", "pretrain.task.sequence=100",
    "pretrain.trainer.steps=3", "pretrain.trainer.batch=2", "pretrain.trainer.warmup=1",
    "pretrain.trainer.validate_rows=1",
]  # fmt: skip
SMALL = ["memory.segment=32"]
ADAPTED = ["experiment=adapt_booksum", *BASED, *SIZES, *SMALL]
CONTROL = ["experiment=table4_smollm2_1k", *BASED, *SIZES, *SMALL]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A plan of two variants that share a stage, of one without and of a control, on a tiny model."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained("base")
    ours = build_tokenizer(DataConfig(vocab_size=280), lambda: ["a book about a key"] * 9)
    backend = ours._backend  # type: ignore[attr-defined]
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>").save_pretrained("base")
    staged = {"stages": ["pretrain"], "models": ["infini_linear"]}
    variants = {
        "adapted": {**staged, "overrides": ADAPTED},
        "whole": {**staged, "overrides": [*ADAPTED, "task.protocol=whole_book", "task.gradient_segments=1"]},
        "at once": {"models": ["infini_linear"], "overrides": ADAPTED},
        "smollm2_1k": {**staged, "models": ["local_block"], "overrides": CONTROL},
    }
    made = Plan("x", {"booksum": []}, [], ["table4_booksum"], variants=variants)
    use(monkeypatch, made)
    monkeypatch.setattr(bridge, "compose_run", lambda words: composed(tuple(words)))
    for name in ("write_report", "print_tables"):  # which take most of the time
        monkeypatch.setattr(f"infini_bench.reproduce.{name}", lambda *args, **options: None)
    return made


@cache
def composed(words):
    """As the bridge, but each run is composed once for all tests."""
    return compose_run(words)


def use(monkeypatch, made):
    for module in ("planned", "reproduce"):
        monkeypatch.setattr(f"infini_bench.{module}.read_plan", lambda name: made)


def jobs(overrides=(), **options):
    return plan("x", "smoke", Path("out"), None, None, overrides, **options)


def run(**options) -> int:
    return reproduce("x", "smoke", Path("out"), jobs=1, progress=NullProgress(), **options)


def states() -> list[str]:
    return [each.state for each in standing(jobs())]


def trained(task="lm"):
    """In the order of their starts: files of the same second are in that of their ids."""
    found = [r for r in read_records("out/records") if (r.kind, r.task) == ("train", task)]
    return sorted(found, key=lambda record: record.started)


def test_variants_share_a_stage_and_their_rows_name_it(made):
    assert states() == ["missing"] * 4
    assert run(following=1) == 0
    assert states() == ["done", "pretrain done", "missing", "missing"]
    assert run() == 0
    assert states() == ["done"] * 4
    shared, control = trained()
    assert (shared.config["model"], control.config["memory"]["kind"]) == ("infini_linear", "block")
    assert [r.config["memory"]["segment"] for r in (shared, control)] == [32, 32]
    assert (shared.tokens, shared.plans, shared.config["scale"]) == (3 * 2 * 100, ["x"], "smoke")
    first, second, once, last = trained("booksum")
    folders = [r.config["base"]["model"] for r in (first, second, once, last)]
    assert folders == [shared.train["folder"]] * 2 + ["base", control.train["folder"]]
    assert [r.train["tokens_before"] for r in (first, second, once, last)] == [600, 600, 0, 600]
    for record in (shared, second):
        same = {**to_dict(compose_run(record.command[2:])), "decoder": record.config["decoder"]}
        assert config_hash(same) == record.config_hash, "the command says what was run"
    assert first.config["data"]["tokenizer"].startswith(shared.train["folder"])
    listed = [json.loads(line) for line in standing_json(standing(jobs())).splitlines()]
    assert {shared.id} == {*listed[0]["records"]} & {*listed[1]["records"]} and len(listed[0]["records"]) == 3
    assert "trainer.steps=3" in listed[0]["stages"]["pretrain"] and listed[2]["stages"] == {}

    rows = tidy(read_records("out/records"))
    assert {row["table"] for row in rows} == {"table4_booksum"}, "a stage's gates are not figure 3's"
    told = sorted({(row["model"], settings(row)[-1], row["train_tokens"], row["base"]) for row in rows})
    assert [(model, words, base) for model, words, _, base in told] == [
        ("infini_linear", "before=lm on embedded", "base"),  # of prefixes
        ("infini_linear", "before=lm on embedded", "base"),  # of whole books
        ("infini_linear", "before=nothing", "base"),
        ("smollm2_1k", "before=lm on embedded", "base"),
    ]
    assert min(told[0][2], told[1][2]) == told[2][2] + 600
    assert not [row["variant"] for row in rows if "/" in row["variant"]], "no machine's path"

    shutil.rmtree("out/runs")  # which stay where they were made
    assert states() == ["done"] * 4
    assert run(only="at once") == 0 and len(trained()) == 2


def test_a_stage_that_was_killed_is_gone_on_with_and_one_that_is_gone_is_not_needed(made):
    assert run(only="adapted") == 0
    (stage,) = trained()
    folder = Path(stage.train["folder"])
    for record in read_records("out/records"):
        Path(f"out/records/{record.id}.jsonl").unlink()
    write_record("out/records", replace(stage, status="failed", error=KILLED))
    assert states()[:2] == ["pretrain failed"] * 2
    assert run(only="adapted") == 0
    assert [Path(r.train["folder"]) for r in trained() if r.status == "done"] == [folder]
    assert states()[:2] == ["done", "pretrain done"]
    shutil.rmtree(folder)
    (own,) = trained("booksum")
    for record in read_records("out/records"):
        if record.kind == "eval":
            Path(f"out/records/{record.id}.jsonl").unlink()
    assert states()[0] == "trained"
    assert run(only="adapted") == 0
    assert states()[0] == "done" and trained("booksum") == [own]
    assert run(only="whole") == 0
    assert len({r.train["folder"] for r in trained()}) == 2, "whose folder is needed is trained again"


def test_a_stage_that_fails_is_named(made, capsys):
    assert run(only="adapted", overrides=["pretrain.trainer.lr=1e30"]) == 1
    shown = capsys.readouterr().out
    assert "failed: booksum infini_linear adapted seed 0: stage pretrain: Step" in shown.replace("\n", " ")
    assert not trained("booksum") and "lower trainer.lr" in shown
    assert run(only="adapted", overrides=["task.train_kind=prose", "pretrain.seed=1"]) == 1
    assert "no summary of task.train_kind=prose" in capsys.readouterr().out
    assert len(trained()) == 1, "told before its stage was trained"


def test_overrides_of_a_stage_are_its_alone(made):
    found = jobs(["pretrain.trainer.steps=7", "trainer.steps=5", "memory.gate_start=1"])
    assert [len(job.stages) for job in found] == [1, 1, 0, 1]
    for job in found:
        assert job.cfg.trainer.steps == 5
        for stage in job.stages:
            assert (stage.cfg.trainer.steps, stage.cfg.memory) == (7, job.cfg.memory)
            assert (stage.cfg.task.name, stage.cfg.task.sequence) == ("lm", 100)
    assert config_hash(to_dict(found[0].stages[0].cfg)) == config_hash(to_dict(found[1].stages[0].cfg))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("passkey.trainer.steps=7", "is for the stage passkey, which is not among those that are run"),
        (
            "pretrain.memory.segment=64",
            r"segment is 64 in pretrain and 32 after it; set pretrain\.memory\.seg",
        ),
        ("pretrain.memory.window=3", r"memory\.window"),
        ("pretrain.trainer.stesp=3", r'did you mean "trainer\.steps"'),
    ],
)
def test_what_does_not_fit_is_told_before_anything_runs(made, override, says):
    with pytest.raises(UserError, match=says):
        jobs([override])
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stages": ["pretrian"]}, r'no stage "pretrian" \(did you mean "pretrain"'),
        ({"overrides": SMALL}, r"stages of adapted are for a pretrained model; set base\.model"),
    ],
)
def test_a_plan_whose_stages_make_no_sense_is_refused(made, monkeypatch, change, says):
    use(monkeypatch, replace(made, variants={"adapted": {**made.variants["adapted"], **change}}))
    with pytest.raises(UserError, match=says):
        jobs()
