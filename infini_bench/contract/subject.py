"""A module as the probes see it, and what they say about it.

Most modules are recognised (`adapters.Recognised`). For any other, write a subclass of `Subject` in a file of
your own and check ``file.py:ClassName``; only ``forward`` is needed. What is left out is not checked, and the
table says so: a property that cannot be observed is "not applicable", never "pass". Examples: `peers.py`.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class UnobservableError(Exception):
    """A property cannot be seen through this module's interface; the text says why, in a clause."""


@dataclass(frozen=True)
class Verdict:
    """What a probe found. verdict: ``pass``, ``FAIL`` or ``not applicable``; measured: its number, if any."""

    property: str
    verdict: str
    detail: str
    measured: float | None = None


class Subject(nn.Module):
    """The module under check: ``forward`` takes inputs and the state so far and returns outputs and state.

    vocab: inputs are token ids (B, T) int64 below it; None: they are vectors (B, T, dim).
    segment: tokens after which something leaves the exact view. has_state: False if a call is a document.
    Declared, for what is meant to be so: has_memory (something of earlier segments is used), differentiable
    (gradients cross a boundary), bounded (the state stops growing), window (tokens a query sees, itself
    included; None = its segment), call_is_segment (a call of any length is one segment).
    start_token: token that begins a document, where ``restart`` goes by it. chunk: tokens a call of very long
    documents, if calls may be longer than a segment.
    """

    vocab: int | None = None
    dim: int | None = None
    segment: int = 16
    has_state: bool = True
    has_memory: bool = True
    differentiable: bool = True
    bounded: bool = True
    call_is_segment: bool = False
    window: int | None = None
    start_token: int | None = None
    chunk: int | None = None

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Outputs (B, T, ...) floating point, and the state after; state None: x begins a document."""
        raise UnobservableError("it returns no outputs")

    def floats(self, state: Any) -> int:
        """Numbers that the state holds."""
        return sum(x.numel() for x in tensors(state))

    def declared_floats(self) -> int:
        """Numbers of a row's state at a boundary, by the module's word; not bounded: that a segment adds."""
        raise UnobservableError("it does not say how large its state is")

    def padded(self, x: Tensor, mask: Tensor) -> Tensor:
        """Outputs of a document with padding where ``mask`` (B, T) bool is False."""
        raise UnobservableError("it takes no padding mask")

    def restart(self, x: Tensor, state: Any, rows: Tensor) -> Tensor:
        """Outputs of x, which begins a new document in the rows (B,) bool; others go on from ``state``."""
        raise UnobservableError("it cannot begin a new document in one row only")

    def detached(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """As ``forward``, but the new state carries no gradient (truncated back-propagation)."""
        raise UnobservableError("it has no call that cuts the gradient")

    def generate(self, prompt: Tensor, tokens: int) -> Tensor:
        """The ``tokens`` ids (B, tokens) that follow a prompt (B, T), each the likeliest (greedy)."""
        raise UnobservableError("it generates nothing")

    def loss(self, ids: Tensor, kept: Tensor) -> Tensor:
        """Mean loss of predicting ids[:, 1:]; labels where kept[:, 1:] (bool) is False are ignored."""
        raise UnobservableError("it computes no loss")

    def store(self, entries: int) -> Store:
        """An empty store of single keys and values, as the module uses it."""
        raise UnobservableError("it keeps no store of single entries")


@dataclass(frozen=True)
class Store:
    """First in, first out: ``write`` keys and values (n, size), ``read`` the value of each best match."""

    size: int
    write: Callable[[Tensor, Tensor], None]
    read: Callable[[Tensor], Tensor]


def tensors(thing: Any) -> list[Tensor]:
    """Every tensor in a nest of containers and plain objects, each once."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()

    def walk(node: Any) -> None:
        if id(node) in seen:
            return
        seen.add(id(node))
        if isinstance(node, Tensor):
            found[id(node)] = node
        elif isinstance(node, dict):
            for value in node.values():
                walk(value)
        elif isinstance(node, list | tuple | set):
            for value in node:
                walk(value)
        elif hasattr(node, "__dict__") and not isinstance(node, nn.Module | type):
            walk(vars(node))

    walk(thing)
    return list(found.values())


def draw(subject: Subject, batch: int, tokens: int, seed: int) -> Tensor:
    """Inputs of a document: ids, or normal vectors in the module's dtype."""
    generator = torch.Generator().manual_seed(seed)
    if subject.vocab is not None:
        first = 0 if subject.start_token is None else subject.start_token + 1
        return torch.randint(first, subject.vocab, (batch, tokens), generator=generator)
    assert subject.dim is not None
    dtype = next((p.dtype for p in subject.parameters()), torch.float32)
    return torch.randn(batch, tokens, subject.dim, generator=generator).to(dtype)


def feed(
    subject: Subject, x: Tensor, sizes: list[int] | None = None, state: Any = None
) -> tuple[Tensor, Any]:
    """Outputs and state of a document fed in calls of these sizes; unset: segment by segment.

    A module without state gets one call.
    """
    if not subject.has_state:
        return subject(x)
    outputs = []
    for piece in x.split(sizes or subject.segment, 1):
        y, state = subject(piece, state)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a share of the largest value of ``b``; infinite where either is not finite."""
    scale = b.abs().max().clamp_min(1e-12)
    value = ((a - b).abs().max() / scale).item()
    return value if value == value else float("inf")
