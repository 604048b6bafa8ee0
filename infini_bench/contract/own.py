"""This package's memories, and the user's, under their contract in a small decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from infini_bench.cache import MemoryCache
from infini_bench.contract.subject import Store, Subject
from infini_bench.memory import TOKENS, build_memory
from infini_bench.memory.tokens import ZeroLinear
from infini_bench.models import build_model
from infini_bench.schema import DecoderConfig, MemoryConfig
from infini_bench.train.loss import SequenceLoss

DECODER = DecoderConfig(layers=2, dim=32, heads=4, kv_heads=2, ffn=48, init_std=0.2)


class OwnModel(Subject):
    """A decoder of two layers with grouped keys and weights large enough that outputs differ visibly."""

    def __init__(self, memory: MemoryConfig):
        super().__init__()
        # a loop through all layers is chaotic with large weights: any rounding grows, whatever the precision
        decoder = replace(DECODER, init_std=0.05) if memory.kind in TOKENS else DECODER
        self.model = build_model(decoder, memory, vocab_size=64)
        for module in self.model.modules():
            if isinstance(module, ZeroLinear):  # ARMT reads exactly 0 until it learns; its gradient is alive
                torch.nn.init.normal_(module.weight, std=0.05)
        parts = self.model.memories
        self.vocab, self.segment, self.chunk = 64, self.model.segment, 2048
        self.has_memory = self.model.has_memory
        self.differentiable = all(part.differentiable for part in parts)
        self.bounded = memory.kind not in ("full", "autocompressor", "retrieval")

    def forward(self, x: Tensor, state: MemoryCache | None = None) -> tuple[Tensor, MemoryCache]:
        logits, after = self.model.step(x, state)
        assert logits is not None
        return logits, after

    def floats(self, state: MemoryCache) -> int:
        return state.floats()

    def declared_floats(self) -> int:
        return self.model.state_floats()

    def padded(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=x, attention_mask=mask.long()).logits

    def restart(self, x: Tensor, state: MemoryCache, rows: Tensor) -> Tensor:
        state.reset_rows(rows)
        return self.forward(x, state)[0]

    def detached(self, x: Tensor, state: MemoryCache | None) -> tuple[Tensor, MemoryCache]:
        logits, after = self.forward(x, state)
        return logits, after.detach()

    def generate(self, prompt: Tensor, tokens: int) -> Tensor:
        model: Any = self.model
        out = model.generate(prompt, max_new_tokens=tokens, do_sample=False)
        return out[:, prompt.shape[1] :]

    def loss(self, ids: Tensor, kept: Tensor) -> Tensor:
        weights = kept[:, 1:].float() / kept[:, 1:].sum()
        return SequenceLoss(self.model)(ids, weights, weights)[0]

    def store(self, entries: int) -> Store:
        if self.model.memories[-1].cfg.kind != "knn":
            return super().store(entries)
        return knn_store(entries)


def knn_store(entries: int) -> Store:
    """The store of the look-up layer alone: its gate full open, one neighbour, one head."""
    size = 8
    cfg = MemoryConfig(kind="knn", segment=1, entries=entries, neighbours=1, gate_start=50.0)
    memory = build_memory(cfg, 1, 1, size)
    angle = torch.zeros(1, memory.span or 0, size)
    state: dict[str, Any] = {}

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Any]:
        q, k, v = (x[None, :, None] for x in (q, k, v))
        return memory(q, k, v, (angle.cos(), angle.sin()), state.get("now"))

    def write(keys: Tensor, values: Tensor) -> None:
        state["now"] = call(keys, keys, values)[1]

    def read(queries: Tensor) -> Tensor:
        nothing = torch.zeros_like(queries[:1])  # is written when its query has been answered: one at a time
        return torch.cat([call(query, nothing, nothing)[0][0, :, 0] for query in queries.split(1)])

    return Store(size, write, read)
