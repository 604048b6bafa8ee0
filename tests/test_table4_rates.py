"""Table 4's learning rates: the plan from end to end on small files, whose test split nobody may read."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from functools import cache

import pytest
import torch
from report_fakes import booksum_lengths, lm, pick, sheet_text
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from infini_bench.cli import bridge
from infini_bench.cli.bridge import compose_run
from infini_bench.data import load_documents
from infini_bench.data.tokenizers import build_tokenizer
from infini_bench.errors import UserError
from infini_bench.memory.kernels import backend
from infini_bench.planned import plan
from infini_bench.plans import read_plan
from infini_bench.progress import NullProgress
from infini_bench.report import rates
from infini_bench.report.records import read_records
from infini_bench.report.tidy import tidy
from infini_bench.reproduce import reproduce
from infini_bench.schema import DataConfig
from infini_bench.standing import standing

KINDS = ("wikipedia", "epitome")
SMALL = [
    "device=cpu", "precision=float32", "data.max_documents=3", "memory.segment=32", "task.lengths=[64]",
    "task.train_input_tokens=64", "task.train_summary_tokens=40", "task.max_new_tokens=4", "task.max_books=2",
    "task.samples=1", "trainer.steps=2", "trainer.warmup=1", "trainer.validate_rows=2",
    "pretrain.memory.segment=32", "pretrain.task.sequence=100", "pretrain.trainer.steps=2",
    "pretrain.trainer.warmup=1", "pretrain.trainer.checkpoint_segments=null",
    "pretrain.trainer.validate_rows=1",
]  # fmt: skip


@cache
def composed(words: tuple[str, ...]):
    """As the bridge, but each run is composed once."""
    return compose_run(list(words))


@pytest.fixture(autouse=True)
def compose_quickly(monkeypatch):
    monkeypatch.setattr(bridge, "compose_run", lambda words: composed(tuple(words)))


@pytest.fixture
def data(tmp_path):
    """``booksum`` and ``books``: of the test splits nothing can be read."""
    for folder in ("booksum", "books"):
        (tmp_path / folder).mkdir()
        for split in ("train", "validation"):
            lines = []
            for i in range(3):
                text = f"The king of number {i} lost a key. " * 20
                told = [{"source": kind, "text": f"{kind}: the king {i} lost it"} for kind in KINDS]
                book = {"id": f"{split}{i}", "title": "t", "text": text, "summaries": told}
                lines.append(json.dumps(book))
            (tmp_path / folder / f"{split}.jsonl").write_text("\n".join(lines))
        (tmp_path / folder / "test.jsonl").write_text("not to be read")
    return tmp_path


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(tmp_path / "base")
    ours = build_tokenizer(DataConfig(vocab_size=280), lambda: ["the king lost a key"] * 9)
    backend = ours._backend  # type: ignore[attr-defined]
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def told_anew(monkeypatch):
    """As in a new process: nothing is logged yet, nor was any form told."""
    log = logging.getLogger("infini_bench")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "level", logging.NOTSET)
    backend._told.cache_clear()


def told(record) -> tuple[str, float] | None:
    """Model and rate of a training on summaries."""
    if (record.kind, record.task) != ("train", "booksum"):
        return None
    return record.config["model"], record.config["trainer"]["lr"]


def test_the_test_split_of_these_files_cannot_be_read(data):
    for folder, options in (("booksum", {"summary_column": "summaries"}), ("books", {})):
        with pytest.raises(UserError, match=r"test\.jsonl"):
            load_documents(DataConfig(source="local", path=str(data / folder), **options), "test")


@pytest.mark.parametrize(
    ("scale", "model", "only", "grid"),
    [
        ("smoke", "infini_linear", "", (0.002, 0.004, 0.008)),
        ("gpu", "infini_delta_token", "adapted prefix", (3e-5, 1e-4, 3e-4)),
    ],
)
def test_a_sweep_from_end_to_end(data, base, tmp_path, capsys, told_anew, scale, model, only, grid):
    words = ["data=booksum_local", f"data.path={data / 'booksum'}", "data.vocab_size=300"]
    words = [f"base.model={base}", *SMALL, "trainer.validate_every=1"] if scale == "gpu" else words
    given = {"models": (model,), "overrides": words, "data": data if scale == "gpu" else None}
    out = tmp_path / "out"

    def run(**more) -> int:
        more = {"only": only} | more
        return reproduce("table4_lr", scale, out, jobs=1, progress=NullProgress(), **given, **more)

    def states() -> list[str]:
        jobs = plan("table4_lr", scale, out, None, (model,), words, given["data"], only)
        return [each.state for each in standing(jobs)]

    assert states() == ["missing"] * 3
    assert run(only=f"{only} trainer.lr={grid[1]:g}") == 0
    assert states()[1] == "done" != states()[0]
    form = "eager, as the tensors are on cpu, not on a CUDA device"
    assert capsys.readouterr().err.count(f"form of the memory: {form}") == 1, "as train and eval tell it"
    assert run(following=1) == 0 and states()[0] == "done" != states()[2]
    capsys.readouterr()
    assert run() == 0 and states() == ["done"] * 3
    records = read_records(out / "records")
    assert {metric["split"] for r in records for metric in r.metrics} == {"validation"}
    assert f"Table 4's learning rates, booksum_local (validation), scale {scale}" in capsys.readouterr().out
    rows = [each for each in tidy(records) if each["table"] == rates.SUMMARIES]
    losses = {}
    for rate in grid:
        (trained,) = (r for r in records if told(r) == (model, rate))
        losses[rate] = pick(rows, rates.LOSS, condition=f"{rate:g}")["value"]
        assert losses[rate] == trained.train["best_loss"], "of the checkpoint that the run stands for"
        assert pick(rows, "overall", condition=f"{rate:g}")["n"] == 2
    assert len(set(losses.values())) == 3
    assert pick(rows, rates.CHOSEN)["value"] == min(losses, key=losses.__getitem__)
    assert "(chosen)" in (out / "tables" / "table4_lr.md").read_text()
    if scale == "gpu":
        assert len([r for r in records if (r.kind, r.task) == ("train", "lm")]) == 1, "a stage for all rates"
        (same,) = standing(plan("table4", scale, out, None, (model,), words, data, only))
        assert same.state == "trained", "table4 evaluates one of these on its test split"


def test_all_models_of_table4_are_swept_as_it_trains_them(tmp_path):
    """The rate and what an evaluation asks apart, so that table4's own trainings are among these."""
    sweep, own = (read_plan(name).at("gpu") for name in ("table4_lr", "table4"))
    assert sweep.variants == own.variants and set(sweep.models) == set(own.models)
    rated = [f"{name} trainer.lr={rate}" for name in own.variants for rate in ("3e-05", "0.0001", "0.0003")]
    assert [setting.name for setting in sweep.settings()] == rated
    for only in ("infini_delta_token adapted prefix", "smollm2_1k_unlimiformer"):
        swept, (trained,) = (
            plan(name, "gpu", tmp_path, None, None, ["base.model=small.gguf"], tmp_path, only)
            for name in ("table4_lr", "table4")
        )
        assert [job.cfg.trainer.lr for job in swept] == [3e-5, 1e-4, 3e-4] and trained.cfg.trainer.lr == 1e-4
        for job in swept:
            cfg = job.cfg
            assert (cfg.task.split, cfg.task.controls, cfg.trainer.validate_rows) == ("validation", False, 8)
            assert cfg.trainer.best and cfg.trainer.validate_every == 20
            asked = {key: getattr(trained.cfg.task, key) for key in ("split", "controls", "lengths")}
            same = replace(cfg, trainer=trained.cfg.trainer, task=replace(cfg.task, **asked))
            assert same == trained.cfg
            assert {stage.cfg.task.split for stage in job.stages} <= {"validation"}
        assert swept[0].cfg.task.lengths == (["32K"] if "adapted" in only else [])


def tuned(rate, loss, model="infini_linear", step=10, **changes):
    """An evaluation on the validation split at 16K and 32K, and its training, which ended with this loss."""
    task = {"name": "booksum", "split": "validation", "lengths": ["16K", "32K"], **changes.pop("task", {})}
    trainer = {"lr": rate, "steps": 10, "validate_rows": 8, "curriculum": []}
    config = {"task": task, "trainer": trainer, **changes}
    made = booksum_lengths(model, config=config)
    for metric in made.metrics:
        metric["split"] = "validation"
    name = f"train-{made.id}"
    point = {"step": 10, "tokens": 1, "level": None, "validation_loss": loss}
    made.train |= {"id": name, "steps": step, "train_kind": "wikipedia"}
    trained = replace(
        made, id=name, kind="train", metrics=[], train={"folder": f"runs/{name}", "curve": [point]}
    )
    return [trained, made]


def test_the_least_loss_is_chosen_and_rouge_of_the_taught_kind_stands_beside():
    records = [
        *(run for rate, loss in ((3e-5, 4.5), (1e-4, 4.25), (3e-4, 4.75)) for run in tuned(rate, loss)),
        *tuned(1e-4, 9.0, task={"protocol": "whole_book"}),
        *tuned(3e-4, 8.0, task={"protocol": "whole_book"}),
        *tuned(3e-4, 1.0, task={"baseline": "map_reduce"}),  # other summaries, of the same weights
        *tuned(3e-3, 1.0, step=5),  # asked at a step without a loss
        *tuned(1e-4, 5.0, "local_block"),  # one rate is no sweep, but others of its budget have one
    ]
    titles, sheet = sheet_text(records, rates.SUMMARIES)
    tried = ["3e-05", "0.0001", "0.0003"]
    assert titles[2:8] == [*tried, *(f"overall, {rate}" for rate in tried)]
    lines = [(row[0], row[8], *(cell.replace("\n", " ") for cell in row[2:5])) for row in sheet.rows]
    whole, prefix = ("infini_linear\ntask.protocol=whole_book", "infini_linear\ntask.protocol=prefix")
    assert sorted(lines) == sorted(
        line
        for length in ("16K", "32K")
        for line in (
            (prefix, length, "4.500", "4.250 (chosen)", "4.750"),
            (whole, length, "—", "9.000", "8.000 (chosen)"),
            ("local_block\ntask.protocol=prefix", length, "—", "5.000", "—"),
        )
    )
    rows = [row for row in tidy(records) if row["table"] == rates.SUMMARIES and row["metric"] == "overall"]
    assert {(row["length"], row["value"], row["n"]) for row in rows} == {(16384, 15.0, 4), (32768, 17.0, 4)}


def test_seeds_whose_best_checkpoints_are_of_different_steps_are_one_line():
    def asked(seed, step, tokens, **changes):
        settings = {"best": True, "steps": 200, "validate_every": 20} | changes
        config = {f"trainer.{key}": value for key, value in settings.items()}
        train = {"id": f"run{seed}", "steps": step, "tokens": tokens, "tokens_before": 5000}
        return lm(seed=seed, config=config, train=train)

    records = [asked(0, 40, 40_000), asked(1, 120, 120_000), asked(2, 40, 40_000, validate_every=10)]
    first, second, other = (pick(tidy([r]), "bits_per_byte") for r in records)
    assert first["train_tokens"] == second["train_tokens"] == 205_000, "of the whole run"
    rows = [row for row in tidy(records) if row["metric"] == "bits_per_byte" and row["position"] is None]
    lines = {row["variant"]: row["seeds"] for row in rows}
    assert lines == {"trainer.validate_every=20": 2, "trainer.validate_every=10": 1}, "it decides, too"
    assert first["budget"] == second["budget"] != other["budget"]
