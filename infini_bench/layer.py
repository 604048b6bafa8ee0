"""A decoder layer with a memory: Llama's, through which the memory's state goes as a value.

Shapes: B batch, T tokens, H heads, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from infini_bench.cache import MemoryCache
from infini_bench.memory import build_memory
from infini_bench.memory.base import Rope, State
from infini_bench.schema import MemoryConfig

if TYPE_CHECKING:
    from infini_bench.decoder import MemoryLlamaConfig


def rms_norm(config: MemoryLlamaConfig) -> Any:  # not the class that Llama says
    """Llama's norm as torch's, which a GPU computes in one launch each way in place of eight and more."""
    return nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class MemoryAttention(LlamaAttention):
    """Llama's projections around a ``Memory``."""

    def __init__(self, config: MemoryLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        depth = (layer_idx, config.num_hidden_layers)
        if config.qkv_bias:
            for name in ("q_proj", "k_proj", "v_proj"):
                plain = getattr(self, name)
                setattr(self, name, nn.Linear(plain.in_features, plain.out_features))
        self.memory = build_memory(MemoryConfig(**config.memory), heads, kv_heads, self.head_dim, *depth)

    def forward(  # type: ignore[override]
        self,
        x_BTC: Tensor,
        rope: Rope,
        state: State | None,
        mask_BT: Tensor | None,
        inside: bool = False,
    ) -> tuple[Tensor, State]:
        """(B, T, dim) and the state before -> (B, T, dim) and the state after; see `Memory.forward`."""
        shape = (*x_BTC.shape[:-1], -1, self.head_dim)
        q, k, v = (p(x_BTC).view(shape) for p in (self.q_proj, self.k_proj, self.v_proj))
        out, state = self.memory(q, k, v, rope, state, mask_BT, inside)
        return self.o_proj(out.flatten(2)), state


class MemoryDecoderLayer(LlamaDecoderLayer):
    """Llama's layer around `MemoryAttention`."""

    self_attn: MemoryAttention

    def __init__(self, config: MemoryLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.index, self.self_attn = layer_idx, MemoryAttention(config, layer_idx)
        self.input_layernorm = rms_norm(config)
        self.post_attention_layernorm = rms_norm(config)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Rope | None = None,
        past_key_values: MemoryCache | None = None,
        **_: Any,
    ) -> Tensor:
        """hidden_states (B, T, dim) -> (B, T, dim); the cache's layer gets the new state."""
        assert position_embeddings is not None
        layer = None if past_key_values is None else past_key_values.layers[self.index]
        state, taken = lowered(None if layer is None else layer.state, self.self_attn.memory.settled)
        given = hidden_states, position_embeddings, state, attention_mask
        if torch.compiler.is_compiling():  # by a larger graph: torch 2.11 loses a compiled body's self
            out, new = MemoryDecoderLayer.body(self, *given)
        else:
            out, new = self.body(*given)
        if layer is not None:
            layer.state = {**new, **{name: new[name] + count for name, count in taken.items()}}
        return out

    def body(
        self,
        x_BTC: Tensor,
        rope: Rope,
        state: State | None,
        mask_BT: Tensor | None,
        inside: bool = False,
    ) -> tuple[Tensor, State]:
        """The layer without its index, so that what ``torch.compile`` makes of it serves all layers."""
        mixed, new = self.self_attn(self.input_layernorm(x_BTC), rope, state, mask_BT, inside)
        x_BTC = x_BTC + mixed
        return x_BTC + self.mlp(self.post_attention_layernorm(x_BTC)), new

    def inside(self, x_B1C: Tensor, rope: Rope, state: State) -> tuple[Tensor, State]:
        """``body`` for a step of `decoding` inside a segment, with a name of its own to be compiled by."""
        return MemoryDecoderLayer.body(self, x_B1C, rope, state, None, True)


def lowered(state: State | None, settled: int | None) -> tuple[State | None, dict[str, int]]:
    """The state with counts as low as a memory with this ``settled`` lets them be, and what was taken off.

    A compiled layer is compiled anew for each value of an int.
    """
    if state is None or settled is None or not isinstance(state["done"], int):
        return state, {}
    taken = {"seen": state["seen"], "done": max(state["done"] - settled, 0)}
    return {**state, **{name: state[name] - count for name, count in taken.items()}}, taken
