"""The training loss of a batch, in one call of the model or segment-checkpointed in several.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from infini_bench.cache import MemoryCache


class SequenceLoss(nn.Module):
    """``forward`` of the training step, as a module so that DDP and autocast wrap the whole of it.

    segments: model calls hold this many segments and are recomputed in the backward pass, so that activations
    of one call are alive at a time; None = one call that keeps its activations. The state that goes from call
    to call is functional: gradients flow through it (as far as ``memory.gradient_depth`` says, which the
    memory itself keeps to by the segment's number in the document), and they equal those of one call.
    """

    def __init__(self, model: nn.Module, segments: int | None = None, compiled: bool = False) -> None:
        super().__init__()
        self.model = model
        self.tokens = None if segments is None else segments * model.segment
        self.losses: Callable = torch.compile(model.losses) if compiled else model.losses

    def forward(self, tokens: Tensor, weights: Tensor, task_weights: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, T+1); weights and task_weights (B, T). Returns the loss and sum(task_weights * nll), nats."""
        ids, targets = tokens[:, :-1], tokens[:, 1:]
        step = self.tokens or ids.shape[1]
        state: dict[str, Tensor] = {}
        loss = task_loss = torch.zeros((), device=tokens.device)
        for begin in range(0, ids.shape[1], step):
            part = [x[:, begin : begin + step] for x in (ids, targets, weights, task_weights)]
            if self.tokens is None:
                one, task_one, state = self.call(*part, state)
            else:
                one, task_one, state = checkpoint(self.call, *part, state, use_reentrant=False)
            loss, task_loss = loss + one, task_loss + task_one
        return loss, task_loss.detach()

    def call(
        self, ids: Tensor, targets: Tensor, weights: Tensor, task_weights: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """One call of the model; an empty state means the start of the document."""
        before = MemoryCache.from_tensors(state) if state else None
        nll, after = self.losses(ids, targets, before)
        return (weights * nll).sum(), (task_weights * nll).sum(), after.tensors()
