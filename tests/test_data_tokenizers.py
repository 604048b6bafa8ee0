"""Tokenizers: there and back, digits, pieces, cache, save and load, bad input."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from infini_bench.data import Tokenizer, build_tokenizer, load_documents
from infini_bench.data import tokenizers as module
from infini_bench.data.tokenizers import BPETokenizer, ByteTokenizer, _pieces, _train_bpe
from infini_bench.errors import UserError
from infini_bench.schema import DataConfig

fixed = settings(derandomize=True, deadline=None)

TEXT = "The quick brown fox, the lazy dog and the 12345 geese.\n\n\tNaïve café, 日本語 text.\r\n" * 20


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return BPETokenizer(_train_bpe([TEXT], 400), "bpe-400")


@fixed
@given(st.text())
def test_bytes_there_and_back(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text).dtype == np.int32 and len(tokenizer.encode(text)) == len(text.encode())


def test_bytes_that_are_no_text():
    assert ByteTokenizer().decode([104, 105, 256, 255, 256]) == "hi\ufffd"
    assert (ByteTokenizer().vocab_size, ByteTokenizer().eos_id) == (257, 256)


def test_bpe_there_and_back(bpe):
    @fixed
    @given(st.text())
    def check(text):
        assert bpe.decode(bpe.encode(text)) == text

    check()
    assert bpe.decode(bpe.encode(TEXT)) == TEXT
    assert bpe.encode(TEXT).dtype == np.int32
    assert bpe.encode("").shape == (0,)


def test_every_digit_is_one_token(bpe):
    for number in ("7", "12345", "90210"):
        ids = bpe.encode(number)
        assert [bpe.decode([i]) for i in ids] == list(number)
        with_space = bpe.encode(f"is {number}.")
        assert [i for i in with_space if bpe.decode([i]).isdigit()] == list(ids)


def test_eos_never_comes_from_text(bpe):
    ids = bpe.encode("a <|eos|> b")
    assert bpe.eos_id not in ids and bpe.decode(ids) == "a <|eos|> b"
    assert bpe.decode([bpe.eos_id, *bpe.encode("a"), bpe.eos_id]) == "a"
    assert bpe.eos_id < bpe.vocab_size <= 400


def test_pieces_change_nothing(bpe, monkeypatch):
    whole = _encode_in_pieces(bpe, 10**9, monkeypatch)
    for size in (1, 2, 3, 7, 50):
        assert np.array_equal(_encode_in_pieces(bpe, size, monkeypatch), whole)


def _encode_in_pieces(tokenizer, size, monkeypatch):
    monkeypatch.setattr(module, "PIECE", size)
    monkeypatch.setattr(module, "BATCH", 3)
    return tokenizer.encode(TEXT + "  two  spaces 12 3\n \n end " + "x" * 100)


@fixed
@given(st.text(alphabet="ab 1\n", max_size=60))
def test_pieces_are_the_text(text):
    assert "".join(_pieces(text)) == text


def test_training_is_cached_by_content(tmp_path):
    calls = []

    def texts():
        calls.append(1)
        return iter([TEXT])

    config = DataConfig(tokenizer="bpe", vocab_size=300, cache_dir=str(tmp_path))
    first = build_tokenizer(config, texts)
    assert (first.name, first.vocab_size, len(calls)) == ("bpe-300", 300, 2)
    again = build_tokenizer(config, texts)
    assert again.fingerprint == first.fingerprint and len(calls) == 3
    config.vocab_size = 301
    assert build_tokenizer(config, texts).fingerprint != first.fingerprint
    other = build_tokenizer(config, lambda: [TEXT + "more"])
    assert len(list((tmp_path / "tokenizers").iterdir())) == 3
    assert other.decode(other.encode(TEXT)) == TEXT


def test_training_text_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "TRAINING_CHARACTERS", 10)
    assert list(module._limited(["12345678", "abcdefgh", "never"])) == ["12345678", "ab"]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_save_and_load(tmp_path, kind, bpe):
    tokenizer = ByteTokenizer() if kind == "bytes" else bpe
    tokenizer.save(tmp_path / "t")
    loaded = Tokenizer.load(tmp_path / "t")
    for name in ("name", "fingerprint", "vocab_size", "eos_id"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    assert np.array_equal(loaded.encode(TEXT + "<|eos|>"), tokenizer.encode(TEXT + "<|eos|>"))
    # A saved one is also a local tokenizer.
    config = DataConfig(tokenizer=str(tmp_path / "t"))
    assert build_tokenizer(config, lambda: []).fingerprint == tokenizer.fingerprint


def test_pretrained_folder(tmp_path, bpe):
    backend = _train_bpe([TEXT], 300)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>").save_pretrained(tmp_path / "hf")
    tokenizer = build_tokenizer(DataConfig(tokenizer=str(tmp_path / "hf")), lambda: [])
    assert tokenizer.name == str(tmp_path / "hf")
    assert tokenizer.vocab_size == 300 and tokenizer.eos_id == 0
    assert tokenizer.decode([*tokenizer.encode(TEXT), tokenizer.eos_id]) == TEXT
    texts = [TEXT[:n] for n in range(40)]
    assert [*map(list, tokenizer.encode_all(texts))] == [list(tokenizer.encode(text)) for text in texts]
    tokenizer.save(tmp_path / "saved")
    loaded = Tokenizer.load(tmp_path / "saved")
    assert (loaded.name, loaded.fingerprint) == (tokenizer.name, tokenizer.fingerprint)
    assert tokenizer.fingerprint != bpe.fingerprint
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "no-eos")
    with pytest.raises(UserError, match="no end-of-text token"):
        build_tokenizer(DataConfig(tokenizer=str(tmp_path / "no-eos")), lambda: [])


def test_unreachable_tokenizer_says_what_to_do(monkeypatch):
    def fail(name):
        raise OSError("We couldn't connect to the hub.\nmore")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    message = (
        r'cannot load the tokenizer "bpee" \(did you mean "bpe"\?\): We couldn.t connect .* offline, pass'
    )
    with pytest.raises(UserError, match=message):
        build_tokenizer(DataConfig(tokenizer="bpee"), lambda: [])


def test_damaged_folders_are_named(tmp_path, bpe):
    bpe.save(tmp_path)
    with pytest.raises(UserError, match=r"infini_tokenizer\.json is missing"):
        Tokenizer.load(tmp_path / "no")
    for content in ("{}", '{"added_tokens": []', ""):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=r"tokenizer\.json is"):
            Tokenizer.load(tmp_path)
    (tmp_path / "infini_tokenizer.json").write_text(json.dumps(["bpe"]))
    with pytest.raises(UserError, match="names no tokenizer"):
        Tokenizer.load(tmp_path)


def test_vocabulary_too_small():
    with pytest.raises(UserError, match="vocab_size=256 is too small"):
        build_tokenizer(DataConfig(vocab_size=256), lambda: [TEXT])


def test_real_text_shrinks(tmp_path):
    play = load_documents(DataConfig(), "validation")[0].text[:60_000]
    tokenizer = build_tokenizer(DataConfig(vocab_size=1024, cache_dir=str(tmp_path)), lambda: [play])
    ids = tokenizer.encode(play)
    assert tokenizer.decode(ids) == play
    assert len(play) / len(ids) > 2.5
