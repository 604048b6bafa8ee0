"""Memories that live in tokens: a segment is read as [read tokens; its own N tokens; write tokens].

Attention is full and causal over the three parts, so a segment's tokens see what is read and the write
tokens see all of it; what becomes of the write tokens crosses the segment's border. An unfinished segment has
none yet. `infini_bench.recurrent` cuts documents into such segments and runs them one after the other: each
needs the last one's result, so the segments of a call cannot run at once.

Shapes: B batch, T tokens, N segment length, m memory tokens, R read tokens, L layers, K key size, F = 6K
features, dim (D in suffixes) the model's width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infini_bench.memory import features
from infini_bench.memory.base import State
from infini_bench.memory.blocks import Count
from infini_bench.schema import MemoryConfig

EPS = 1e-5  # beside the normaliser of ARMT's reads, as in its authors' code


class TokenMemory(nn.Module):
    """Base of the token memories of a whole model; ``vectors``: m learned embeddings, (m, dim).

    A subclass says what crosses into a document's first segment (``start``), what a segment reads and writes
    with (``read``, ``write``) and what crosses its end (``after``). All but ``start`` are given the state, in
    which ``done`` counts the segments before this one: an int, or (B,) where rows differ.
    """

    has_memory = True
    auxiliary = None  # nothing is added to the training loss
    differentiable = True

    def __init__(self, cfg: MemoryConfig, dim: int, layers: int):
        super().__init__()
        self.cfg, self.dim, self.layers = cfg, dim, layers
        self.segment, self.tokens = cfg.segment, cfg.tokens
        self.vectors = nn.Embedding(cfg.tokens, dim)
        self.enabled = True

    def learned(self, batch: int) -> Tensor:
        """The learned vectors of every row: (B, m, dim)."""
        return self.vectors.weight.expand(batch, -1, -1)

    @abstractmethod
    def state_floats(self) -> int:
        """Floats of one row that cross a segment boundary."""

    @abstractmethod
    def start(self, x_BTD: Tensor) -> State:
        """What crosses the boundary into the first segment of a document with embeddings ``x_BTD``."""

    @abstractmethod
    def read(self, state: State) -> tuple[Tensor, Count]:
        """The tokens in front of a segment (B, R, dim), and how many of them each row has, at the left."""

    @abstractmethod
    def write(self, state: State) -> Tensor:
        """The tokens behind a segment: (B, m, dim)."""

    def beside(self, state: State) -> State:
        """What the decoder layers read beside their input, and write anew at a segment's end."""
        return {}

    def run(
        self, layers: Iterable[nn.Module], x_BKD: Tensor, beside: State, writes: int, *given: Any
    ) -> tuple[Tensor, State]:
        """The decoder layers, one after the other, and what they wrote. writes: so many of the last columns
        are write tokens; given: what each layer takes after its input."""
        for layer in layers:
            x_BKD = layer(x_BKD, *given)
        return x_BKD, {}

    @abstractmethod
    def after(self, state: State, out_BmD: Tensor, full_B: Tensor | None, written: State) -> State:
        """What crosses the segment's end. out_BmD: last hidden states of the write tokens; full_B: the rows
        that end one, None = all; written: by the layers."""


def where(full_B: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """``new`` in the rows that end a segment, ``old`` in the others."""
    return new if full_B is None else torch.where(full_B.view(-1, *[1] * (new.dim() - 1)), new, old)


class RecurrentTokens(TokenMemory):
    """Recurrent Memory Transformer (RMT, arXiv 2207.06881): m vectors that every segment rewrites.

        [_; H; memory'] = decoder([memory; segment; memory])

    The same vectors stand at both ends, as in the authors' code; the new ones are the last hidden states,
    after the final norm, of those at the end. A document starts from the learned vectors, and so does every
    segment while the memory is off. Differentiable through and through: the gradient of a loss reaches all
    earlier segments along the vectors, or as many as ``gradient_depth`` says.

    State: ``memory`` (B, m, dim) in the model's dtype, m dim floats. The paper's Table 1 counts
    d_model p l 2 instead: p vectors at the input and the output of each of l layers, of which only p d_model
    are carried.
    """

    def state_floats(self) -> int:
        return self.tokens * self.dim

    def start(self, x_BTD: Tensor) -> State:
        return {"memory": x_BTD.new_zeros(len(x_BTD), self.tokens, self.dim)}

    def read(self, state: State) -> tuple[Tensor, Count]:
        return self.write(state), self.tokens

    def write(self, state: State) -> Tensor:
        memory, done = state["memory"], state["done"]
        first = self.learned(len(memory))
        if not self.enabled:
            return first
        if isinstance(done, int):
            return memory if done else first
        return where(done > 0, memory, first)

    def after(self, state: State, out_BmD: Tensor, full_B: Tensor | None, written: State) -> State:
        return {"memory": where(full_B, out_BmD, state["memory"]).clone()}


class AutoCompressor(TokenMemory):
    """AutoCompressors (arXiv 2305.14788): the summary vectors of all earlier segments are read again.

        [_; H; summary_s] = decoder([summary_1; ..; summary_{s-1}; segment_s; learned vectors])

    A summary is the last hidden states of m learned tokens. Its authors give these tokens no position, start
    them all at one embedding and draw segment lengths at random; here they are tokens like others, start at
    random, and all segments have N tokens. Differentiable as RMT is; where ``gradient_depth`` stops the
    gradient, it stops for all summaries so far. While the memory is off none is read.

    State: ``memory`` (B, s m, dim) in the model's dtype: it grows by m dim floats a segment, and so does the
    time a segment takes. Here for Table 1 and for recall; it has no place among memories of fixed size.
    """

    def state_floats(self) -> int:
        return self.tokens * self.dim  # of each segment so far

    def start(self, x_BTD: Tensor) -> State:
        return {"memory": x_BTD.new_zeros(len(x_BTD), 0, self.dim)}

    def read(self, state: State) -> tuple[Tensor, Count]:
        return state["memory"] if self.enabled else state["memory"][:, :0], state["done"] * self.tokens

    def write(self, state: State) -> Tensor:
        return self.learned(len(state["memory"]))

    def after(self, state: State, out_BmD: Tensor, full_B: Tensor | None, written: State) -> State:
        if full_B is None:
            return {"memory": torch.cat([state["memory"], out_BmD], 1)}
        done, padded = state["done"], F.pad(state["memory"], (0, 0, 0, self.tokens))
        slots = done[:, None] * self.tokens + torch.arange(self.tokens, device=done.device)
        added = padded.scatter(1, slots[..., None].expand_as(out_BmD), out_BmD)
        longest = int((done + full_B).max()) * self.tokens
        return {"memory": where(full_B, added, padded)[:, :longest]}


class AssociativeTokens(TokenMemory):
    """Associative Recurrent Memory Transformer (ARMT, arXiv 2407.04841): a matrix in every layer, written
    by m tokens at a segment's end and read by all tokens of the later ones.

    `Association` has the equations. The write tokens start from learned vectors in every segment; nothing
    goes from the last layer back to the first. Differentiable through reads and writes of all earlier
    segments, or of ``gradient_depth`` of them; not through how much the normaliser grows.

    State: ``M`` (B, L, F, dim) and ``z`` (B, L, F), at least float32: 6K (dim + 1) L floats. While the
    memory is off, reads are 0.
    """

    def state_floats(self) -> int:
        return self.layers * 6 * self.cfg.key_size * (self.dim + 1)

    def start(self, x_BTD: Tensor) -> State:
        shape = (len(x_BTD), self.layers, 6 * self.cfg.key_size, self.dim)
        M = torch.zeros(shape, dtype=wide(x_BTD).dtype, device=x_BTD.device)
        return {"M": M, "z": M[..., 0].clone()}

    def read(self, state: State) -> tuple[Tensor, Count]:
        return self.write(state)[:, :0], 0

    def write(self, state: State) -> Tensor:
        return self.learned(len(state["M"]))

    def beside(self, state: State) -> State:
        done = state["done"]
        reads = self.enabled and not (isinstance(done, int) and done == 0)
        return {"M": state["M"], "z": state["z"], "reads": reads}

    def run(
        self, layers: Iterable[nn.Module], x_BKD: Tensor, beside: State, writes: int, *given: Any
    ) -> tuple[Tensor, State]:
        new = []
        for layer, M, z in zip(layers, beside["M"].unbind(1), beside["z"].unbind(1), strict=True):
            x_BKD, M, z = layer(x_BKD, *given, M=M, z=z, reads=beside["reads"], writes=writes)
            new.append((M, z))
        M, z = (torch.stack(x, 1) for x in zip(*new, strict=True)) if writes else (beside["M"], beside["z"])
        return x_BKD, {"M": M, "z": z}

    def after(self, state: State, out_BmD: Tensor, full_B: Tensor | None, written: State) -> State:
        return {name: where(full_B, x, state[name]) for name, x in written.items()}


class Association(nn.Module):
    """The associative matrix of one layer (ARMT, arXiv 2407.04841), with phi = DPFP-3 over its norm:

        read    y = phi(W_q x) M / (phi(W_q x) z + eps), added to the layer's input x
        write   M' = M + sum_i b_i phi(k_i)^T (W_v x_i - phi(k_i) M / (phi(k_i) z + eps)),  b = sigmoid(W_b x)
                z' = z + sum_i gamma_i phi(k_i),  gamma = clip(1 - z phi(k) / |phi(k)|^2, 0, 1), k = W_k x

    over the write tokens' outputs x_i of the layer, all against the same M and z. gamma is not
    differentiated: z grows only by what is new about a key. Before the first write M = z = 0, so the read
    is 0. W_v starts at 0, so an untrained model reads 0. Sums are at least float32, outside autocast.

    These are the authors' equations and constants, and nothing in them, or beside them in the authors' code,
    bounds M: m like keys of a segment subtract m times what M has for one, z does not follow once phi z >= 1
    (gamma = 0), and a query or key off z's features divides by eps. With 16 keys of a drifting direction and
    values of length 1, in float64, |M| is 1e8 after 64 segments. Language models diverge (results/README.md).

    ``normaliser=max``, beyond the paper, takes keys that are written at once for what they are together:

        own_i = sum_j phi(k_i) phi(k_j) over the write tokens: |phi(k)|^2 = 1 if no other key overlaps;
        reads divide by max(phi z, 1), writes by max(phi z, own), and gamma = clip(1 - z phi(k) / own, 0, 1).

    What a segment leaves of M is then (1 - A) M with the eigenvalues of A in [0, 1]: they are those of the
    non-negative matrix b_i phi(k_i) phi(k_j) / max(phi(k_i) z, own_i), whose rows sum to at most 1.
    """

    def __init__(self, cfg: MemoryConfig, dim: int):
        super().__init__()
        self.floored = cfg.normaliser == "max"
        self.query = nn.Linear(dim, cfg.key_size, bias=False)
        self.key = nn.Linear(dim, cfg.key_size, bias=False)
        self.value = ZeroLinear(dim, dim, bias=False)
        self.strength = nn.Linear(dim, 1)

    def read(self, x_BTD: Tensor, M_BFD: Tensor, z_BF: Tensor) -> Tensor:
        """What the tokens find: (B, T, dim)."""
        q = wide(self.query(x_BTD))
        with torch.autocast(x_BTD.device.type, enabled=False):
            q = dpfp(q)
            norm = q @ z_BF[..., None]
            return (q @ M_BFD / (norm.clamp_min(1) if self.floored else norm + EPS)).to(x_BTD.dtype)

    def write(self, x_BmD: Tensor, M_BFD: Tensor, z_BF: Tensor) -> tuple[Tensor, Tensor]:
        """M and z after the write tokens' outputs."""
        k, v, strength = wide(self.key(x_BmD)), wide(self.value(x_BmD)), wide(self.strength(x_BmD))
        with torch.autocast(x_BmD.device.type, enabled=False):
            k = dpfp(k)
            norm = k @ z_BF[..., None]
            alone = torch.ones_like(norm)  # |phi|^2, and for a key of 0
            own = torch.maximum((k @ k.mT).sum(-1, keepdim=True), alone) if self.floored else alone
            old = k @ M_BFD / (torch.maximum(norm, own) if self.floored else norm + EPS)
            change = torch.sigmoid(strength) * (v - old)
            gamma = (1 - norm / own).clamp(0, 1).detach()
            return M_BFD + k.mT @ change, z_BF + (gamma * k).sum(1)


class ZeroLinear(nn.Linear):
    """A projection that starts at 0."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


def dpfp(x: Tensor) -> Tensor:
    """DPFP-3 over its norm: (.., K) -> (.., 6K), non-negative."""
    return F.normalize(features.dpfp(x, 3), dim=-1)


def wide(x: Tensor) -> Tensor:
    """x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
