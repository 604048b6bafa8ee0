"""Rows to documents, and all local sources."""

import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infini_bench.data import Document, Summary, fingerprint, load_documents
from infini_bench.data.local import shared_out
from infini_bench.errors import UserError
from infini_bench.schema import DataConfig


def local(path, **settings) -> DataConfig:
    return DataConfig(name="mine", source="local", path=str(path), **settings)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def texts(config, split="train", **kwargs):
    return [document.text for document in load_documents(config, split, **kwargs)]


def test_fingerprint_depends_on_all_fields_and_the_order():
    base = Document("a", "t", "text", (Summary("s", "sum"),))
    others = [
        Document("b", "t", "text", (Summary("s", "sum"),)),
        Document("a", "t", "texts", (Summary("s", "um"),)),
        Document("a", "t", "text", (Summary("s", "sums"),)),
        Document("a", "t", "text"),
    ]
    assert len({fingerprint([document]) for document in [base, *others]}) == 5
    assert fingerprint([base, others[0]]) != fingerprint([others[0], base])
    assert fingerprint([base]) == fingerprint([Document("a", "t", "text", (Summary("s", "sum"),))])


def test_text_folder_with_splits(tmp_path):
    for name, text in {
        "train/b.txt": "B",
        "train/deep/a.txt": "A",
        "val/c.txt": "C",
        "test/d.txt": "D",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "README.txt").write_text("not data")
    train = load_documents(local(tmp_path), "train")
    assert [(document.id, document.title, document.text) for document in train] == [
        ("train/b", "b", "B"),
        ("train/deep/a", "a", "A"),
    ]
    assert texts(local(tmp_path), "validation") == ["C"]
    assert texts(local(tmp_path), "test") == ["D"]


@pytest.mark.parametrize("name", ["train.txt", "train-00000-of-00002.txt", "books_train.txt", "train_2.txt"])
def test_file_names_tell_splits(tmp_path, name):
    (tmp_path / name).write_text("A")
    (tmp_path / "test.txt").write_text("B")
    assert texts(local(tmp_path), "train") == ["A"]
    assert texts(local(tmp_path), "test") == ["B"]
    with pytest.raises(UserError, match="no validation split; it has: test, train"):
        load_documents(local(tmp_path), "validation")


def test_unsplit_folder_is_shared_out_by_content(tmp_path):
    for folder, names in {"one": range(30), "two": reversed(range(30))}.items():
        (tmp_path / folder).mkdir()
        for place, number in enumerate(names):
            (tmp_path / folder / f"test-of-{place:02d}.txt").write_text(f"text number {number}")
    splits = {split: texts(local(tmp_path / "one"), split) for split in ("train", "validation", "test")}
    assert [len(found) for found in splits.values()] == [24, 3, 3]
    assert len({text for found in splits.values() for text in found}) == 30
    for split, found in splits.items():
        assert sorted(found) == sorted(texts(local(tmp_path / "two"), split))


def test_equal_texts_stay_in_one_split(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": f"text {number % 5}"} for number in range(20)])
    splits = [set(texts(local(path), split)) for split in ("train", "validation", "test")]
    assert [len(found) for found in splits] == [3, 1, 1]
    assert len(set.union(*splits)) == 5


def test_one_text_is_cut_in_three(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {number}\n" for number in range(100)))
    parts = ["".join(texts(local(tmp_path / "a.txt"), split)) for split in ("train", "validation", "test")]
    assert "".join(parts) == (tmp_path / "a.txt").read_text()
    assert [len(part.splitlines()) for part in parts] == [81, 10, 9]


def test_windows_text_files(tmp_path):
    (tmp_path / "train.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert texts(local(tmp_path)) == ["one\ntwo"]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.xz", "parquet"])
def test_all_tables_give_the_same_documents(tmp_path, kind):
    rows = [{"name": f"n{i}", "book": f"text {i}", "head": f"Title {i}"} for i in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if kind == "parquet":
        table(tmp_path / "train.parquet", rows)
    else:
        opened = lzma.open if kind.endswith("xz") else open
        with opened(tmp_path / f"train.{kind}", "wt", encoding="utf-8") as file:
            file.write(lines)
    config = local(tmp_path, text_column="book", id_column="name", title_column="head")
    expected = [Document(f"n{i}", f"Title {i}", f"text {i}") for i in range(3)]
    assert load_documents(config, "train") == expected
    assert load_documents(local(tmp_path, text_column="book", max_documents=2), "train") == [
        Document("0", "0", "text 0"),
        Document("1", "1", "text 1"),
    ]


def test_rows_of_one_book_are_merged(tmp_path):
    rows = [
        {"bid": 7, "book": "seven", "summary": "first"},
        {"bid": 8, "book": "eight", "summary": "other"},
        {"bid": 7, "book": "seven", "summary": "second"},
        {"bid": 7, "book": "another edition", "summary": "third"},
        {"bid": 7, "book": "seven", "summary": "first"},
    ]
    table(tmp_path / "test.parquet", rows)
    settings = {"text_column": "book", "id_column": "bid", "summary_column": "summary"}
    documents = load_documents(local(tmp_path, **settings), "test", pairs=True)
    assert [(document.id, document.text) for document in documents] == [
        ("7", "seven"),
        ("8", "eight"),
        ("7", "another edition"),
    ]
    assert documents[0].summaries == (Summary("summary", "first"), Summary("summary", "second"))
    limited = load_documents(local(tmp_path, **settings, max_documents=1), "test", pairs=True)
    assert limited == documents[:1]


@pytest.mark.parametrize(
    "value",
    [
        [{"source": "a", "text": "A", "analysis": None}, {"source": None, "text": "B"}],
        {"source": ["a", None], "text": ["A", "B"]},
    ],
)
def test_summary_lists(tmp_path, value):
    path = jsonl(tmp_path / "test.jsonl", [{"text": "x", "summary": value}])
    (document,) = load_documents(local(path, summary_column="summary"), "test", pairs=True)
    assert document.summaries == (Summary("a", "A"), Summary("summary", "B"))


def test_filter_reaches_into_json(tmp_path):
    metas = [{"config": "arxiv"}, {"config": "books"}, {"other": 1}]
    rows = [{"text": f"text {i}", "meta": json.dumps(meta), "year": i} for i, meta in enumerate(metas)]
    path = jsonl(tmp_path / "train.jsonl", rows)
    assert texts(local(path, filter={"meta.config": "arxiv"})) == ["text 0"]
    assert texts(local(path, filter={"meta.config": "books", "year": "1"})) == ["text 1"]
    with pytest.raises(UserError, match=r"no document that passes data.filter="):
        load_documents(local(path, filter={"meta.config": "arxif"}), "train")
    with pytest.raises(UserError, match=r'no column "metal" \(did you mean "meta"\?\); set data.filter'):
        load_documents(local(path, filter={"metal.config": "arxiv"}), "train")
    with pytest.raises(UserError, match='"text" is not JSON'):
        load_documents(local(path, filter={"text.config": "arxiv"}), "train")


def test_missing_column_lists_what_there_is(tmp_path):
    path = jsonl(tmp_path / "train.jsonl", [{"id": 1, "texts": "x", "title": "t"}])
    message = (
        r'line 1: no column "text" \(did you mean "texts"\?\); set data.text_column to one of: id, texts'
    )
    with pytest.raises(UserError, match=message):
        load_documents(local(path), "train")
    with pytest.raises(UserError, match=r"set data\.title_column"):
        load_documents(local(path, text_column="texts", title_column="name"), "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r"train\.jsonl, line 2: not JSON"),
        (b'{"text": "a"}\n\n{"text": "\xff"}\n', r"train\.jsonl, line 3: not UTF-8 \(byte 0xff\)"),
        (b'{"text": "a"}\n["text"]\n', "line 2: a JSON object was expected, this is a list"),
        (b'{"text": "a"}\n{"text": "  "}\n', 'line 2: column "text" is empty'),
        (b'{"text": null}\n', "line 1: column .text. holds NoneType, not text"),
        (b'{"text": "\\ud800"}\n', "not valid Unicode"),
        (b"", "holds no document"),
    ],
)
def test_bad_jsonl_names_file_and_line(tmp_path, content, message):
    (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_documents(local(tmp_path), "train")


def test_bad_text_and_broken_archives(tmp_path):
    (tmp_path / "train.txt").write_bytes(b"good\ngood\nb\xe4d\n")
    with pytest.raises(UserError, match=r"train\.txt, line 3: not UTF-8 \(byte 0xe4\)"):
        load_documents(local(tmp_path), "train")
    (tmp_path / "train.jsonl.xz").write_bytes(lzma.compress(b'{"text": "a"}\n' * 9)[:-30])
    with pytest.raises(UserError, match=r"train\.jsonl\.xz is broken or cut"):
        load_documents(local(tmp_path / "train.jsonl.xz"), "train")
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="not a whole Parquet file"):
        load_documents(local(tmp_path / "train.parquet"), "train")


def test_bad_paths(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_documents(local(tmp_path / "no"), "train")
    with pytest.raises(UserError, match=r"holds no .txt"):
        load_documents(local(tmp_path), "train")
    with pytest.raises(UserError, match=r"needs data\.path="):
        load_documents(DataConfig(source="local"), "train")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UserError, match=r"is not a .txt"):
        load_documents(local(tmp_path / "a.csv"), "train")
    (tmp_path / "train.txt").write_text("x")
    (tmp_path / "more.txt").write_text("x")
    with pytest.raises(UserError, match=r"more\.txt belongs to no split"):
        load_documents(local(tmp_path), "train")


def test_bad_settings(tmp_path):
    with pytest.raises(UserError, match=r'"trian" is not a split \(did you mean "train"\?\)'):
        load_documents(DataConfig(), "trian")
    with pytest.raises(UserError, match=r'data.source="lokal" is unknown \(did you mean "local"\?\)'):
        load_documents(DataConfig(source="lokal"), "train")
    with pytest.raises(UserError, match="max_documents=0 leaves nothing"):
        load_documents(DataConfig(max_documents=0), "train")


def test_pairs_need_summaries(tmp_path):
    path = jsonl(tmp_path / "train.jsonl", [{"text": "a", "summary": "s"}, {"text": "b", "summary": None}])
    with pytest.raises(UserError, match=r"has no summaries; name their column"):
        load_documents(local(path), "train", pairs=True)
    with pytest.raises(UserError, match=r"1 of 2 documents .* have no summary .* the first is 1"):
        load_documents(local(path, summary_column="summary"), "train", pairs=True)
    assert len(load_documents(local(path, summary_column="summary"), "train")) == 2


def test_who_shares_out_says_so(tmp_path):
    def said(name, *splits):
        return shared_out(local(tmp_path / name), *splits)

    for name in ("own.txt", "own.jsonl", "test.jsonl", "two/a.txt", "two/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert said("own.txt", "test") == "own.txt has no splits: its last tenth is the test split"
    assert said("own.txt", "train", "validation", "test") == (
        "own.txt has no splits: its first eight tenths are the train split, its last tenth but one is the "
        "validation split, its last tenth is the test split"
    )
    assert said("two", "train", "test") == (
        "a.txt and b.txt have no splits: the first eight tenths of each are the train split, "
        "the last tenth of each is the test split"
    )
    (tmp_path / "two" / "c.txt").write_text("text")
    assert said("two", "test") == "two has no splits: one document in ten is the test split"
    assert said("own.jsonl", "test") == (
        "own.jsonl has no splits: one document in ten (of one or two, the last tenth) is the test split"
    )
    assert said("test.jsonl", "test") is None
