"""Sets rebuilt from the hub, on a local copy of its columns."""

from __future__ import annotations

import json
from dataclasses import replace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from infini_bench.cli.main import app
from infini_bench.data import load_documents
from infini_bench.data.rebuild import SPLITS, Rebuild, names, read_rebuild, rebuild
from infini_bench.errors import UserError
from infini_bench.schema import DataConfig


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Writes rows as every split of a data set and returns its address."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()

    def write(rows):
        for split in SPLITS:
            path = tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), path)
        return str(tmp_path / "set")

    return write


def books(numbers):
    return [
        {"short_book_title": f"Book {n}", "url": f"http://www.gutenberg.org/ebooks/{n}", "text": f"text {n}"}
        for n in numbers
    ]


def test_books_by_number(hub, tmp_path):
    splits = {"train": [12, 3], "validation": [1], "test": [123]}
    made = replace(read_rebuild("books"), hub_id=hub(books([1, 2, 3, 12, 123])), splits=splits)
    paths = rebuild(made, tmp_path / "out")
    assert [path.name for path in paths] == [f"{split}.jsonl.xz" for split in SPLITS]
    data = DataConfig(source="local", path=str(tmp_path / "out"), id_column="id", title_column="title")
    assert [(d.id, d.title, d.text) for d in load_documents(data, "train")] == [
        ("pg3", "Book 3", "text 3"),
        ("pg12", "Book 12", "text 12"),
    ]
    before = paths[0].stat().st_mtime_ns
    assert rebuild(made, tmp_path / "out")[0].stat().st_mtime_ns == before, "what is there stays"
    with pytest.raises(UserError, match="test lacks 2 of the documents asked for: 7, 9"):
        rebuild(replace(made, splits={**splits, "test": [9, 123, 7]}), tmp_path / "other")
    assert not (tmp_path / "other" / "test.jsonl.xz").exists()


def test_papers_until_there_is_enough(hub, tmp_path):
    rows = [{"text": "x" * 10, "meta": json.dumps({"config": config})} for config in ("wiki", *["arxiv"] * 5)]
    sizes = {"train": 25, "validation": 10, "test": 11}
    made = replace(read_rebuild("math"), hub_id=hub(rows), hub_revision=None, bytes=sizes)
    rebuild(made, tmp_path / "out")
    data = DataConfig(source="local", path=str(tmp_path / "out"), id_column="id")
    found = {split: [d.id for d in load_documents(data, split)] for split in SPLITS}
    assert found == {
        "train": ["train1", "train2", "train3"],
        "validation": ["validation1"],
        "test": ["test1", "test2"],
    }
    with pytest.raises(UserError, match="has 50 bytes of such text, not 99"):
        made = replace(made, bytes={**sizes, "train": 99})
        rebuild(made, tmp_path / "other")


def test_a_dry_run_asks_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked the hub"))
    shown = CliRunner().invoke(app, ["rebuild", "books", "--out", str(tmp_path), "--dry-run"]).output
    assert "emozilla/pg19, 2.3 GB" in shown and "381 documents by number" in shown
    assert "16 documents by number" in shown and "26 documents by number: 2544, 3608" in shown
    shown = CliRunner().invoke(app, ["rebuild", "math", "--out", str(tmp_path), "--dry-run"]).output
    assert "rows with meta.config=arxiv" in shown and "up to 35.4 MB of text" in shown
    assert not list(tmp_path.iterdir())


def test_the_lists_are_whole():
    assert names() == ["books", "math"]
    numbers = [n for split in read_rebuild("books").splits.values() for n in split]
    assert len(numbers) == len(set(numbers)) == 423
    for name in names():
        made = read_rebuild(name)
        assert isinstance(made, Rebuild) and {*made.splits, *made.bytes} == {*SPLITS}
    with pytest.raises(UserError, match='did you mean "books"'):
        read_rebuild("boks")


def test_no_network_is_told(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'emozilla/pg19' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"Couldn't reach .* --dry-run"):
        rebuild(read_rebuild("books"), tmp_path)
