"""Installed peers, timed in the same run as our model at equal sizes (``task.vs``, ``--vs``).

What there is: ``infini-transformer-pytorch``, with our vocabulary, width, layers, heads, head size, segment and
batch, and its delta rule where ours is one. Used as its own wrapper does:

* inference: segment by segment with the memories passed on, without gradient. It computes logits of every
  token, so ours are computed for every token, too (rows with ``condition`` all_logits).
* training: its wrapper's forward and backward, with its own default of cutting gradients every second
  segment (ours go through all of them), then the same optimizer's update.

bf16 on a GPU through autocast, since it does not run with bf16 weights. Its rotary embedding, norms and feed-forward
are its own. Not timed yet, with or without being installed: the others of KNOWN.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from infini_bench.errors import UserError
from infini_bench.timing import Ladder

from .base import Row
from .efficiency_model import Found, Subject
from .footprint import head_size

KNOWN = {  # package -> the module that it installs
    "infini-transformer-pytorch": "infini_transformer_pytorch",
    "flash-linear-attention": "fla",
    "memorizing-transformers-pytorch": "memorizing_transformers_pytorch",
    "recurrent-memory-transformer-pytorch": "recurrent_memory_transformer_pytorch",
}


class InfiniTransformerPeer(nn.Module):
    """infini-transformer-pytorch at the sizes of a configuration."""

    def __init__(self, cfg: Any):
        super().__init__()
        from infini_transformer_pytorch import InfiniTransformer, InfiniTransformerWrapper

        body = cfg.decoder
        self.model = InfiniTransformer(
            num_tokens=cfg.data.vocab_size,
            dim=body.dim,
            depth=body.layers,
            heads=body.heads,
            dim_head=head_size(cfg),
            use_mem_delta_rule=cfg.memory.update != "linear",
        )
        self.segment = cfg.memory.segment
        self.wrapper = InfiniTransformerWrapper(self.model, segment_length=self.segment)

    def read(self, parts: list[Tensor]) -> None:
        """A document, given by segments."""
        memories = None
        for ids in parts:
            _, _, memories = self.model(ids, past_memories=memories, return_new_memories=True)

    def train_on(self, ids: Tensor) -> None:
        """Gradients of the loss of (B, T + 1) tokens."""
        self.wrapper(ids, backward=True)


PEERS: dict[str, Callable[[Any], InfiniTransformerPeer]] = {"infini-transformer-pytorch": InfiniTransformerPeer}


def check_peers(names: list[str], cfg: Any) -> None:
    """Raises UserError, before any work, for a peer that cannot be timed beside this configuration."""
    for name in names:
        if name not in PEERS:
            raise UserError(f"{name} cannot be timed yet; --vs knows {', '.join(PEERS)}.")
        if find_spec(KNOWN[name]) is None:
            raise UserError(f"{name} is not installed; run `pip install {name}`, or leave it out of --vs.")
        if cfg.memory.kind != "compressive" or cfg.decoder.kv_heads not in (None, cfg.decoder.heads):
            raise UserError(f"{name} has a compressive memory and no KV groups; model={cfg.model} differs.")


def measure_peers(task: Any, model: Any, found: Found) -> list[Row]:
    """Rows of our model with all logits, of each peer, and the ratios: its time over ours."""
    model.to(task.device)
    ours = Subject(task, model, ["forward"], every=True)
    own = ours.climb()
    rows = ours.rows(own, condition="all_logits")
    model.to("cpu")
    for name in task.task.vs:
        theirs = climb(task, PEERS[name](task.cfg).to(task.device))
        for mode, by_length in theirs.items():
            pairs = {"forward": own["forward"], "train": found.get("train", {})}[mode]
            kind = "inference" if mode == "forward" else "train"
            columns: dict[str, Any] = {"condition": task.shape, "extra": {"variant": name}}
            for tokens, times in by_length.items():
                rows += task.timed(mode, times, tokens, None, length=tokens, **columns)
                mine = pairs.get(tokens, "not measured")
                rows += task.ratio(f"ratio_to_peer_{kind}", times, mine, length=tokens, **columns)
    return rows


def climb(task: Any, peer: InfiniTransformerPeer) -> Found:
    """Times of a peer at all lengths; training only where ours is trained."""
    helper = Subject(task, peer, ["forward"])  # tokens and autocast as ours
    optimizer = torch.optim.AdamW(peer.parameters(), task.cfg.trainer.lr)
    found: Found = {}

    def train(tokens: int) -> None:
        with torch.enable_grad(), helper.autocast():
            peer.train_on(helper.ids(tokens + 1))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def read(parts: list[Tensor]) -> None:
        with torch.no_grad(), helper.autocast():
            peer.read(parts)

    for mode in ("train", "forward"):
        if mode in task.task.modes:
            ladder, found[mode] = Ladder(task.watch), {}
            peer.train(mode == "train")
            for tokens in task.lengths:
                parts = [*helper.ids(tokens).split(peer.segment, 1)]
                calls = {"train": lambda n=tokens: train(n), "forward": lambda x=parts: read(x)}  # type: ignore[misc]
                warm = (lambda x=parts: read(x[:2])) if mode == "forward" else None  # type: ignore[misc]
                found[mode][tokens] = ladder.climb(tokens, calls[mode], warm)
    return found
