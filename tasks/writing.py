"""What a memory holds after a prompt, and how strongly its write gate writes a needle and everything else.

Over a million tokens a memory keeps what it does not overwrite: whether a model has learned to leave filler
out says more about the length that it can bear than its score at the lengths of its training.

Shapes: B batch, T tokens of a call, L layers, G KV heads, D head size.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from infini_bench.cache import MemoryCache
from infini_bench.stream import feed

from .haystack import Prompt, side_by_side


def memory_norms(state: MemoryCache) -> list[float]:
    """Frobenius norm of each layer's associative memories M (B, G, F, D), mean over rows and KV heads.

    Empty for other memories. Of a memory without a normaliser a norm that grows with the document's length
    says that reads drown in what has piled up, also of what was written last; one that does not, that what is
    lost was overwritten.
    """
    held = [x for name, x in state.tensors().items() if name.endswith(".M")]
    return [float(M.norm(dim=(-2, -1)).mean()) for M in held]


@torch.no_grad()
def write_strengths(model, prompt: Prompt, size: int) -> dict[str, Tensor]:
    """Mean strength w (compressive.py) of the keys of ``needle`` and of ``filler``, all the rest of a prompt.

    (L, G) float32 on the CPU each; empty for a model whose memories have no write gate. size: tokens a call.
    """
    gated = [memory for memory in model.modules() if getattr(memory, "memory_write", None) is not None]
    if not gated:
        return {}
    sums, place = torch.zeros(2, len(gated), gated[0].kv_heads), torch.arange(len(prompt))
    needle = (place >= prompt.needle[0]) & (place < prompt.needle[1])
    read = [0] * len(gated)  # tokens by each layer

    def note(layer: int, memory, args: tuple) -> None:
        w_BTG = memory.strength(args[1].float())[..., 0].float().cpu()
        here = needle[read[layer] : read[layer] + w_BTG.shape[1]]
        read[layer] += w_BTG.shape[1]
        sums[0, layer] += w_BTG[0, here].sum(0)
        sums[1, layer] += w_BTG[0, ~here].sum(0)

    hooks = [memory.register_forward_pre_hook(partial(note, i)) for i, memory in enumerate(gated)]
    try:
        feed(model, side_by_side([prompt], 0, len(prompt), size))
    finally:
        for hook in hooks:
            hook.remove()
    return {"needle": sums[0] / needle.sum(), "filler": sums[1] / (~needle).sum()}
