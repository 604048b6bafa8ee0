"""What results/table3.sh asks for can be made, at its own sizes, before a GPU is asked to."""

import json
import lzma
import os
import shlex
import subprocess
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from infini_bench.adapt import of_stage, stage_words
from infini_bench.cli import main as cli
from infini_bench.cli.bridge import compose_run, given
from infini_bench.data.tokenizers import build_tokenizer
from infini_bench.schema import DataConfig
from infini_bench.tasks import build_task
from infini_bench.unread import check_read

ROOT = Path(__file__).parent.parent
BENCH = """#!/usr/bin/env bash
printf '%q ' "$@" >> commands && echo >> commands
for word; do case $word in runs=*) mkdir -p "${word#runs=}/1-train-passkey-1" ;; esac; done
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a base of random weights, books, and an infini-bench that writes down what it is asked."""
    folder = tmp_path_factory.mktemp("scripts")
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(folder / "base")
    data = DataConfig(vocab_size=280, cache_dir=str(folder))
    ours = build_tokenizer(data, lambda: ["The pass key is hidden in a book."])
    of_transformers = PreTrainedTokenizerFast(tokenizer_object=ours._backend, eos_token="<|eos|>")
    of_transformers.save_pretrained(folder / "base")
    (folder / "books").mkdir()
    for split in ("train", "validation"):
        book = {"id": split, "title": split, "text": "A book, of words. " * 200}
        (folder / "books" / f"{split}.jsonl.xz").write_bytes(lzma.compress(json.dumps(book).encode()))
    (folder / "bench").write_text(BENCH)
    (folder / "bench").chmod(0o755)
    return folder


def commands(folder, *words, **settings):
    (folder / "commands").unlink(missing_ok=True)
    env = {**os.environ, "BENCH": "./bench", **settings}
    subprocess.run(["bash", ROOT / "results/table3.sh", *words], cwd=folder, env=env, check=True)
    return [shlex.split(line) for line in (folder / "commands").read_text().splitlines()]


@pytest.mark.parametrize(
    "row", ["floor", "cost", "border", "linear", "delta", "local", "paper_linear", "paper_delta"]
)
def test_a_row_of_table_3_can_be_trained_to_the_end_of_its_curriculum(row, folder, monkeypatch):
    monkeypatch.chdir(folder)
    (verb, model, _, stages, *overrides), *asked = commands(folder, "base", "books", row, "1")
    assert verb == "adapt" and all(words[0] == "eval" for words in asked)
    for stage in stages.split(","):
        own = of_stage(stage, overrides)
        cfg = compose_run([*stage_words(model, stage, own), f"data.cache_dir={folder}", "device=cpu"])
        check_read(given(own), [cfg])
        build_task(cfg).check_training()
        assert cfg.seed == 1 and cfg.memory.segment == (2048 if "paper" in row else 1024)


@pytest.mark.parametrize("row", ["border", "paper_linear", "zero_delta", "before"])
def test_what_a_row_of_table_3_is_asked_is_known(row, folder, monkeypatch):
    monkeypatch.chdir(folder)
    asked = [words for words in commands(folder, "base", "books", row, "1") if words[0] == "eval"]
    assert len(asked) == {"border": 10, "paper_linear": 3, "zero_delta": 2, "before": 2}[row]
    for words in asked:
        result = CliRunner().invoke(cli.app, [*words, "--cfg", "job"])
        assert result.exit_code == 0, result.output


def lengths(asked):
    return {words[words.index("--length") + 1] for words in asked if "passkey" in words}


def test_what_has_no_memory_is_not_asked_for_keys_far_away(folder):
    _, *asked = commands(folder, "base", "books", "local", "1")
    assert lengths(asked) == {"32K"} and ["eval", "lm"] in [words[:2] for words in asked]


def test_a_training_with_settings_of_the_caller_has_a_folder_of_its_own(folder):
    found = [commands(folder, "base", "books", "floor", **more)[0][-2:] for more in ({}, {"MORE": "seed=0"})]
    plain, own = (next(word for word in words if word.startswith("runs=")) for words in found)
    assert plain == "runs=runs/table3_floor_0" and own.startswith(f"{plain}_")


def test_settings_of_the_caller_come_last_and_a_row_that_is_none_is_told(folder):
    train, *asked = commands(folder, "base", "books", "delta", SHORT="1", LENGTH="4K", MORE="trainer.steps=3")
    assert train[-1] == "trainer.steps=3"
    assert lengths(asked) == {"4K"}
    words = ["bash", ROOT / "results/table3.sh", "base", "books", "bordr"]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: bordr is no row")
