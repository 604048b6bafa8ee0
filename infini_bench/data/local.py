"""Documents from files: ``.txt``, ``.jsonl``, ``.jsonl.xz`` and ``.parquet``, one file or a folder.

Splits, in this order:

- sub-folders ``train``, ``validation``, ``test`` (also ``valid``, ``val``, ``dev``);
- file names: ``train.jsonl``, ``test-00000-of-00002.parquet``, ``books_val.parquet``;
- neither: one document in ten is for validation and one in ten for test, by the order of the hashes of their
  texts, so neither names nor the order of files matter; one or two documents are cut in three by length.

In a folder with ``.jsonl`` or ``.parquet`` files a ``.txt`` is taken for a note and left out.
"""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from infini_bench.data.documents import Document, Row, documents_from, hash_texts
from infini_bench.errors import UserError
from infini_bench.schema import DataConfig

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
SHARES = {  # of one or two documents, and of more
    "train": ("first eight tenths", "eight documents in ten", "are"),
    "validation": ("last tenth but one", "one document in ten", "is"),
    "test": ("last tenth", "one document in ten", "is"),
}
TABLES = (".jsonl", ".jsonl.xz", ".parquet")
HELD_OUT_SHARE = 10  # one document in so many for validation, and for test


def load_local(data: DataConfig, split: str) -> list[Document]:
    """Documents of one split of ``data.path``. Raises ``UserError`` naming the file and line at fault."""
    if data.path is None:
        raise UserError(
            "data=local needs data.path=, a file or folder of .txt, .jsonl, .jsonl.xz or .parquet."
        )
    path = Path(data.path).expanduser()
    files, named = _files_of(path, split)
    limit = data.max_documents if named else None  # unnamed splits are shares of the whole
    documents = _read(files, path, data, limit)
    return documents if named else _share_out(documents, path, split)


def shared_out(data: DataConfig, *splits: str) -> str | None:
    """In a sentence, the shares of ``data.path`` that ``splits`` are where nobody has split it; else None."""
    path = Path(data.path or "").expanduser()
    files, named = _files_of(path, splits[0])
    if named:
        return None
    form = "{dealt} (of one or two, the {cut})"  # a table's documents are not counted for this
    if text := files[0].suffix == ".txt":
        form = {1: "its {cut}", 2: "the {cut} of each"}.get(len(files), "{dealt}")
    names = [file.name for file in files] if text and len(files) == 2 else [path.name]
    shares = []
    for split in splits:
        cut, dealt, verb = SHARES[split]
        shares.append(f"{form.format(cut=cut, dealt=dealt)} {verb} the {split} split")
    return f"{' and '.join(names)} {'has' if len(names) == 1 else 'have'} no splits: {', '.join(shares)}"


def _files_of(path: Path, split: str) -> tuple[list[Path], bool]:
    """Files of ``split`` and whether folders or names say so; all files if nothing tells splits apart."""
    if not path.exists():
        raise UserError(f"data.path={path} does not exist.")
    groups = _by_folder(path) or _by_name(path, [path] if path.is_file() else _find(path))
    if "" in groups:
        return groups[""], False
    if split not in groups:
        raise UserError(f"{path} has no {split} split; it has: {', '.join(sorted(groups))}.")
    return groups[split], True


def _by_folder(path: Path) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = {}
    for split, names in SPLIT_NAMES.items():
        for name in names:
            if (path / name).is_dir():
                groups.setdefault(split, []).extend(_find(path / name))
    return groups


def _by_name(path: Path, files: list[Path]) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(_split_in(file), []).append(file)
    if "" in groups and len(groups) > 1:
        raise UserError(
            f"{path}: {groups[''][0].name} belongs to no split while other files do; "
            "call all files train, validation or test, or put them into folders of these names."
        )
    return groups


def _split_in(file: Path) -> str:
    """``train-00001.parquet`` and ``books_train.jsonl`` -> ``train``; ``test-of-time.txt`` -> nothing."""
    stem = file.name.split(".")[0].lower()
    for split, names in SPLIT_NAMES.items():
        for name in names:
            if re.fullmatch(rf"{name}([-_]?\d.*)?|.+[-_]{name}", stem):
                return split
    return ""


def _find(folder: Path) -> list[Path]:
    """Data files in and below ``folder``, sorted."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    tables = [file for file in files if file.name.endswith(TABLES)]
    found = tables or [file for file in files if file.suffix == ".txt"]
    if not found:
        raise UserError(f"{folder} holds no .txt, .jsonl, .jsonl.xz or .parquet file.")
    return found


def _read(files: list[Path], root: Path, data: DataConfig, limit: int | None) -> list[Document]:
    if files[0].suffix == ".txt":  # the columns are ours, see _txt
        data = replace(data, text_column="text", id_column="id", title_column="title")
        data = replace(data, summary_column=None, filter={})
    documents = documents_from((row for file in files for row in _rows(file, root)), data, limit)
    if not documents:
        passing = f" that passes data.filter={data.filter}" if data.filter else ""
        raise UserError(f"{root} holds no document{passing}.")
    return documents


def _rows(file: Path, root: Path) -> Iterator[Row]:
    try:
        if file.name.endswith(".parquet"):
            yield from _parquet(file)
        elif file.name.endswith((".jsonl", ".jsonl.xz")):
            yield from _jsonl(file)
        elif file.suffix == ".txt":
            yield _txt(file, root)
        else:
            raise UserError(f"{file} is not a .txt, .jsonl, .jsonl.xz or .parquet file.")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}.") from error


def _txt(file: Path, root: Path) -> Row:
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")  # the mark that some editors put first is not text
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise UserError(f"{file}, line {line}: not UTF-8 (byte 0x{byte:02x}); convert the file.") from error
    name = file.stem if root.is_file() else file.relative_to(root).with_suffix("").as_posix()
    return str(file), {"id": name, "title": file.stem, "text": text.replace("\r\n", "\n")}


def _jsonl(file: Path) -> Iterator[Row]:
    number = 0
    with lzma.open(file) if file.suffix == ".xz" else file.open("rb") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{file}, line {number}", _parse(line, file, number)
        except (lzma.LZMAError, EOFError) as error:
            raise UserError(f"{file} is broken or cut after line {number}; copy it again.") from error


def _parse(line: bytes, file: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{file}, line {number}: not UTF-8 (byte 0x{line[error.start]:02x}).") from error
    except ValueError as error:
        raise UserError(f"{file}, line {number}: not JSON ({error}).") from error
    if not isinstance(row, dict):
        raise UserError(f"{file}, line {number}: a JSON object was expected, this is a {type(row).__name__}.")
    return row


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{file} is not a whole Parquet file ({error}); copy it again.") from error
    rows = (row for batch in table.iter_batches(batch_size=64) for row in batch.to_pylist())
    for number, row in enumerate(rows, 1):
        yield f"{file}, row {number}", row


def _share_out(documents: list[Document], path: Path, split: str) -> list[Document]:
    """The share of ``split`` in documents that nobody has split."""
    hashes = [hash_texts([document.text]) for document in documents]
    ranks = {digest: rank for rank, digest in enumerate(sorted(set(hashes)))}  # equal texts go together
    if len(ranks) < 3:
        return [_cut(document, path, split) for document in documents]
    held_out = max(1, len(ranks) // HELD_OUT_SHARE)

    def share(digest: str) -> str:
        return {0: "validation", 1: "test"}.get(ranks[digest] // held_out, "train")

    return [document for document, digest in zip(documents, hashes, strict=True) if share(digest) == split]


def _cut(document: Document, path: Path, split: str) -> Document:
    """First 80 %, next 10 % or last 10 % of a document, cut at line ends."""
    if document.summaries:
        raise UserError(f"{path}: too few pairs to split; give train, validation and test files.")
    length = len(document.text)
    ends = [document.text.find("\n", length * tenths // 10) + 1 or length * tenths // 10 for tenths in (8, 9)]
    part = {"train": slice(ends[0]), "validation": slice(*ends), "test": slice(ends[1], None)}[split]
    if not document.text[part].strip():
        raise UserError(f"{path} is too short to be split into train, validation and test.")
    return replace(document, id=f"{document.id}:{split}", text=document.text[part])
