"""From texts to training rows: ``load_documents``, ``build_tokenizer``, ``token_store``, ``Sequences``."""

from infini_bench.data.documents import Document, Summary, fingerprint
from infini_bench.data.sequences import Sequences
from infini_bench.data.sources import load_documents
from infini_bench.data.store import TokenStore, token_store
from infini_bench.data.symbols import SymbolTokenizer
from infini_bench.data.tokenizers import Tokenizer, build_tokenizer

__all__ = [
    "Document",
    "Sequences",
    "Summary",
    "SymbolTokenizer",
    "TokenStore",
    "Tokenizer",
    "build_tokenizer",
    "fingerprint",
    "load_documents",
    "token_store",
]
