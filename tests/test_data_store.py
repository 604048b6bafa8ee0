"""Token store and sequences: cached by content, damaged caches refused, every window once an epoch."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infini_bench.data import Document, Sequences, TokenStore, store, token_store
from infini_bench.data.tokenizers import ByteTokenizer
from infini_bench.errors import UserError
from infini_bench.schema import DataConfig

fixed = settings(derandomize=True, deadline=None)

DOCUMENTS = [Document("a", "A", "abcdefghij"), Document("b", "B", "ö p"), Document("c", "C", "x")]


@pytest.fixture
def config(tmp_path) -> DataConfig:
    return DataConfig(tokenizer="bytes", cache_dir=str(tmp_path))


class FakeStore:
    """Documents of the given lengths; token t of document d is 100 d + t."""

    def __init__(self, lengths):
        self.n_tokens, self.eos_id = np.array(lengths, np.int64), 7

    def __len__(self):
        return len(self.n_tokens)

    def tokens(self, i):
        return 100 * i + np.arange(self.n_tokens[i], dtype=np.uint16)


def test_store_holds_the_documents(config):
    tokens = token_store(config, DOCUMENTS, ByteTokenizer())
    assert (tokens.ids, tokens.titles, len(tokens)) == (["a", "b", "c"], ["A", "B", "C"], 3)
    assert tokens.n_tokens.tolist() == tokens.n_bytes.tolist() == [10, 4, 1]
    assert tokens.n_words.tolist() == [1, 2, 1]
    assert tokens.eos_id == 256
    assert [ByteTokenizer().decode(tokens.tokens(i)) for i in range(3)] == ["abcdefghij", "ö p", "x"]
    assert tokens.tokens(0).dtype == np.uint16 and not tokens.tokens(0).flags.writeable


def test_large_vocabularies_take_four_bytes(config):
    class Wide(ByteTokenizer):
        vocab_size = 70_000
        fingerprint = "wide"

        def encode(self, text):
            return super().encode(text) + 69_000

    tokens = token_store(config, DOCUMENTS, Wide())
    assert tokens.tokens(2).dtype == np.uint32 and tokens.tokens(2).tolist() == [69_000 + ord("x")]


def test_store_is_built_once_and_again_when_anything_changes(config, monkeypatch):
    class Other(ByteTokenizer):
        fingerprint = "other"

    first = token_store(config, DOCUMENTS, ByteTokenizer()).fingerprint
    changed = [Document("a", "New title", "abcdefghij"), *DOCUMENTS[1:]]
    others = [
        token_store(config, changed, ByteTokenizer()).fingerprint,
        token_store(config, DOCUMENTS[::-1], ByteTokenizer()).fingerprint,
        token_store(config, DOCUMENTS, Other()).fingerprint,
    ]
    with monkeypatch.context() as patch:
        patch.setattr(store, "FORMAT", store.FORMAT + 1)
        others.append(token_store(config, DOCUMENTS, ByteTokenizer()).fingerprint)
    assert len({first, *others}) == 5
    monkeypatch.setattr(store, "_build", None)  # would fail if it were called
    assert token_store(config, DOCUMENTS, ByteTokenizer()).fingerprint == first


def test_an_interrupted_build_leaves_nothing(config, tmp_path):
    class Failing(ByteTokenizer):
        def encode(self, text):
            if text == "x":
                raise KeyboardInterrupt
            return super().encode(text)

    with pytest.raises(KeyboardInterrupt):
        token_store(config, DOCUMENTS, Failing())
    assert list((tmp_path / "tokens").iterdir()) == []


def _cut(folder):
    (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-1])


def _flip(folder):
    content = bytearray((folder / "tokens.bin").read_bytes())
    content[3] ^= 1
    (folder / "tokens.bin").write_bytes(content)


def _edit(key, value):
    def edit(folder):
        index = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps({**index, key: value}))

    return edit


DAMAGES = {
    "cut": _cut,
    "flipped": _flip,
    "no tokens": lambda folder: (folder / "tokens.bin").unlink(),
    "no index": lambda folder: (folder / "index.json").unlink(),
    "broken index": lambda folder: (folder / "index.json").write_text('{"ids": ['),
    "other index": lambda folder: (folder / "index.json").write_text("[]"),
    "lost title": _edit("titles", ["A", "B"]),
    "other lengths": _edit("n_tokens", [10, 4]),
    "other type": _edit("dtype", "float99"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_cache_is_named_and_not_used(config, tmp_path, damage):
    name = token_store(config, DOCUMENTS, ByteTokenizer()).fingerprint
    folder = tmp_path / "tokens" / name
    damage(folder)
    with pytest.raises(UserError, match=rf"{name} is damaged .* delete that folder"):
        token_store(config, DOCUMENTS, ByteTokenizer())
    shutil.rmtree(folder)
    assert token_store(config, DOCUMENTS, ByteTokenizer()).tokens(2).tolist() == [ord("x")]
    assert TokenStore(folder).fingerprint == name


def test_windows_by_hand():
    sequences = Sequences(FakeStore([10, 4, 1, 2]), length=4, seed=0)
    assert len(sequences) == 3 + 1 + 0 + 1
    tokens, weights = sequences.rows(0, 5)
    assert tokens.dtype == np.int64 and weights.dtype == np.float32
    rows = {row[0]: (row.tolist(), weight.tolist()) for row, weight in zip(tokens, weights, strict=True)}
    assert rows == {
        0: ([0, 1, 2, 3, 4], [1, 1, 1, 1]),
        4: ([4, 5, 6, 7, 8], [1, 1, 1, 1]),
        8: ([8, 9, 7, 7, 7], [1, 0, 0, 0]),
        100: ([100, 101, 102, 103, 7], [1, 1, 1, 0]),
        300: ([300, 301, 7, 7, 7], [1, 0, 0, 0]),
    }


shapes = {
    "lengths": st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda found: max(found) > 1),
    "length": st.integers(1, 12),
    "seed": st.integers(0, 5),
}


@given(**shapes, epoch=st.integers(0, 3))
@fixed
def test_every_token_is_a_target_once_an_epoch(lengths, length, seed, epoch):
    sequences = Sequences(FakeStore(lengths), length, seed)
    tokens, weights = sequences.rows(epoch * len(sequences), len(sequences))
    targets = sorted(tokens[:, 1:][weights == 1].tolist())
    assert targets == [100 * d + t for d, count in enumerate(lengths) for t in range(1, count)]
    assert (weights.sum(1) >= 1).all()
    assert (tokens[:, 1:][weights == 0] == 7).all()


@given(**shapes, cursor=st.integers(0, 60), first=st.integers(0, 9), second=st.integers(0, 9))
@fixed
def test_two_cursors_make_one(lengths, length, seed, cursor, first, second):
    whole = Sequences(FakeStore(lengths), length, seed).rows(cursor, first + second)
    resumed = Sequences(FakeStore(lengths), length, seed)
    parts = [
        resumed.rows(cursor, first),
        Sequences(FakeStore(lengths), length, seed).rows(cursor + first, second),
    ]
    for i in range(2):
        assert np.array_equal(whole[i], np.concatenate([part[i] for part in parts]))


def test_epochs_and_seeds_differ():
    sequences = Sequences(FakeStore([400]), length=4, seed=0)
    first, second = sequences.rows(0, 100)[0], sequences.rows(100, 100)[0]
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, Sequences(FakeStore([400]), length=4, seed=1).rows(0, 100)[0])
    assert np.array_equal(first, sequences.rows(0, 100)[0])  # back to an earlier epoch


def test_nothing_to_train_on():
    with pytest.raises(UserError, match="too short"):
        Sequences(FakeStore([1, 0, 1]), length=4, seed=0)
    with pytest.raises(UserError, match="at least 1 token"):
        Sequences(FakeStore([10]), length=0, seed=0)
