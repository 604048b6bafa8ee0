"""Memory as a file: what was read once answers later as if the book were still there."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from infini_bench.cache import MemoryCache
from infini_bench.cli.main import app
from infini_bench.errors import UserError
from infini_bench.models import build_model, save_model
from infini_bench.remember import answer, identity, open_model, remember
from infini_bench.schema import DataConfig, DecoderConfig, MemoryConfig
from infini_bench.stream import generate, prefill
from infini_bench.tasks.haystack import QUESTION, prompt_text

SHIPPED = "shipped/passkey"


def test_a_folder_is_no_place_for_a_memory(tmp_path):
    with pytest.raises(UserError, match="is a folder; name a file"):
        remember(SHIPPED, tmp_path / "unread.txt", tmp_path, "cpu")


def exported(folder: Path, tmp_path: Path, **memory) -> Path:
    from infini_bench.data import build_tokenizer

    torch.manual_seed(1)
    tokenizer = build_tokenizer(DataConfig(tokenizer="bytes"), lambda: [])
    settings = MemoryConfig(**{"segment": 8, "update": "delta", **memory})
    save_model(build_model(DecoderConfig(dim=32, init_std=0.3), settings, tokenizer.vocab_size), folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("A long story about nothing in particular. " * 30 + "The end", encoding="utf-8")
    return path


def test_the_shipped_model_answers_from_a_file_what_it_read_in_a_book(tmp_path):
    book, file = tmp_path / "book.txt", tmp_path / "memory.safetensors"
    key = "80416"
    book.write_text(prompt_text(key, 100, 800).removesuffix(QUESTION), encoding="utf-8")
    run = CliRunner().invoke(app, ["remember", SHIPPED, str(book), "--out", str(file), "--device", "cpu"])
    assert run.exit_code == 0 and "tokens of book.txt" in run.stdout
    assert file.stat().st_size < 2**20
    book.unlink()
    asked = ["--prompt", QUESTION, "--tokens", "6", "--device", "cpu"]  # a space and the key
    run = CliRunner().invoke(app, ["answer", SHIPPED, "--state", str(file), *asked])
    assert run.stdout.strip() == key


@pytest.mark.parametrize("prompt", ["x", "What happened in the story, and to whom was it told?"])
def test_the_answer_is_that_of_reading_book_and_prompt_at_once(tmp_path, book, prompt):
    folder, file = exported(tmp_path / "model", tmp_path), tmp_path / "memory.safetensors"
    about = remember(str(folder), book, file, "cpu")
    model, tokenizer = open_model(str(folder), "cpu")
    assert about["tokens"] == str(len(book.read_bytes())) and about["fingerprint"] == identity(model)
    whole = tokenizer.encode(book.read_text() + prompt)[None]
    logits, state = prefill(model, [whole])
    expected = tokenizer.decode(generate(model, logits, state, 20, eos_id=tokenizer.eos_id)[0])
    from_file = prefill(model, [tokenizer.encode(prompt)[None]], MemoryCache.load(file))[0]
    assert (from_file - logits).abs().max() < 1e-4
    assert answer(str(folder), file, prompt, 20, "cpu") == expected
    forgotten = prefill(model, [tokenizer.encode(prompt)[None]])[0]
    assert (forgotten - logits).abs().max() > 1e-2


def test_another_models_memory_and_other_files_are_refused(tmp_path, book):
    first, file = exported(tmp_path / "first", tmp_path), tmp_path / "memory.safetensors"
    remember(str(first), book, file, "cpu")
    for name, memory in (("shape", {"features": "dpfp"}), ("settings", {"normaliser": "mean"})):
        other = exported(tmp_path / name, tmp_path, **memory)
        with pytest.raises(UserError, match=r"memory of another model \(.*first\), not of .*; ask that one"):
            answer(str(other), file, "x", device="cpu")
    model, _ = open_model(str(first), "cpu")
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-6
    assert identity(model) != MemoryCache.about(file)["fingerprint"]
    several, about = MemoryCache.load(file).select_rows(torch.tensor([0, 0])), MemoryCache.about(file)
    several.save(tmp_path / "two", about)
    with pytest.raises(UserError, match="remembers 2 documents side by side"):
        answer(str(first), tmp_path / "two", "x", device="cpu")
    plain = tmp_path / "plain.safetensors"
    model.step(torch.zeros(1, 3, dtype=torch.long))[1].save(plain)
    with pytest.raises(UserError, match="does not say which model wrote it"):
        answer(str(first), plain, "x", device="cpu")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match="cannot be read"):
        answer(str(first), file, "x", device="cpu")
    with pytest.raises(UserError, match='"nowhere" is neither a folder nor a model'):
        remember("nowhere", book, file)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        remember(str(first), tmp_path / "none.txt", file)
