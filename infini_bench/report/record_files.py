"""The files of a folder of records: JSON lines, plain (``.jsonl``) or packed (``.jsonl.xz``)."""

from __future__ import annotations

import itertools
import lzma
from pathlib import Path

from infini_bench.errors import UserError

PLAIN, PACKED = ".jsonl", ".jsonl.xz"


def record_files(folder: Path | str) -> list[Path]:
    """Every file of records, by name; none if there is no folder yet."""
    found = sorted(path for path in Path(folder).glob("*.jsonl*") if path.name.endswith((PLAIN, PACKED)))
    for path, following in itertools.pairwise(found):
        if bare(path) == bare(following):  # read both, a run would count twice
            raise UserError(
                f"{path} is there plain and packed; delete one of the two, as `infini-bench pack` does if "
                "they are the same."
            )
    return found


def bare(path: Path | str) -> str:
    """The file's name without its endings: the record's id, where it holds one."""
    return Path(path).name.removesuffix(".xz").removesuffix(PLAIN)


def read_lines(path: Path) -> list[str]:
    try:
        content = path.read_bytes()
        return (lzma.decompress(content) if path.suffix == ".xz" else content).decode().splitlines()
    except (UnicodeDecodeError, lzma.LZMAError):
        what = "broken or cut" if path.suffix == ".xz" else "not UTF-8 text"
        raise UserError(f"{path} is {what}; delete the file or restore it from git.") from None


def write_lines(path: Path, lines: list[str]) -> None:
    """Atomically, and compressed where the name says so."""
    from infini_bench.files import atomic_write

    content = "".join(f"{line}\n" for line in lines).encode()
    atomic_write(path, lzma.compress(content) if path.suffix == ".xz" else content)


def drop_copies(folder: Path | str) -> list[Path]:
    """Delete every plain file that is there packed, too, and return the packed ones.

    Raises UserError, and deletes nothing, if the two of one differ.
    """
    plain = [path for path in sorted(Path(folder).glob(f"*{PLAIN}")) if _packed(path).exists()]
    for path in plain:
        if read_lines(path) != read_lines(_packed(path)):
            raise UserError(f"{path} and {_packed(path).name} differ; delete the one that is wrong.")
    for path in plain:
        path.unlink()
    return [_packed(path) for path in plain]


def _packed(path: Path) -> Path:
    return path.with_name(bare(path) + PACKED)


def pack(path: Path) -> Path:
    """Compress a plain file, byte for byte, and return the packed one, which takes its place."""
    from infini_bench.files import atomic_write

    packed = _packed(path)
    atomic_write(packed, lzma.compress(path.read_bytes()))
    path.unlink()
    return packed
