"""Slow float64 references: every memory as a loop over tokens, written from the equations and sharing no code
with the fast forms. Tests hold the fast forms to them in outputs, states and gradients.

Shapes: T tokens, H heads, G KV heads, D head size, N segment length. One batch row at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope(x_D: Tensor, position: int, theta: float = 10000.0) -> Tensor:
    """Rotary embedding of one vector at an absolute position, halves convention."""
    half = x_D.shape[0] // 2
    angle = position * theta ** (-torch.arange(half, dtype=x_D.dtype) / half)
    a, b = x_D[:half], x_D[half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])


def softmax_read(q_D: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over lists of vectors (Eq. 6, with sqrt(D))."""
    scores = torch.stack([q_D @ k for k in keys]) / q_D.shape[0] ** 0.5
    return torch.softmax(scores, 0) @ torch.stack(values)


def elu1(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, torch.exp(torch.minimum(x, torch.zeros_like(x))))


def relu2(x: Tensor) -> Tensor:
    return torch.maximum(x, torch.zeros_like(x)) ** 2


SIGMA = {"elu1": elu1, "relu2": relu2, "exp": lambda x: torch.exp(torch.clamp(x - 4, max=16))}


def compressive(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, beta_H: Tensor, n: int, update: str, features: str = "elu1"
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 6-10 token by token: outputs (T, H, D), and M (G, D, D), z (G, D) after the last full segment."""
    tokens, heads, size = q_THD.shape
    groups, sigma = k_TGD.shape[1], SIGMA[features]
    memory = [q_THD.new_zeros(size, size) for _ in range(groups)]
    norm = [q_THD.new_zeros(size) for _ in range(groups)]
    out = []
    for t in range(tokens):
        begin = t // n * n
        row = []
        for h in range(heads):
            g = h * groups // heads
            keys = [rope(k_TGD[j, g], j) for j in range(begin, t + 1)]
            dot = softmax_read(rope(q_THD[t, h], t), keys, [v_TGD[j, g] for j in range(begin, t + 1)])
            s = sigma(q_THD[t, h])
            weight = torch.sigmoid(beta_H[h])
            row.append(dot if begin == 0 else weight * (s @ memory[g]) / (s @ norm[g]) + (1 - weight) * dot)
        out.append(torch.stack(row))
        if (t + 1) % n == 0:
            for g in range(groups):
                memory[g], norm[g] = write(
                    memory[g], norm[g], k_TGD[begin : t + 1, g], v_TGD[begin : t + 1, g], update, sigma
                )
    return torch.stack(out), torch.stack(memory), torch.stack(norm)


def write(M: Tensor, z: Tensor, k_ND: Tensor, v_ND: Tensor, update: str, sigma) -> tuple[Tensor, Tensor]:
    """One segment into the memory, key by key, every one against the memory before the segment (Eq. 8, 9)."""
    new_M, new_z = M, z
    for k, v in zip(k_ND, v_ND, strict=True):
        s = sigma(k)
        known = z.abs().sum() > 0 and update != "linear"
        new_M = new_M + torch.outer(s, v - (s @ M) / (s @ z) if known else v)
        share = torch.clamp(1 - (z @ s) / (s @ s), 0, 1).detach() if update == "delta_corrected" else 1.0
        new_z = new_z + share * s
    return new_M, new_z


def window(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, n: int, kind: str, width: int | None = None
) -> Tensor:
    """Local attention token by token: ``block``, ``xl``, ``full``, ``sliding`` (``width`` tokens)."""
    tokens, heads, _ = q_THD.shape
    groups = k_TGD.shape[1]
    out = []
    for t in range(tokens):
        begin = t // n * n
        first = {
            "block": begin,
            "xl": max(begin - n, 0),
            "sliding": max(t + 1 - (width or 2 * n), 0),
            "full": 0,
        }[kind]
        row = []
        for h in range(heads):
            g = h * groups // heads
            k = [
                k_TGD[j, g].detach() if kind == "xl" and j < begin else k_TGD[j, g]
                for j in range(first, t + 1)
            ]
            v = [
                v_TGD[j, g].detach() if kind == "xl" and j < begin else v_TGD[j, g]
                for j in range(first, t + 1)
            ]
            keys = [rope(key, j) for j, key in zip(range(first, t + 1), k, strict=True)]
            row.append(softmax_read(rope(q_THD[t, h], t), keys, v))
        out.append(torch.stack(row))
    return torch.stack(out)


def knn(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    beta_H: Tensor,
    log_scale_H: Tensor,
    n: int,
    entries: int,
    neighbours: int,
) -> Tensor:
    """Memorizing Transformers: the ``neighbours`` best of the last ``entries`` keys of earlier segments."""
    tokens, heads, _ = q_THD.shape
    local = window(q_THD, k_TGD, v_TGD, n, "xl")
    out = []
    for t in range(tokens):
        begin = t // n * n
        row = []
        for h in range(heads):
            g = h * k_TGD.shape[1] // heads
            old = range(max(begin - entries, 0), begin)
            q = q_THD[t, h] / q_THD[t, h].norm()
            ranked = sorted(((q @ (k_TGD[j, g] / k_TGD[j, g].norm()).detach(), j) for j in old), reverse=True)
            if not ranked:
                row.append(local[t, h])
                continue
            best = ranked[:neighbours]
            weights = torch.softmax(log_scale_H[h].exp() * torch.stack([score for score, _ in best]), 0)
            read = weights @ torch.stack([v_TGD[j, g].detach() for _, j in best])
            gate = torch.sigmoid(beta_H[h])
            row.append(gate * read + (1 - gate) * local[t, h])
        out.append(torch.stack(row))
    return torch.stack(out)
