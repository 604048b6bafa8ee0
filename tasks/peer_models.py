"""Models of installed packages at the sizes of a configuration, as `efficiency_peers` times them.

Each is used as its own wrapper or examples use it, with our vocabulary, width, layers, heads, head size,
segment, batch and optimizer, and its own norms, position embeddings and feed-forward. All have two tables for
input and output embeddings, as ours with ``decoder.tie_embeddings=false``. Their names are PEERS.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor, nn

from infini_bench.memory import knn_layer

from .efficiency_model import Calls, Found, Subject, sizes
from .footprint import head_size


class Peer(Subject):
    """A package's model at the sizes of a configuration.

    module: what the package installs; install: what pip is given; kind: ``memory.kind`` of its match here;
    groups: its KV heads, None = as many as query heads.
    """

    module: str
    install: str
    kind: str
    groups: int | None = None

    def __init__(self, task: Any):
        super().__init__(task, self.build(task.cfg).to(task.device))
        self.segment = task.cfg.memory.segment

    @classmethod
    def unlike(cls, cfg: Any) -> str:
        """Why its model is no match of ours; empty if it is."""
        body = cfg.decoder
        if cfg.memory.kind != cls.kind:
            return f"has a memory of kind {cls.kind}; model={cfg.model} has one of kind {cfg.memory.kind}"
        if (body.kv_heads or body.heads) != (cls.groups or body.heads):
            return f"has {cls.groups or body.heads} KV head(s); set decoder.kv_heads={cls.groups or 'null'}"
        return ""

    @abstractmethod
    def build(self, cfg: Any) -> nn.Module:
        """Its model, and what else it takes to run it."""

    @abstractmethod
    def document(self, parts: list[int]) -> None:
        """Logits of all tokens of a document, in segments of so many."""

    @abstractmethod
    def learn(self, ids_BT1: Tensor) -> None:
        """Gradients of the loss over a document, under autocast where it wants it."""

    def prepare(self, mode: str) -> None:
        self.model.zero_grad(set_to_none=True)
        self.model.train(mode == "train")
        self.step = self.training() if mode == "train" else None

    def calls(self, mode: str, tokens: int) -> Calls:
        if mode == "train":
            return super().calls(mode, tokens)
        parts = sizes(tokens, self.segment)
        return lambda: self.read(parts), lambda: self.read(parts[:2])

    @torch.no_grad()
    def read(self, parts: list[int]) -> None:
        with self.autocast():
            self.document(parts)

    def training(self) -> Callable[[int], None]:
        optimizer = torch.optim.AdamW(self.model.parameters(), self.task.cfg.trainer.lr)

        def step(tokens: int) -> None:
            with torch.enable_grad():
                self.learn(self.ids(tokens + 1))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def after(self, tokens: int, times: Any, found: Found) -> None:
        """It carries no state that could be counted or decoded from by a call."""


class InfiniTransformerPeer(Peer):
    """infini-transformer-pytorch, with its delta rule where ours is one. In training its own default cuts
    gradients every second segment; ours go through all of them."""

    module, install = "infini_transformer_pytorch", "infini-transformer-pytorch"
    kind = "compressive"

    def build(self, cfg: Any) -> nn.Module:
        from infini_transformer_pytorch import InfiniTransformer, InfiniTransformerWrapper

        model = InfiniTransformer(
            num_tokens=cfg.data.vocab_size,
            dim=cfg.decoder.dim,
            depth=cfg.decoder.layers,
            heads=cfg.decoder.heads,
            dim_head=head_size(cfg),
            use_mem_delta_rule=cfg.memory.update != "linear",
        )
        self.wrapper = InfiniTransformerWrapper(model, segment_length=cfg.memory.segment)
        return model

    def document(self, parts: list[int]) -> None:
        memories = None
        for size in parts:
            given = {"past_memories": memories, "return_new_memories": True}
            memories = self.model(self.ids(size), **given).past_memories

    def learn(self, ids_BT1: Tensor) -> None:
        with self.autocast():
            self.wrapper(ids_BT1, backward=True)


class RecurrentMemoryPeer(Peer):
    """recurrent-memory-transformer-pytorch: as many memory tokens, a feed-forward of our width, rotary
    positions, torch's fused attention; without its cached keys and hyper-connections, which the paper's model
    lacks. Gradients go through all segments (or ``memory.gradient_depth``), or by its memory replay where
    ours recompute (``trainer.checkpoint_segments``)."""

    module = "recurrent_memory_transformer_pytorch"
    install = "recurrent-memory-transformer-pytorch"
    kind = "rmt"

    def build(self, cfg: Any) -> nn.Module:
        from recurrent_memory_transformer_pytorch import (
            RecurrentMemoryTransformer,
            RecurrentMemoryTransformerWrapper,
        )

        body = cfg.decoder
        model = RecurrentMemoryTransformer(
            body.dim,
            num_tokens=cfg.data.vocab_size,
            depth=body.layers,
            num_memory_tokens=cfg.memory.tokens,
            seq_len=cfg.memory.segment,
            dim_head=head_size(cfg),
            heads=body.heads,
            ff_mult=1.5 * (hidden(cfg) + 0.5) / body.dim,  # it takes two thirds, and rounds down
            use_flash_attn=True,
            abs_pos_emb=False,
            rotary_pos_emb=True,
            use_xl_memories=False,
            num_residual_streams=1,
        )
        self.wrapper = RecurrentMemoryTransformerWrapper(model, truncate_at_step=cfg.memory.gradient_depth)
        return model

    def document(self, parts: list[int]) -> None:
        memories = None
        for size in parts:
            memories = self.model(self.ids(size), memories)[1]

    def learn(self, ids_BT1: Tensor) -> None:
        if self.task.cfg.trainer.checkpoint_segments:
            with self.autocast():
                self.wrapper(ids_BT1, memory_replay_backprop=True)
            return
        with self.autocast():
            loss = self.wrapper(ids_BT1, return_loss=True)[0]
        loss.backward()


class MemorizingPeer(Peer):
    """memorizing-transformers-pytorch: as many stored entries and neighbours in the same one layer, a cache
    of one segment in all layers, a feed-forward of as many weights as ours if that is a whole multiple of the
    width. Its search is faiss's approximate one (HNSW), on the CPU whatever the device, over a store that
    starts anew when it is full; it has one KV head. No gradient crosses a segment, as in ours."""

    module = "memorizing_transformers_pytorch"
    # what it asks for, faiss-gpu, has no wheel for today's Python; faiss-cpu is all that it calls
    install = "--no-deps memorizing-transformers-pytorch faiss-cpu einops einops-exts joblib filelock"
    kind = "knn"
    groups = 1

    def build(self, cfg: Any) -> nn.Module:
        from memorizing_transformers_pytorch import MemorizingTransformer

        body = cfg.decoder
        folder = mkdtemp()  # its store lies in files
        weakref.finalize(self, rmtree, folder, ignore_errors=True)
        model = MemorizingTransformer(
            num_tokens=cfg.data.vocab_size,
            dim=body.dim,
            depth=body.layers,
            dim_head=head_size(cfg),
            heads=body.heads,
            ff_mult=max(1, round(1.5 * hidden(cfg) / body.dim)),  # of its two matrices; ours are three
            memorizing_layers=(knn_layer(cfg.memory, body.layers) + 1,),
            max_knn_memories=cfg.memory.entries,
            num_retrieved_memories=cfg.memory.neighbours,
            xl_max_memories=cfg.memory.segment,
            pad_id=-1,  # every token counts
            knn_memories_directory=folder,
        )
        self.store = model.create_knn_memories(batch_size=cfg.task.batch)
        for memory in self.store:  # NumPy, where they go, knows no bf16
            memory.add, memory.search = (partial(exact, f) for f in (memory.add, memory.search))
        return model

    def document(self, parts: list[int]) -> None:
        self.store.clear_memory()
        recent = None
        for size in parts:
            recent = self.model(self.ids(size), self.store, xl_memories=recent)[1]

    def learn(self, ids_BT1: Tensor) -> None:
        self.store.clear_memory()
        recent, tokens = None, ids_BT1.shape[1] - 1
        pairs = zip(
            ids_BT1[:, :-1].split(self.segment, 1), ids_BT1[:, 1:].split(self.segment, 1), strict=True
        )
        for ids, labels in pairs:
            with self.autocast():
                loss, recent = self.model(ids, self.store, xl_memories=recent, labels=labels)
            (loss * (ids.shape[1] / tokens)).backward()


def exact(store: Callable[..., Any], x: Tensor, *more: Any) -> Any:
    return store(x.float(), *more)


def hidden(cfg: Any) -> int:
    """Units of our feed-forward."""
    return cfg.decoder.ffn or 4 * cfg.decoder.dim


PEERS: dict[str, type[Peer]] = {
    "infini-transformer-pytorch": InfiniTransformerPeer,
    "memorizing-transformers-pytorch": MemorizingPeer,
    "recurrent-memory-transformer-pytorch": RecurrentMemoryPeer,
}
