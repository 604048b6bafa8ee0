"""A sound module that reads token by token, and one with each fault that a probe must find."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infini_bench.contract.subject import Store, Subject

H, D, N, V = 2, 8, 8, 48  # heads, head size, segment, vocabulary


class Toy(Subject):
    """Attention inside segments of 8 tokens, and a linear memory of the segments before.

    State: a dict of the unfinished segment's keys and values, M (B, H, D, D), z (B, H, D) and the count.
    """

    vocab, segment, start_token = V, N, 0

    def __init__(self, fault: str | None = None):
        super().__init__()
        self.fault = fault
        self.embed = nn.Embedding(V, H * D)
        self.qkv = nn.Linear(H * D, 3 * H * D)
        self.out = nn.Linear(H * D, V)
        self.gate = nn.Parameter(torch.full((H,), 10.0 if fault == "shut gate" else 0.0))
        self.differentiable = fault != "declared"
        self.hidden = 0.0

    def start(self, batch: int) -> dict[str, Any]:
        M = torch.zeros(batch, H, D, D)
        return {"k": [], "v": [], "M": M, "z": M[..., 0] + 1e-6, "done": 0}

    def forward(self, x: Tensor, state: Any = None, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        fault = self.fault
        state = self.start(len(x)) if state is None else state
        state = state if fault == "state written into" else {**state, "k": [*state["k"]], "v": [*state["v"]]}
        h = self.embed(x)
        if fault == "sees ahead":
            h = h + 0.1 * F.pad(h, (0, 0, 0, 1))[:, 1:]
        if fault == "rows mix":
            h = h + 0.1 * h.mean(0)
        if fault == "length matters":
            h = h * (1 + x.shape[1] % N / N)
        outputs = []
        for t in range(x.shape[1]):
            outputs.append(self.token(h[:, t], state, None if mask is None else mask[:, t]))
            if fault == "written at a call's end":
                continue
            if len(state["k"]) == N:
                self.write(state)
        if fault == "written at a call's end":
            self.write(state)
        y = torch.stack(outputs, 1)
        if fault == "carries on":
            y, self.hidden = y + self.hidden, self.hidden + y.detach().mean()
        return y, state

    def token(self, h: Tensor, state: dict[str, Any], real: Tensor | None) -> Tensor:
        q, k, v = self.qkv(h).unflatten(-1, (3, H, D)).unbind(1)
        state["k"].append(k)
        state["v"].append(v)
        keys, values = torch.stack(state["k"], 2), torch.stack(state["v"], 2)
        local = (torch.einsum("bhd,bhtd->bht", q, keys).softmax(-1)[..., None] * values).sum(2)
        if state["done"] == 0:
            return self.out(local.flatten(1))
        read = self.features(q)
        norm = (read * state["z"].to(read.dtype)).sum(-1, keepdim=True)
        old = torch.einsum("bhd,bhde->bhe", read, state["M"].to(read.dtype)) / norm
        g = torch.sigmoid(self.gate)[:, None]
        return self.out((g * local + (1 - g) * old).to(local.dtype).flatten(1))

    def features(self, x: Tensor) -> Tensor:
        x = x if self.fault == "overflows" else x.float()
        return (F.elu(x) + 1) * (100 if self.fault == "overflows" else 1)

    def write(self, state: dict[str, Any]) -> None:
        if not state["k"]:
            return
        k, v = self.features(torch.stack(state["k"], 2)), torch.stack(state["v"], 2)
        M = state["M"] + torch.einsum("bhtd,bhte->bhde", k, v.to(k.dtype))
        z = state["z"] + k.sum(2)
        if self.fault == "overflows":
            M, z = M.to(k.dtype), z.to(k.dtype)
        if self.fault == "stalls":
            z = state["z"]
            for one in k.unbind(2):
                z = (z + one).to(v.dtype)
        if self.fault == "stalls unseen":
            M, z = state["M"], state["z"]
            for key, value in zip(k.unbind(2), v.unbind(2), strict=True):
                M = (M + key[..., None] * value[..., None, :]).to(v.dtype)
                z = (z + key).to(v.dtype)
        if self.fault in ("cut off", "declared"):
            M, z = M.detach(), z.detach()
        if self.fault == "grows":
            state["kept"] = torch.cat([state.get("kept", k[:, :, :0]), k], 2)
        state.update(M=M, z=z, k=[], v=[], done=state["done"] + 1)

    def declared_floats(self) -> int:
        return H * D * (D if self.fault == "lies" else D + 1)

    def padded(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.fault == "sees padding":
            return self(x)[0]
        y = x.new_zeros(*x.shape, V, dtype=torch.float32)
        for row in range(len(x)):
            y[row, mask[row]] = self(x[row, mask[row]][None])[0][0]
        return y

    def restart(self, x: Tensor, state: Any, rows: Tensor) -> Tensor:
        if self.fault == "never forgets":
            return self(x, state)[0]
        y, new = self(x, state)[0], self(x)[0]
        return torch.where(rows[:, None, None], new, y)

    def detached(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self(x, state)
        if self.fault == "cut that cuts nothing":
            return y, state
        return y, {name: t.detach() if isinstance(t, Tensor) else t for name, t in state.items()}

    def generate(self, prompt: Tensor, tokens: int) -> Tensor:
        if prompt.shape[1] == 0 and self.fault == "empty prompt":
            return prompt[:, [-1]]
        if prompt.shape[1] == 0:
            raise ValueError("the prompt is empty")
        state, x, found = None, prompt, []
        if self.fault == "reads a prompt's end":
            x = prompt[:, -N:]
        for _ in range(tokens):
            y, state = self(x, state)
            x = (-y if self.fault == "takes the least likely" else y)[:, -1:].argmax(-1)
            found.append(x)
        return torch.cat(found, 1)

    def loss(self, ids: Tensor, kept: Tensor) -> Tensor:
        y = self(ids[:, :-1])[0]
        losses, weights = F.cross_entropy(y.mT, ids[:, 1:], reduction="none"), kept[:, 1:].float()
        if self.fault == "mean of nothing":
            pieces = zip(losses.split(N, 1), weights.split(N, 1), strict=True)
            return torch.stack([(a * b).sum() / b.sum() for a, b in pieces]).mean()
        return (losses * weights).sum() / weights.sum()

    def store(self, entries: int) -> Store:
        k, v = torch.zeros(entries, D), torch.zeros(entries, D)
        written = 0

        def write(keys: Tensor, values: Tensor) -> None:
            nonlocal written
            at = torch.arange(written, written + len(keys)) % entries
            k[at] = keys
            v[at + (1 if self.fault == "wraps wrongly" and written > entries else 0) - entries] = values
            written += len(keys)

        def read(queries: Tensor) -> Tensor:
            if self.fault == "approximate":  # as an index of cells that searches the query's own one first
                cell = (queries[:, None, 0] > 0) == (k[None, :, 0] > 0)
                return v[(queries @ k.T).where(cell, -torch.inf).argmax(-1)]
            return v[(queries @ k.T).argmax(-1)]

        return Store(D, write, read)


# Each fault, and the properties that it breaks: its own, and what follows from it.
FAULTS = {
    "carries on": {"repeatable"},
    "shut gate": {"gates can learn", "memory is read"},
    "sees ahead": {"causality", "split invariance", "any length", "padding"},
    "rows mix": {"rows", "new document in a row"},
    "length matters": {"any length", "split invariance", "padding", "generation"},
    "written at a call's end": {"split invariance", "padding", "generation"},
    "state written into": {"state is a value", "gradient cut"},
    "sees padding": {"padding"},
    "never forgets": {"new document in a row"},
    "cut off": {"gradient reach"},
    "cut that cuts nothing": {"gradient cut"},
    "grows": {"state growth", "state size"},
    "lies": {"state size"},
    "wraps wrongly": {"look-ups"},
    "approximate": {"look-ups"},
    "mean of nothing": {"ignored labels"},
    "reads a prompt's end": {"generation"},
    "takes the least likely": {"generation"},
    "empty prompt": {"empty prompt"},
    "overflows": {"float16"},
    "stalls": {"bfloat16"},
    "stalls unseen": {"bfloat16"},
}


class Reshaped(nn.Module):
    """Heads split by a bare reshape, as published modules did: (B, T, H * D) viewed as (B, H, T, D).

    per segment: the whole text is viewed as heads and then cut into segments, each folded back on its own, so
    outputs see later tokens. Otherwise it is folded back at the end, and each head sees a slice of the text.
    """

    def __init__(
        self, dim: int = 16, heads: int = 2, segment: int = 8, per_segment: bool = True, right: bool = False
    ):
        super().__init__()
        self.qkv, self.heads, self.segment = nn.Linear(dim, 3 * dim), heads, segment
        self.per_segment, self.right = per_segment, right

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        shape = (batch, self.heads, tokens, dim // self.heads)
        if self.right:
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        else:
            q, k, v = (t.reshape(shape) for t in self.qkv(x).chunk(3, -1))
        size = self.segment if self.per_segment or self.right else tokens
        parts = []
        for a, b, c in zip(q.split(size, 2), k.split(size, 2), v.split(size, 2), strict=True):
            y = F.scaled_dot_product_attention(a, b, c, is_causal=True)
            parts.append((y.transpose(1, 2) if self.right else y).reshape(batch, -1, dim))
        return torch.cat(parts, 1)


class Layer(nn.Module):
    """(B, T, dim) and a state to outputs and a state: a running mean, as most recurrent layers look."""

    def __init__(self, dim: int):
        super().__init__()
        self.inner = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, state: tuple[Tensor, int] | None = None
    ) -> tuple[Tensor, tuple[Tensor, int]]:
        total, count = state or (torch.zeros_like(x[:, 0]), 0)
        sums = total[:, None] + self.inner(x).cumsum(1)
        counts = count + torch.arange(1, x.shape[1] + 1)
        return x + sums / counts[:, None].to(x.dtype), (sums[:, -1], count + x.shape[1])


class OnlyLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(ids).square().mean()
