"""Installed peers, timed in the same run as our model at equal sizes (``task.vs``, ``--vs``).

What there is: ``infini-transformer-pytorch``, with our vocabulary, width, layers, heads, head size, segment
and batch, and its delta rule where ours is one. Used as its own wrapper does:

* inference: segment by segment with the memories passed on, without gradient. It computes logits of every
  token, so for the ratio ours are computed for every token, too, in calls of ``task.chunk``.
* training: its wrapper's forward and backward, with its own default of cutting gradients every second
  segment (ours go through all of them), then the same optimizer's update.

bf16 on a GPU through autocast, with float32 weights. Its rotary embedding, norms and feed-forward are its
own. The others of KNOWN cannot be timed yet, installed or not.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from infini_bench.errors import UserError

from .base import Row
from .efficiency_model import Calls, Found, Subject, in_turns, sizes
from .footprint import head_size

KNOWN = {  # package -> the module that it installs
    "infini-transformer-pytorch": "infini_transformer_pytorch",
    "flash-linear-attention": "fla",
    "memorizing-transformers-pytorch": "memorizing_transformers_pytorch",
    "recurrent-memory-transformer-pytorch": "recurrent_memory_transformer_pytorch",
}


class InfiniTransformerPeer(Subject):
    """infini-transformer-pytorch at the sizes of a configuration."""

    def __init__(self, task: Any):
        from infini_transformer_pytorch import InfiniTransformer, InfiniTransformerWrapper

        cfg, body = task.cfg, task.cfg.decoder
        model = InfiniTransformer(
            num_tokens=cfg.data.vocab_size,
            dim=body.dim,
            depth=body.layers,
            heads=body.heads,
            dim_head=head_size(cfg),
            use_mem_delta_rule=cfg.memory.update != "linear",
        )
        self.wrapper = InfiniTransformerWrapper(model, segment_length=cfg.memory.segment).to(task.device)
        super().__init__(task, model)

    def prepare(self, mode: str) -> None:
        self.model.train(mode == "train")
        self.step = self.training() if mode == "train" else None

    def calls(self, mode: str, tokens: int) -> Calls:
        if mode == "train":
            return super().calls(mode, tokens)
        parts = sizes(tokens, self.task.cfg.memory.segment)
        return lambda: self.read(parts), lambda: self.read(parts[:2])

    @torch.no_grad()
    def read(self, parts: list[int]) -> None:
        memories = None
        with self.autocast():
            for size in parts:
                given = {"past_memories": memories, "return_new_memories": True}
                memories = self.model(self.ids(size), **given).past_memories

    def training(self) -> Callable[[int], None]:
        optimizer = torch.optim.AdamW(self.model.parameters(), self.task.cfg.trainer.lr)

        def step(tokens: int) -> None:
            with torch.enable_grad(), self.autocast():
                self.wrapper(self.ids(tokens + 1), backward=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def after(self, tokens: int, times: Any, found: Found) -> None:
        """It carries no state that could be counted or decoded from by a call."""


PEERS: dict[str, type[InfiniTransformerPeer]] = {"infini-transformer-pytorch": InfiniTransformerPeer}


def check_peers(names: list[str]) -> None:
    """Raises UserError, before any work, for a peer that cannot be timed here."""
    for name in names:
        if name not in PEERS:
            raise UserError(f"{name} cannot be timed yet; --vs knows {', '.join(PEERS)}.")
        if find_spec(KNOWN[name]) is None:
            raise UserError(f"{name} is not installed; run `pip install {name}`, or leave it out of --vs.")


def measure_peers(own: Subject) -> list[Row]:
    """Rows of each peer alone, ours out of the way, and the ratios in turns: its time over ours."""
    task, rows = own.task, []
    modes: list[str] = [mode for mode in ("train", "forward") if mode in own.modes]
    for name in task.task.vs:
        columns: dict[str, Any] = {"condition": task.shape, "extra": {"variant": name}}
        cfg = task.cfg
        if cfg.memory.kind != "compressive" or cfg.decoder.kv_heads not in (None, cfg.decoder.heads):
            why = f"{name} has a compressive memory and a KV head a query head; {cfg.model} has not"
            rows.append(task.missing("ratio_to_peer_inference", why, length=task.lengths[0], **columns))
            continue
        own.model.to("cpu")
        peer = PEERS[name](task)
        peer.modes = modes
        for mode, by_length in peer.climb().items():
            for tokens, times in by_length.items():
                rows += task.timed(mode, times, tokens, None, length=tokens, **columns)
        own.model.to(task.device)
        mine = Subject(task, own.model, every=True)
        for mode, tokens, pair in in_turns(mine, peer, modes):
            metric = f"ratio_to_peer_{'inference' if mode == 'forward' else mode}"
            found = pair if isinstance(pair, str) else pair[::-1]
            rows += task.ratio(metric, found, length=tokens, **columns)
    return rows
