"""Memory as a file: a book is read once, its state kept, and questions are answered without the book."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from infini_bench.cache import MemoryCache
from infini_bench.data import Tokenizer
from infini_bench.device import torch_device
from infini_bench.errors import UserError
from infini_bench.models import MemoryLlamaForCausalLM, load_model
from infini_bench.origin import checkpoint_name, find_model
from infini_bench.progress import Progress
from infini_bench.stream import chunked, feed, generate, prefill

CHUNK = 8192  # tokens read at a time, in whole segments


def remember(name: str, book: Path, out: Path, device: str = "auto") -> dict[str, str]:
    """Read ``book`` (UTF-8 text) with the model ``name`` (see `open_model`) and write its state to ``out``.

    Returns what the file says about itself: model, fingerprint, document, its SHA-256 and its tokens.
    """
    if out.is_dir():
        raise UserError(f"{out} is a folder; name a file for the memory.")
    try:
        text = book.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{book} cannot be read: {error.strerror}; give a text file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{book} is no UTF-8 text ({error}); give a text file.") from error
    path, _ = find_model(name)
    model, tokenizer = open_model(str(path), device)
    ids = tokenizer.encode(text)[None]
    if not ids.size:
        raise UserError(f"{book} is empty; give a text.")
    size = max(CHUNK // model.segment, 1) * model.segment
    with Progress() as progress, progress.task(f"read {book.name}", ids.size) as bar:
        state = feed(model, chunked(ids, size), None, bar)
    about = {"model": checkpoint_name(path), "fingerprint": identity(model), "document": book.name}
    about |= {"sha256": hashlib.sha256(text.encode()).hexdigest(), "tokens": str(ids.size)}
    state.save(out, about)
    return about


def answer(name: str, file: Path, prompt: str, tokens: int = 32, device: str = "auto") -> str:
    """What the model ``name`` greedily says after ``prompt``, which follows on what ``file`` remembers.

    At most ``tokens`` tokens, ended by the end of text. Raises UserError if another model wrote the file.
    """
    about = MemoryCache.about(file)
    if "fingerprint" not in about:
        raise UserError(f"{file} does not say which model wrote it; write it with `infini-bench remember`.")
    model, tokenizer = open_model(name, device)
    if identity(model) != about["fingerprint"]:
        raise UserError(
            f"{file} is the memory of another model ({about['model']}), not of {name}; ask that one, or read "
            f"{about['document']} again."
        )
    ids = tokenizer.encode(prompt)[None]
    if not ids.size:
        raise UserError("The prompt is empty; ask something.")
    state = MemoryCache.load(file, str(model.device))
    if state.batch not in (None, 1):
        raise UserError(f"{file} remembers {state.batch} documents side by side; give a file of one.")
    logits, state = prefill(model, [ids], state)
    said = generate(model, logits, state, tokens, eos_id=tokenizer.eos_id)[0]
    return tokenizer.decode(said)


def open_model(name: str, device: str = "auto") -> tuple[MemoryLlamaForCausalLM, Tokenizer]:
    """Model and tokenizer that ``name`` means (see `infini_bench.origin.find_model`), ready to read."""
    from infini_bench.show import quiet
    from infini_bench.train.checkpoint import load_checkpoint_model

    quiet()
    path, _ = find_model(name)
    if (path / "checksums.json").exists():
        model, tokenizer, _ = load_checkpoint_model(path)
    else:
        model, tokenizer = load_model(path), Tokenizer.load(path)
    return model.eval().to(torch_device(device)), tokenizer


def identity(model: MemoryLlamaForCausalLM) -> str:
    """Hash of the memory's settings and of every weight: whoever shares it understands the same states."""
    digest = hashlib.sha256(json.dumps(model.config.memory, sort_keys=True).encode())
    for name, p in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
        digest.update(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
