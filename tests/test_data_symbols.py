"""The vocabulary of synthetic tasks: disjoint from text, and the same after a save."""

import pytest

from infini_bench.data import SymbolTokenizer, Tokenizer
from infini_bench.data.tokenizers import ByteTokenizer
from infini_bench.errors import UserError


def test_symbols_lie_behind_the_text():
    tokens = SymbolTokenizer(5, ByteTokenizer())
    assert (tokens.first, tokens.vocab_size, tokens.eos_id) == (257, 262, 256)
    assert max(tokens.encode("any text at all\xff")) < tokens.first
    assert tokens.decode([*tokens.encode("a b"), 257, 261, 256, *tokens.encode("c")]) == "a b<0><4>c"


def test_without_text_there_is_nothing_to_encode():
    tokens = SymbolTokenizer(5)
    assert (tokens.first, tokens.vocab_size, tokens.eos_id, tokens.decode([0, 5, 4])) == (0, 6, 5, "<0><4>")
    with pytest.raises(UserError, match="reads symbols, no text"):
        tokens.encode("a")


@pytest.mark.parametrize("text", [None, ByteTokenizer()])
def test_saved_and_loaded(tmp_path, text):
    tokens = SymbolTokenizer(7, text)
    tokens.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert isinstance(again, SymbolTokenizer)
    names = ("symbols", "first", "vocab_size", "eos_id", "name", "fingerprint")
    assert [getattr(again, n) for n in names] == [getattr(tokens, n) for n in names]
    assert tokens.fingerprint not in (SymbolTokenizer(8, text).fingerprint, "")
    (tmp_path / "symbols.json").unlink()
    with pytest.raises(UserError, match=r"symbols\.json is missing"):
        Tokenizer.load(tmp_path)
