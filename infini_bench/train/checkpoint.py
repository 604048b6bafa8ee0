"""Checkpoints that a crash at any moment cannot break, and that are never loaded half.

A run folder holds ``config.json``, ``metrics.jsonl`` and ``checkpoints/``; in there ``index.json`` names the
last and the best checkpoint and all that are kept, each a folder that stands alone:

    step-000200/  model/  tokenizer/  config.json  optimizer.safetensors  state.json  checksums.json

A checkpoint is written to a hidden folder, forced to the disk and renamed; then the index, replaced in one
operation, names it; then old ones are deleted. What the index does not name does not count and is removed by
the next start. ``checksums.json`` has the SHA-256 of every other file. Without optimizer and state (a shipped
model) the folder still loads for evaluation.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from infini_bench.config import build_config
from infini_bench.data import Tokenizer
from infini_bench.errors import UserError
from infini_bench.files import read_json, write_json
from infini_bench.models import load_model
from infini_bench.schema import RunConfig

if TYPE_CHECKING:
    from infini_bench.models import MemoryLlamaForCausalLM

CHECKSUMS = "checksums.json"
FOR_EVALUATION = ("model/", "tokenizer/", "config.json")


class Checkpoints:
    """The checkpoints of one run folder: the last ``keep`` ones and the best."""

    def __init__(self, run: Path, keep: int) -> None:
        self.folder, self.keep = run / "checkpoints", keep

    def index(self) -> dict:
        """``{"last": name or None, "best": name or None, "kept": [names, oldest first]}``."""
        path = self.folder / "index.json"
        if path.exists():
            return read_json(path)
        found = sorted(path.parent.name for path in self.folder.glob(f"step-*/{CHECKSUMS}"))
        return {"last": found[-1] if found else None, "best": None, "kept": found}

    def save(self, step: int, write: Callable[[Path], None], best: bool) -> Path:
        """Makes the checkpoint of ``step``; ``write`` fills a folder. Raises UserError if the disk refuses.

        After an error, or a crash at any point, the last checkpoint is still there and still named last.
        """
        index, name = self.index(), f"step-{step:06d}"
        final, draft = self.folder / name, self.folder / f".{name}.draft"
        with disk_errors(self.folder), removed_on_error(draft):
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            write(draft)
            seal(draft)
            draft.rename(final)
            force(self.folder)
        kept = [*index["kept"], name]
        chosen = name if best else index["best"]
        self._adopt({"last": name, "best": chosen, "kept": self._worth_keeping(kept, chosen)})
        return final

    def rewind(self, name: str | None) -> None:
        """Makes ``name`` the last checkpoint (None: there is none); removes later ones and all left-overs."""
        index = self.index()
        kept = index["kept"][: index["kept"].index(name) + 1] if name else []
        self._adopt({"last": name, "best": index["best"] if index["best"] in kept else None, "kept": kept})

    def _worth_keeping(self, names: list[str], best: str | None) -> list[str]:
        last = names[-self.keep :]
        return [name for name in names if name in last or name == best]

    def _adopt(self, index: dict) -> None:
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "index.json", index)
            force(self.folder)
            for path in self.folder.iterdir():
                if path.is_dir() and path.name not in index["kept"]:
                    shutil.rmtree(path)
                elif path.is_file() and path.name != "index.json":
                    path.unlink()


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns a full disk or a missing permission into a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"Cannot write a checkpoint in {folder} ({error}); free space or choose another runs=FOLDER. "
            "Checkpoints saved before are intact."
        ) from error


@contextmanager
def removed_on_error(folder: Path) -> Iterator[None]:
    """Leaves no half-written folder behind."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def force(path: Path) -> None:
    """Forces a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def seal(folder: Path) -> None:
    """Writes ``checksums.json`` over all files below a folder and forces everything to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    write_json(folder / CHECKSUMS, {path.relative_to(folder).as_posix(): digest(path) for path in files})
    for path in [*folder.rglob("*"), folder]:
        force(path)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path, parts: tuple[str, ...] = ("",)) -> None:
    """Raises UserError naming the first file that is missing or not as written.

    parts: beginnings of the paths that matter.
    """
    expected: dict[str, str] = read_json(folder / CHECKSUMS)
    for part in parts:
        if not any(name.startswith(part) for name in expected):
            raise UserError(f"{folder / CHECKSUMS} names no {part}; copy the checkpoint again.")
    for name, value in expected.items():
        path = folder / name
        if not name.startswith(parts):
            continue
        if not path.is_file() or digest(path) != value:
            what = "damaged" if path.is_file() else "missing"
            raise UserError(f"Checkpoint file {path} is {what}; restore it, or use another checkpoint.")


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: itself, or a run's last one, or with ``trainer.best`` its best.

    Else last, so that models compared under one budget have all seen the same number of tokens.
    """
    if (path / CHECKSUMS).exists():
        return path
    if not path.is_dir():
        raise UserError(f"{path} is no folder; give a run folder or a checkpoint folder.")
    index = Checkpoints(path, 1).index()
    if index["last"] is None:
        raise UserError(f"{path} holds no finished checkpoint; give a run folder or a checkpoint folder.")
    last = path / "checkpoints" / index["last"]
    if index["best"] and read_json(last / "config.json")["trainer"].get("best"):
        return last.with_name(index["best"])
    return last


def load_checkpoint_model(path: Path) -> tuple[MemoryLlamaForCausalLM, Tokenizer, RunConfig]:
    """Model (float32, CPU), tokenizer and configuration of a checkpoint, or of a run's last checkpoint.

    Raises UserError, naming the file, for what is missing, damaged or of another architecture.
    """
    folder = find_checkpoint(Path(path))
    verify(folder, FOR_EVALUATION)
    cfg = build_config(read_json(folder / "config.json"))
    return load_model(folder / "model"), Tokenizer.load(folder / "tokenizer"), cfg
