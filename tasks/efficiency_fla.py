"""flash-linear-attention's nearest operators beside one layer's memory (``task.level=operator``, ``--vs``).

``chunk_linear_attn`` for Linear, ``chunk_delta_rule`` for the token-wise delta rule (``delta_token``), at the
same batch, length, heads, head size and dtype. They are nearest, not equal: their memory reaches to the token
before, where ours ends with the last whole segment and has exact attention and a gate beside it. They are
given features of queries and keys (`CompressiveMemory.features`), which ours compute from raw ones, and a
strength of 1 a key; KV heads that several query heads share are repeated, as the operators want them.
Written against flash-linear-attention 0.6.0 (its ``fla.ops``), which needs a GPU and Triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from infini_bench.errors import UserError
from infini_bench.memory import CompressiveMemory

NAME, MODULE = "flash-linear-attention", "fla.ops"
OPERATORS = {"linear": "chunk_linear_attn", "delta_token": "chunk_delta_rule"}  # by memory.update


def check(task: Any) -> None:
    """Raises UserError where no operator is near, or where they cannot run."""
    update = task.cfg.memory.update
    if update not in OPERATORS:
        near = ", ".join(f"{operator} (memory.update={name})" for name, operator in OPERATORS.items())
        raise UserError(f"{NAME} has no operator near memory.update={update}; it has {near}.")
    if task.device.type != "cuda":
        raise UserError(f"{NAME}'s operators need a CUDA GPU; the device here is {task.device.type}.")
    if task.dtype == torch.float32:
        raise UserError(f"{NAME}'s {OPERATORS['delta_token']} has no float32; set trainer.precision=bf16.")


class Operator:
    """One operator as a call of features of queries and keys, and values: (B, T, H, F), (B, T, G, F),
    (B, T, G, D) -> (B, T, H, D)."""

    def __init__(self, memory: CompressiveMemory):
        self.name = OPERATORS[memory.cfg.update]
        self.operator = getattr(import_module(MODULE), self.name)
        self.normalised = memory.normalised

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if (shared := q.shape[2] // k.shape[2]) > 1:
            k, v = (x.repeat_interleave(shared, 2) for x in (k, v))
        if self.name == "chunk_linear_attn":
            return self.operator(q, k, v, normalize=self.normalised)[0]
        return self.operator(q, k, v, k.new_ones(k.shape[:3]))[0]


@torch.no_grad()
def inputs(memory: CompressiveMemory, *raw: Tensor) -> tuple[Tensor, ...]:
    """Features of raw queries and keys, and the values, as leaves of the graph in the values' dtype."""
    q, k, v = raw
    features = (memory.features(x.float()).to(v.dtype) for x in (q, k))
    return tuple(x.detach().requires_grad_() for x in (*features, v))
