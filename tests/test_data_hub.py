"""Hub sets, on local copies of the columns of the three that we name, and on a proof-pile."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infini_bench.cli.bridge import compose_run
from infini_bench.data import Document, Summary, load_documents
from infini_bench.errors import UserError
from infini_bench.schema import DataConfig

PG19 = [
    {
        "short_book_title": f"Book {i}",
        "publication_date": 1900 + i,
        "url": f"http://x/{i}",
        "text": f"text {i}",
    }
    for i in range(3)
]
FULLBOOKS = [
    {
        "bid": bid,
        "source": source,
        "title": f"Book {bid}",
        "book": f"text {bid}",
        "summary": f"{source} on {bid}",
    }
    for bid, source in [(1, "novelguide"), (1, "cliffnotes"), (2, "cliffnotes")]
]
CLEANED = [
    {
        "bid": bid,
        "title": f"Book {bid}",
        "text": f"text {bid}",
        "summary": [{"source": source, "text": f"{source} on {bid}"} for source in sources],
    }
    for bid, sources in {1: ["a", "b"], 2: ["a"]}.items()
]
PROOF_PILE = [
    {"text": f"text {i}", "meta": json.dumps({"config": config, "file": "x"})}
    for i, config in enumerate(["arxiv", "wiki", "arxiv"])
]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that writes rows as a data set with the given names of splits and returns its address."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()

    def write(rows, splits=("train", "validation", "test"), config="default"):
        files = [{"split": split, "path": f"{config}/{split}-*.parquet"} for split in splits]
        folder = tmp_path / "set"
        for split in splits:
            (folder / config).mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), folder / config / f"{split}-00000-of-00001.parquet")
        header = json.dumps({"configs": [{"config_name": config, "data_files": files}]})
        (folder / "README.md").write_text(f"---\n{header}\n---\n")
        return {"source": "hub", "hub_id": str(folder)}

    return write


def local_copy(address, config="default", **settings) -> DataConfig:
    return DataConfig(source="local", path=f"{address['hub_id']}/{config}", **settings)


def test_pg19(hub):
    address, settings = hub(PG19), {"title_column": "short_book_title"}
    documents = load_documents(DataConfig(**address, **settings), "validation")
    assert documents == [Document(str(i), f"Book {i}", f"text {i}") for i in range(3)]
    assert load_documents(local_copy(address, **settings), "validation") == documents
    assert load_documents(DataConfig(**address, **settings, max_documents=2), "test") == documents[:2]


def test_booksum_fullbooks(hub):
    address = hub(FULLBOOKS)
    settings = dict(text_column="book", id_column="bid", title_column="title", summary_column="summary")
    documents = load_documents(DataConfig(**address, **settings), "test", pairs=True)
    assert [document.id for document in documents] == ["1", "2"]
    assert documents[0].summaries == (
        Summary("summary", "novelguide on 1"),
        Summary("summary", "cliffnotes on 1"),
    )
    assert load_documents(local_copy(address, **settings), "test", pairs=True) == documents


@pytest.mark.parametrize(
    ("name", "rows", "config", "sources"),
    [
        ("booksum_fullbooks", FULLBOOKS, "default", [["summary", "summary"], ["summary"]]),
        ("booksum_cleaned", CLEANED, "books", [["a", "b"], ["a"]]),
    ],
)
def test_our_configs_of_the_booksum_sets_read_their_columns(hub, name, rows, config, sources):
    """One document a book with all its summaries, also where rows are pairs and no id is asked for."""
    data = compose_run(["task=booksum", f"data={name}"]).data
    data.hub_id = hub(rows, config=config)["hub_id"]
    documents = load_documents(data, "test", pairs=True)
    assert [document.text for document in documents] == ["text 1", "text 2"]
    assert [[summary.source for summary in document.summaries] for document in documents] == sources
    data.max_documents = 1
    assert load_documents(data, "test", pairs=True) == documents[:1]


def test_booksum_complete_cleaned(hub):
    address = hub(CLEANED, config="books")
    settings = dict(hub_config="books", id_column="bid", title_column="title", summary_column="summary")
    documents = load_documents(DataConfig(**address, **settings), "train", pairs=True)
    assert [document.title for document in documents] == ["Book 1", "Book 2"]
    assert documents[0].summaries == (Summary("a", "a on 1"), Summary("b", "b on 1"))
    assert load_documents(local_copy(address, "books", **settings), "train", pairs=True) == documents


def test_proof_pile(hub):
    config = DataConfig(**hub(PROOF_PILE), filter={"meta.config": "arxiv"})
    assert [document.text for document in load_documents(config, "train")] == ["text 0", "text 2"]
    config.filter = {"meta.config": "arxif"}
    with pytest.raises(UserError, match=r"no row of .* passes data.filter"):
        load_documents(config, "train")


def test_other_split_names_and_missing_ones(hub):
    config = DataConfig(**hub(PG19, splits=("train", "dev")))
    assert len(load_documents(config, "validation")) == 3
    with pytest.raises(UserError, match="has no test split; it has: train, dev"):
        load_documents(config, "test")


def test_rows_without_text_are_counted(hub, caplog):
    config = DataConfig(**hub([*PG19, {**PG19[0], "text": " "}]))
    assert len(load_documents(config, "train")) == 3
    assert "left out 1 rows without text" in caplog.text


def test_missing_column(hub):
    with pytest.raises(
        UserError, match=r'no column "title"; set data.title_column to one of: short_book_title'
    ):
        load_documents(DataConfig(**hub(PG19), title_column="title"), "train")


def test_missing_configuration(hub):
    with pytest.raises(UserError, match=r"cannot load .* 'film'"):
        load_documents(DataConfig(**hub(CLEANED, config="books"), hub_config="film"), "train")


def test_no_network_says_what_to_do(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'emozilla/pg19' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"Couldn't reach .* offline, download .* data=local data.path="):
        load_documents(DataConfig(source="hub", hub_id="emozilla/pg19"), "train")
    with pytest.raises(UserError, match=r"needs data\.hub_id="):
        load_documents(DataConfig(source="hub"), "train")
