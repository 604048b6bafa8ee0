"""The training loss of a batch, in one call of the model or segment-checkpointed in several.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from infini_bench.cache import MemoryCache
from infini_bench.models import MemoryLlamaForCausalLM

READ = 2**16  # tokens a call where no gradient is wanted


class SequenceLoss(nn.Module):
    """``forward`` of the training step, as a module so that DDP and autocast wrap the whole of it.

    segments: model calls hold this many segments and are recomputed in the backward pass, so that activations
    of one call are alive at a time: the last one's stay, as the backward pass begins there, unless other rows
    follow. None = one call that keeps its activations. The state that goes from call
    to call is functional: gradients flow through it (as far as ``memory.gradient_depth`` says, which the
    memory itself keeps to by the segment's number in the document), and they equal those of one call.
    """

    def __init__(
        self, model: MemoryLlamaForCausalLM, segments: int | None = None, compiled: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.tokens = None if segments is None else segments * model.segment
        if compiled:
            torch.compiler.reset()  # what an earlier run of this process compiled had other shapes
            model.compile_layers()

    def forward(
        self, tokens: Tensor, weights: Tensor, task_weights: Tensor, before: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """tokens (B, T+1); weights and task_weights (B, T); before: as in `Batch`.

        With ``before`` rows run one after the other, since their documents stand at different segments.
        Returns what is differentiated, and (3,) without gradient: the loss in nats, sum(task_weights * nll)
        and sum(task_weights). The first is the loss plus, in training mode, what memories add to it (their
        ``auxiliary``) as a mean over tokens; what is reported is the loss alone.
        """
        if before is None:
            sums = self.sums(tokens, weights, task_weights, None, keep=True)
        else:
            rows = [x.split(1) for x in (tokens, weights, task_weights)]
            each = zip(*rows, map(self.read, before), strict=True)
            sums = torch.stack([self.sums(*row) for row in each]).sum(0)
        loss = sums[0] + sums[2] / weights.numel()
        return loss, torch.cat([sums[:2].detach(), task_weights.sum()[None]])

    def sums(
        self,
        tokens: Tensor,
        weights: Tensor,
        task_weights: Tensor,
        state: MemoryCache | None,
        keep: bool = False,
    ) -> Tensor:
        """(3,): sum(weights * nll), sum(task_weights * nll) and the auxiliary loss, from ``state`` on.

        keep: the last call's activations.
        """
        ids, targets = tokens[:, :-1], tokens[:, 1:]
        step = self.tokens or ids.shape[1]
        recomputed = partial(checkpoint, self.one_call, use_reentrant=False)
        sums = torch.zeros(3, device=tokens.device)
        for begin in range(0, ids.shape[1], step):
            t = slice(begin, begin + step)
            kept = self.tokens is None or (keep and t.stop >= ids.shape[1])
            call = self.one_call if kept else recomputed
            more, state = call(ids[:, t], targets[:, t], weights[:, t], task_weights[:, t], state)
            sums = sums + more
        return sums

    @torch.no_grad()
    def read(self, ids_T: Tensor) -> MemoryCache | None:
        """The state after whole segments that are only read; None if there are none."""
        state, size = None, max(1, READ // self.model.segment) * self.model.segment
        for ids in ids_T.split(size) if len(ids_T) else ():
            _, state = self.model.step(ids[None], state, keep="none")
            self.model.take_auxiliary()  # is nobody's loss
        # Autocast keeps weights that it has converted; in older versions of torch those of a reading
        # without gradient let none through afterwards.
        torch.clear_autocast_cache()
        return state

    def one_call(
        self, ids: Tensor, targets: Tensor, weights: Tensor, task_weights: Tensor, state: MemoryCache | None
    ) -> tuple[Tensor, MemoryCache]:
        """One call of the model; None = the start of the document."""
        # logits of a large vocabulary cost a third of a small model: only where a loss is asked for
        nll, after = self.model.losses(ids, targets, state, (weights != 0) | (task_weights != 0))
        # taken before what a backward pass needs is complete: a recomputation ends there, and would leave it
        auxiliary = self.model.take_auxiliary()
        return torch.stack([(weights * nll).sum(), (task_weights * nll).sum(), auxiliary]), after
