"""The subject of this package: what an attention layer keeps of the tokens it has left behind."""

from infini_bench.memory.base import Memory, State
from infini_bench.memory.compressive import CompressiveMemory
from infini_bench.memory.full import FullMemory
from infini_bench.memory.window import WindowMemory
from infini_bench.schema import MemoryConfig

KINDS: dict[str, type[Memory]] = {
    "compressive": CompressiveMemory,
    "block": WindowMemory,
    "xl": WindowMemory,
    "sliding": WindowMemory,
    "full": FullMemory,
}


def build_memory(cfg: MemoryConfig, heads: int, kv_heads: int, head_dim: int) -> Memory:
    """The memory of one attention layer. The only place that turns ``memory.kind`` into code."""
    return KINDS[cfg.kind](cfg, heads, kv_heads, head_dim)


__all__ = ["KINDS", "CompressiveMemory", "FullMemory", "Memory", "State", "WindowMemory", "build_memory"]
