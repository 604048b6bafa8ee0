"""Reading and writing small files so that nothing is ever half there."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infini_bench.errors import UserError

_REASONS = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "your disk quota is used up; free some space",
    errno.EACCES: "permission denied; choose a folder that you may write to",
    errno.EPERM: "permission denied; choose a folder that you may write to",
    errno.EROFS: "the file system is read-only; choose a folder that you may write to",
    errno.ENOENT: "no folder can be made there; choose another",
    errno.ENOTDIR: "a part of that path is a file; choose another folder",
    errno.EEXIST: "a file of that name is in the way; choose another folder",
    errno.EISDIR: "a folder of that name is in the way; choose another name",
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what can go wrong with a disk while writing ``path`` into a ``UserError`` that names it."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REASONS:
            raise
        raise UserError(f"cannot write {path}: {_REASONS[error.errno]}.") from error


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write ``content`` (text as UTF-8) to ``path``: afterwards the old or the new file is there, whole.

    Missing folders are made. Raises ``UserError`` for a full disk or a missing permission.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, because a rename is atomic only inside one file system.
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new temporary folder that takes the name ``path`` once the block has ended without error.

    If another process has made ``path`` in the meantime, its folder stays and ours is dropped.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as outer:
            temporary = Path(outer) / "new"  # inside, so that the clean-up finds its folder in any case
            temporary.mkdir()
            yield temporary
            try:
                temporary.rename(path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises ``UserError`` naming it if it is missing, unreadable or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing.") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error
    except ValueError as error:  # broken JSON or not UTF-8
        raise UserError(f"{path} is broken ({error}); delete it, or restore it from a copy.") from error


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time of those that name this file, which is made and stays; the others wait."""
    import fcntl  # of POSIX only

    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)  # freed with the file, also if the process is killed
        yield
