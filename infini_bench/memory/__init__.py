"""The subject of this package: what an attention layer keeps of the tokens it has left behind."""

from dataclasses import replace

from infini_bench.errors import UserError
from infini_bench.memory.base import Memory, State
from infini_bench.memory.compressive import CompressiveMemory
from infini_bench.memory.full import FullMemory
from infini_bench.memory.knn import KnnMemory
from infini_bench.memory.window import WindowMemory
from infini_bench.schema import BACKENDS, FEATURES, MEMORY_KINDS, UPDATES, MemoryConfig
from infini_bench.units import suggest

KINDS: dict[str, type[Memory]] = {
    "compressive": CompressiveMemory,
    "block": WindowMemory,
    "xl": WindowMemory,
    "sliding": WindowMemory,
    "full": FullMemory,
    "knn": KnnMemory,
}


def build_memory(
    cfg: MemoryConfig, heads: int, kv_heads: int, head_dim: int, layer: int = 0, layers: int = 1
) -> Memory:
    """The memory of attention layer ``layer`` of ``layers``; only here ``memory.kind`` becomes code."""
    for name, value, known in (
        ("kind", cfg.kind, MEMORY_KINDS),
        ("update", cfg.update, UPDATES),
        ("features", cfg.features, FEATURES),
        ("backend", cfg.backend, BACKENDS),
    ):
        if value not in known:
            raise UserError(
                f"There is no memory.{name}={value}{suggest(value, known)}; known: {', '.join(known)}."
            )
    if not isinstance(cfg.segment, int) or cfg.segment < 1:
        raise UserError(f"memory.segment is a number of tokens, at least 1, not {cfg.segment!r}.")
    if cfg.kind == "knn" and layer != knn_layer(cfg, layers):
        cfg = replace(cfg, kind="xl")
    return KINDS[cfg.kind](cfg, heads, kv_heads, head_dim)


def knn_layer(cfg: MemoryConfig, layers: int) -> int:
    """The one layer, from 0, that looks up neighbours; unset: at 3/4 of the depth, the 9th of 12."""
    layer = -(-3 * layers // 4) - 1 if cfg.layer is None else cfg.layer
    if not 0 <= layer < layers:
        raise UserError(f"memory.layer={layer} is none of the {layers} layers, which count from 0.")
    return layer


__all__ = [
    "KINDS",
    "CompressiveMemory",
    "FullMemory",
    "KnnMemory",
    "Memory",
    "State",
    "WindowMemory",
    "build_memory",
]
