"""Slow references of retrieval over all earlier keys: a decoder's, and Unlimiformer's cross-attention.

One batch row at a time, loops over tokens and heads, no code shared with the fast forms.

Shapes: T tokens, H heads, G KV heads, D head size, N segment length, S encoder states, d model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infini_bench.memory.reference import rope, softmax_read


def retrieval(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, n: int, neighbours: int) -> Tensor:
    """The own segment and the one before it, and the best ``neighbours`` of all older keys at distance 2N."""
    out = []
    for t in range(q_THD.shape[0]):
        first = max(t // n * n - n, 0)  # of the window
        row = []
        for h in range(q_THD.shape[1]):
            g = h * k_TGD.shape[1] // q_THD.shape[1]
            clipped = [rope(k_TGD[j, g], t - 2 * n) for j in range(first)]
            q = rope(q_THD[t, h], t)
            best = sorted(range(first), key=lambda j: (q @ clipped[j]).item(), reverse=True)[:neighbours]
            seen = range(first, t + 1)
            keys = [clipped[j] for j in best] + [rope(k_TGD[j, g], j) for j in seen]
            row.append(softmax_read(q, keys, [v_TGD[j, g] for j in (*best, *seen)]))
        out.append(torch.stack(row))
    return torch.stack(out)


def cross(attention, x_Td: Tensor, states_Sd: Tensor, k: int) -> Tensor:
    """Cross-attention of one row; each head and query sees the ``k`` states with the best keys: (T, d).

    attention: a module with q_proj, k_proj, v_proj, out_proj, num_heads and head_dim, as BART's and LED's.
    """
    heads, size = attention.num_heads, attention.head_dim
    keys, values = attention.k_proj(states_Sd), attention.v_proj(states_Sd)
    out = []
    for x in x_Td:
        q, row = attention.q_proj(x), []
        for h in range(heads):
            part = slice(h * size, h * size + size)
            ranked = sorted(range(len(keys)), key=lambda j: -(q[part] @ keys[j, part]).item())[:k]
            row.append(
                softmax_read(q[part], [keys[j, part] for j in ranked], [values[j, part] for j in ranked])
            )
        out.append(attention.out_proj(torch.cat(row)))
    return torch.stack(out)
