"""Slow float64 references of the memories that live in tokens: a plain loop over the segments of one document
on a stock ``LlamaModel``, sharing no code with `infini_bench.recurrent` or with the memories themselves.

Shapes: T tokens, D width, m memory tokens, K key size, F = 6K features, L layers; one batch row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Change = Callable[[int, Tensor], Tensor]  # (layer, its input or output (T, D)) -> (T, D)


def decode(llama, x_TD: Tensor, before: Change | None = None, after: Change | None = None) -> Tensor:
    """Last hidden states (T, D) of embeddings under causal attention; a layer's ends may be changed."""
    tokens = len(x_TD)
    x = x_TD[None]
    rope = llama.rotary_emb(x, position_ids=torch.arange(tokens)[None])
    later = torch.full((tokens, tokens), -torch.inf, dtype=x.dtype).triu(1)[None, None]
    for index, layer in enumerate(llama.layers):
        if before is not None:
            x = before(index, x[0])[None]
        x = layer(x, attention_mask=later, position_embeddings=rope)
        if after is not None:
            x = after(index, x[0])[None]
    return llama.norm(x)[0]


def rmt(llama, x_TD: Tensor, learned_mD: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Recurrent Memory Transformer: outputs (T, D), and the memory (m, D) after the last full segment."""
    memory, m, out = learned_mD, len(learned_mD), []
    for segment in x_TD.split(n):
        whole = len(segment) == n
        h = decode(llama, torch.cat([memory, segment, memory] if whole else [memory, segment]))
        out.append(h[m : m + len(segment)])
        if whole:
            memory = h[m + n :]
    return torch.cat(out), memory


def autocompressor(llama, x_TD: Tensor, learned_mD: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """AutoCompressor: outputs (T, D), and all summaries (S m, D) of the S full segments."""
    summaries, out = x_TD[:0], []
    for segment in x_TD.split(n):
        parts, begin = [summaries, segment], len(summaries)
        h = decode(llama, torch.cat([*parts, learned_mD] if len(segment) == n else parts))
        out.append(h[begin : begin + len(segment)])
        summaries = torch.cat([summaries, h[begin + len(segment) :]])
    return torch.cat(out), summaries


def armt(
    llama,
    x_TD: Tensor,
    learned_mD: Tensor,
    n: int,
    projections: list[dict[str, Tensor]],
    normaliser: str = "sum",
) -> tuple[Tensor, Tensor, Tensor]:
    """Associative RMT: outputs (T, D), M (L, F, D) and z (L, F) after the last full segment.

    projections, of each layer: query (K, D), key (K, D), value (D, D), strength (1, D), bias (1,).
    normaliser: sum (the paper's) or max.
    """
    size = 6 * len(projections[0]["query"])
    M = [x_TD.new_zeros(size, x_TD.shape[1]) for _ in projections]
    z = [x_TD.new_zeros(size) for _ in projections]

    def recall(index: int, phi: Tensor, own: Tensor) -> Tensor:
        overlap = phi @ z[index]
        return (phi @ M[index]) / (torch.max(overlap, own) if normaliser == "max" else overlap + 1e-5)

    def before(index: int, x: Tensor) -> Tensor:
        keys = [dpfp3(projections[index]["query"] @ token) for token in x]
        return torch.stack([t + recall(index, phi, phi @ phi) for t, phi in zip(x, keys, strict=True)])

    def write(index: int, x: Tensor) -> Tensor:
        p = projections[index]
        new_M, new_z = M[index], z[index]
        tokens = x[-len(learned_mD) :]
        keys = [dpfp3(p["key"] @ token) for token in tokens]
        for token, phi in zip(tokens, keys, strict=True):
            own = phi @ (torch.stack(keys).sum(0) if normaliser == "max" else phi)
            strength = torch.sigmoid(p["strength"] @ token + p["bias"])
            new_M = new_M + strength * torch.outer(phi, p["value"] @ token - recall(index, phi, own))
            known = (phi @ z[index]) / own
            new_z = new_z + torch.clamp(1 - known, 0, 1).detach() * phi
        M[index], z[index] = new_M, new_z
        return x

    out = []
    for segment in x_TD.split(n):
        whole = len(segment) == n
        x = torch.cat([segment, learned_mD]) if whole else segment
        out.append(decode(llama, x, before, write if whole else None)[: len(segment)])
    return torch.cat(out), torch.stack(M), torch.stack(z)


def dpfp3(x_K: Tensor) -> Tensor:
    """[max(x, 0), max(-x, 0)], each times one, two and three before it, cyclically; at length 1: (6K,)."""
    zero = torch.zeros_like(x_K[0])
    halves = [torch.maximum(x, zero) for x in x_K] + [torch.maximum(-x, zero) for x in x_K]
    phi = torch.stack([halves[i] * halves[i - j] for j in (1, 2, 3) for i in range(len(halves))])
    return phi / phi.norm()
