"""The subject of this package: what an attention layer keeps of the tokens it has left behind."""

from dataclasses import replace

from infini_bench import outside
from infini_bench.errors import UserError
from infini_bench.memory.base import Memory, State
from infini_bench.memory.compressed import CompressedMemory
from infini_bench.memory.compressive import CompressiveMemory
from infini_bench.memory.full import FullMemory
from infini_bench.memory.knn import KnnMemory
from infini_bench.memory.local import KernelMemory, SparseMemory
from infini_bench.memory.retrieval import RetrievalMemory
from infini_bench.memory.tokens import AssociativeTokens, AutoCompressor, RecurrentTokens, TokenMemory
from infini_bench.memory.window import SinkMemory, WindowMemory
from infini_bench.rules import check_memory
from infini_bench.schema import (
    BACKENDS,
    COMPRESSIONS,
    FEATURES,
    INDEXES,
    LOCALS,
    MEMORY_KINDS,
    NORMALISERS,
    UPDATES,
    MemoryConfig,
)
from infini_bench.units import suggest

KINDS: dict[str, type[Memory]] = {
    "compressive": CompressiveMemory,
    "block": WindowMemory,
    "xl": WindowMemory,
    "sliding": WindowMemory,
    "full": FullMemory,
    "knn": KnnMemory,
    "retrieval": RetrievalMemory,
    "compressed": CompressedMemory,
    "sink": SinkMemory,
    "sparse": SparseMemory,
    "kernel": KernelMemory,
    # inside a segment, attention is full: the memory is the whole model's
    "rmt": FullMemory,
    "armt": FullMemory,
    "autocompressor": FullMemory,
}
TOKENS: dict[str, type[TokenMemory]] = {
    "rmt": RecurrentTokens,
    "armt": AssociativeTokens,
    "autocompressor": AutoCompressor,
}


def build_memory(
    cfg: MemoryConfig, heads: int, kv_heads: int, head_dim: int, layer: int = 0, layers: int = 1
) -> Memory:
    """The memory of attention layer ``layer`` of ``layers``; only here ``memory.kind`` becomes code."""
    for name, value, known in (
        ("kind", cfg.kind, MEMORY_KINDS),
        ("update", cfg.update, UPDATES),
        ("features", cfg.features, FEATURES),
        ("normaliser", cfg.normaliser, NORMALISERS),
        ("local", cfg.local, LOCALS),
        ("compression", cfg.compression, COMPRESSIONS),
        ("index", cfg.index, INDEXES),
        ("backend", cfg.backend, BACKENDS),
    ):
        if value not in known and not (name == "kind" and outside.is_outside(value)):
            raise UserError(
                f"There is no memory.{name}={value}{suggest(value, known)}; known: {', '.join(known)}."
            )
    if not isinstance(cfg.segment, int) or cfg.segment < 1:
        raise UserError(f"memory.segment is a number of tokens, at least 1, not {cfg.segment!r}.")
    check_memory(cfg)
    if cfg.layers is not None:
        if max(cfg.layers) >= layers:
            raise UserError(f"memory.layers={cfg.layers}: the last of the {layers} layers is {layers - 1}.")
        if layer not in cfg.layers:
            cfg = replace(cfg, kind="block")
    if cfg.options and not outside.is_outside(cfg.kind):
        raise UserError(f"memory.options are of a memory outside infini-bench; {cfg.kind} takes none.")
    if cfg.kind == "knn" and layer != knn_layer(cfg, layers):
        cfg = replace(cfg, kind="xl")
    memory = memory_class(cfg.kind)(cfg, heads, kv_heads, head_dim)
    memory.must(isinstance(memory.state_floats(), int), "state_floats", "a whole number")
    return memory


def memory_class(kind: str) -> type[Memory]:
    """The class of a kind, or the user's own (see `infini_bench.outside`)."""
    found = outside.resolve(kind) if outside.is_outside(kind) else KINDS[kind]
    if not (isinstance(found, type) and issubclass(found, Memory)):
        raise UserError(f"memory.kind={kind} is no subclass of infini_bench.memory.Memory.")
    for name in ("start", "segments", "state_floats"):
        if getattr(found, name) is getattr(Memory, name):
            words = f"memory.kind={kind} lacks the method {name}"
            raise UserError(f"{words}; infini_bench/memory/base.py says what it gives.")
    return found


def build_tokens(cfg: MemoryConfig, dim: int, layers: int) -> TokenMemory | None:
    """The memory of a whole model of width ``dim``; None for the kinds that live in the attention layers."""
    if cfg.kind not in TOKENS:
        return None
    if cfg.layers is not None:
        raise UserError(f"memory.layers cannot be set: {cfg.kind} is the memory of the whole model.")
    for name in ("tokens", "key_size"):
        value = getattr(cfg, name)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"memory.{name} is a number, at least 1, not {value!r}.")
    return TOKENS[cfg.kind](cfg, dim, layers)


def knn_layer(cfg: MemoryConfig, layers: int) -> int:
    """The one layer, from 0, that looks up neighbours; unset: at 3/4 of the depth, the 9th of 12."""
    layer = -(-3 * layers // 4) - 1 if cfg.layer is None else cfg.layer
    if not 0 <= layer < layers:
        raise UserError(f"memory.layer={layer} is none of the {layers} layers, which count from 0.")
    return layer


__all__ = [
    "KINDS",
    "TOKENS",
    "CompressedMemory",
    "CompressiveMemory",
    "FullMemory",
    "KernelMemory",
    "KnnMemory",
    "Memory",
    "RetrievalMemory",
    "SinkMemory",
    "SparseMemory",
    "State",
    "TokenMemory",
    "WindowMemory",
    "build_memory",
    "build_tokens",
]
