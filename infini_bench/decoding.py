"""Decoding: steps of one token, in which no shape depends on how long a document is or where rows stand.

So a layer compiles once for all steps (`MemoryLlamaForCausalLM.compile_steps`), and nothing is asked of the
device: which step completes a segment, and so writes the memory, is counted on the host.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from infini_bench.cache import MemoryCache, MemoryLayer
from infini_bench.memory.base import State

if TYPE_CHECKING:
    from infini_bench.decoder import MemoryLlamaForCausalLM


# Without cuDNN, torch's first choice on an H100 or H200: for each new length of keys it makes a plan,
# which takes longer than the step (some 42 ms in pytorch #191576).
GROWING = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def decoding(model: Any, state: Any) -> Steps:
    """What follows ``state`` token by token, the fastest way that ``model`` has; the state is not changed."""
    return SteadySteps(model, state) if getattr(model, "steady", False) else Steps(model, state)


class Steps:
    """One call of the model a token. state: after the tokens so far."""

    def __init__(self, model: Any, state: Any):
        self.model, self.state = model, state

    @torch.no_grad()
    def step(self, ids_B1: Tensor) -> Tensor:
        """Float32 logits (B, V) after one more token."""
        with sdpa_kernel(GROWING):
            logits, self.state = self.model.step(ids_B1, self.state, keep="last")
        return logits[:, -1]


class SteadySteps(Steps):
    """Steps between two segment borders in shapes that stay; rows that complete a segment are fed by a call.

    Of many rows nearly every step completes some row's segment, and a call writes whole segments: so it is
    made of those rows alone. fills: of each row, how many tokens of the unfinished segment there are.
    """

    model: MemoryLlamaForCausalLM
    state: MemoryCache

    def __init__(self, model: MemoryLlamaForCausalLM, state: MemoryCache):
        super().__init__(model, state.spread(model.segment))
        first = self.states()[0]
        self.fills: list[int] = first["fill"].tolist()
        self.rope = model.model.rotary_emb(first["k"][:1], torch.zeros(1, 1))

    def states(self) -> list[State]:
        return [layer.state or {} for layer in self.state.layers]

    @torch.no_grad()
    def step(self, ids_B1: Tensor) -> Tensor:
        """Float32 logits (B, V) after one more token."""
        last, state = self.model.segment - 1, self.state
        ending = [row for row, fill in enumerate(self.fills) if fill == last]
        logits = super().step(ids_B1) if len(ending) == len(self.fills) else self.inside(ids_B1)
        if 0 < len(ending) < len(self.fills):  # their logits are right, but they wrote nothing
            rows = torch.tensor(ending, device=ids_B1.device)
            _, written = self.model.step(ids_B1[rows], state.select_rows(rows), keep="none")
            self.state = self.state.with_rows(rows, written)
        self.fills = [0 if fill == last else fill + 1 for fill in self.fills]
        return logits

    def inside(self, ids_B1: Tensor) -> Tensor:
        """A step that writes no memory, whether or not it completes a row's segment."""
        inner, layers = self.model.model, []
        x_B1C = inner.embed_tokens(ids_B1)
        for layer, state in zip(inner.layers, self.states(), strict=True):
            # the number of tokens seen is kept outside: each of its values would compile the layer anew
            x_B1C, new = layer.inside(x_B1C, self.rope, {**state, "seen": 0})
            layers.append(MemoryLayer({**new, "seen": state["seen"] + 1}))
        self.state = MemoryCache(layers)
        return self.model.lm_head(inner.norm(x_B1C))[:, -1].float()
