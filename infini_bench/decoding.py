"""Decoding: steps of one token, in which no shape depends on how long a document is or where rows stand.

So a layer compiles once for all steps (`MemoryLlamaForCausalLM.compile_steps`), a GPU gets a whole step as
one graph, and nothing is asked of the device: which step completes a segment, and so writes the memory, is
counted on the host.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from infini_bench.cache import MemoryCache
from infini_bench.memory.base import State

if TYPE_CHECKING:
    from infini_bench.decoder import MemoryLlamaForCausalLM


# Without cuDNN, torch's first choice on an H100 or H200: for each new length of keys it makes a plan,
# which takes longer than the step (some 42 ms in pytorch #191576).
GROWING = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
WARM = 3  # calls before a `Graph` is captured


def decoding(model: Any, state: Any) -> Steps:
    """What follows ``state`` token by token, the fastest way that ``model`` has; the state is not changed."""
    return SteadySteps(model, state) if getattr(model, "steady", False) else Steps(model, state)


class Steps:
    """One call of the model a token."""

    def __init__(self, model: Any, state: Any):
        self.model, self.own = model, state

    @property
    def state(self) -> Any:
        """After the tokens so far."""
        return self.own

    @torch.no_grad()
    def step(self, ids_B1: Tensor) -> Tensor:
        """Float32 logits (B, V) after one more token."""
        with sdpa_kernel(GROWING):
            logits, self.own = self.model.step(ids_B1, self.own, keep="last")
        return logits[:, -1]


class SteadySteps(Steps):
    """Steps between two segment borders in shapes that stay; rows that complete a segment are fed by a call.

    Of many rows nearly every step completes some row's segment, and a call writes whole segments: so it is
    made of those rows alone. fills: of each row, how many tokens of the unfinished segment there are.

    own: tensors that stay in their places. A step writes one slot of keys and values, a call all of its rows.
    Logits and ``state`` are copies. On a GPU the step is a `Graph`, so the model must stay as it is: its
    weights, and autocast's casts of them, in their places; `memory_off` or not.
    """

    model: MemoryLlamaForCausalLM
    own: MemoryCache

    @torch.no_grad()
    def __init__(self, model: MemoryLlamaForCausalLM, state: MemoryCache):
        super().__init__(model, state.spread(model.segment).clone())
        first = self.states()[0]
        self.fill: Tensor = first["fill"]
        for each in self.states():
            each["fill"] = self.fill  # one for all layers
        self.fills: list[int] = self.fill.tolist()
        self.rope = model.model.rotary_emb(first["k"][:1], torch.zeros(1, 1))
        self.ids_B1 = torch.zeros_like(self.fill)[:, None]
        self.graph = graph_on(self.fill.device)

    def states(self) -> list[State]:
        return [layer.state or {} for layer in self.own.layers]

    @property
    def state(self) -> MemoryCache:
        """After the tokens so far; a copy."""
        return self.own.clone()

    @torch.no_grad()
    def step(self, ids_B1: Tensor) -> Tensor:
        """Float32 logits (B, V) after one more token."""
        last = self.model.segment - 1
        ending = [row for row, fill in enumerate(self.fills) if fill == last]
        if not ending:
            logits = self.inside(ids_B1)
        else:
            rows, every = torch.tensor(ending, device=ids_B1.device), len(ending) == len(self.fills)
            before = self.own if every else self.own.select_rows(rows)
            with sdpa_kernel(GROWING):  # how many rows there are differs
                found, written = self.model.step(ids_B1[rows], before, keep="last" if every else "none")
            # of rows that end, a step inside gives the right logits, too, but it writes nothing
            logits = self.inside(ids_B1) if found is None else found[:, -1]
            self.own.write_rows(rows, written)
        self.fills = [0 if fill == last else fill + 1 for fill in self.fills]
        for state in self.states():
            state["seen"] += 1
        return logits

    def inside(self, ids_B1: Tensor) -> Tensor:
        """A step that writes no memory, whether or not it completes a row's segment."""
        self.ids_B1.copy_(ids_B1)
        return self.forward() if self.graph is None else self.graph.run(self.forward)

    def forward(self) -> Tensor:
        """Logits after ``ids_B1``, and ``own`` with it: a function of tensors that stay in their places."""
        inner, new = self.model.model, State()
        x_B1C = inner.embed_tokens(self.ids_B1)
        for layer, state in zip(inner.layers, self.states(), strict=True):
            # the number of tokens seen is kept outside: each of its values would compile the layer anew
            x_B1C, new = layer.inside(x_B1C, self.rope, {**state, "seen": 0})
        self.fill.copy_(new["fill"])
        return self.model.lm_head(inner.norm(x_B1C))[:, -1].float()


class Graph:
    """A function that works on tensors in their places alone, as one CUDA graph: one launch in place of all.

    Each call of ``run`` is one of the function. The first ``WARM`` run as they are, on a stream of their own,
    where layers compile and kernels are loaded and chosen: what is decoded in fewer steps is never captured.
    The stream is this graph's: torch 2.11 frees what matrix products need on a stream with any of its graphs.
    """

    out: Tensor  # of every replay

    def __init__(self) -> None:
        self.calls = 0
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        """What ``function`` returns; a copy."""
        self.calls += 1
        if self.calls <= WARM:
            return self.beside(function)
        if self.calls == WARM + 1:
            self.capture(function)
        self.replay()
        return self.out.clone()

    def beside(self, function: Callable[[], Tensor]) -> Tensor:
        """``function`` on the stream."""
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            out = function()
        here.wait_stream(self.stream)
        return out.clone()  # freed, its place is the stream's again, which waits for this one

    def capture(self, function: Callable[[], Tensor]) -> None:
        """Record what ``function`` launches; nothing of it runs."""
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.out = function()

    def replay(self) -> None:
        self.graph.replay()


def graph_on(device: torch.device) -> Graph | None:
    """Launching is what a step waits for on a GPU only; there are no graphs elsewhere."""
    return Graph() if device.type == "cuda" else None
