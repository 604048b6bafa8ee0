"""How far back a gradient reaches through a memory, at random weights.

Protocol, version 1. A text of random tokens is written in segment 0, filler follows, and segment s holds
fresh random tokens. The loss is the mean negative log-likelihood of the next token over segment s. For each
distance s of ``task.distances``, ``task.trials`` texts are read in one call, and the loss is differentiated
with respect to the embeddings. ``position``: s; ``length``: tokens read; ``condition``: the filler, one
segment of random tokens that is repeated (``constant``) or new ones everywhere (``random``).

* ``gradient_norm``: Euclidean norm over all embeddings of segment 0.
* ``gradient_share``: this over the norm at segment s itself: what crossed, of what is there at all.

Means over texts; intervals: bootstrap over texts, and over seeds (weights) with several records. A zero is
exact: no path leads there, by construction (a cache that is not differentiated) or by
``memory.gradient_depth``, or only one through weights that start at zero.
"""

from __future__ import annotations

import zlib
from itertools import product

import torch
from torch import Tensor

from infini_bench.metrics.intervals import bootstrap
from infini_bench.progress import NullProgress

from .base import Row, Untrained, evaluating


class Reach(Untrained):
    name = "reach"
    version = "1"
    score = ("gradient_norm", "gradient_share")

    def build(self, device: torch.device) -> torch.nn.Module:
        return self.model().to(device)  # type: ignore[arg-type]

    def evaluate(self, model, progress=None) -> list[Row]:
        cells, rows = [*product(self.task.between, self.task.distances)], []
        work = (progress or NullProgress()).task("reach", sum(distance + 1 for _, distance in cells))
        with evaluating(model), torch.enable_grad(), work as bar:
            for filler, distance in cells:
                ids = self.texts(filler, distance, model.segment).to(model.device)
                rows += self._rows(filler, distance, norms(model, ids))
                bar.advance(distance + 1)
        return rows

    def texts(self, filler: str, distance: int, segment: int) -> Tensor:
        """(trials, (distance + 1) segment + 1) int64; texts of all distances begin alike."""
        vocab, size = self.cfg.data.vocab_size, (self.task.trials, segment)

        def draw(name: str) -> Tensor:
            seed = zlib.crc32(f"{self.cfg.seed} {name}".encode())
            return torch.randint(vocab, size, generator=torch.Generator().manual_seed(seed))

        between = [draw("filler" if filler == "constant" else f"filler {s}") for s in range(1, distance)]
        return torch.cat([draw("write"), *between, draw("loss"), draw("end")[:, :1]], 1)

    def _rows(self, filler: str, distance: int, norms_BS: Tensor) -> list[Row]:
        far, own = norms_BS[:, 0].double().cpu(), norms_BS[:, -1].double().cpu()
        columns = {"position": str(distance), "condition": filler, "n": len(far)}
        columns["length"] = (distance + 1) * self.cfg.memory.segment
        rows = []
        for name, values in (("gradient_norm", far), ("gradient_share", far / own)):
            bounds = bootstrap(values.numpy(), lambda x: float(x.mean()), seed=self.cfg.seed)
            rows.append(self.row(name, float(values.mean()), bounds, **columns))
        return rows


def norms(model, ids_BT: Tensor) -> Tensor:
    """Norm of the gradient of the last segment's mean loss at each segment's embeddings: (B, S) float32.

    ids_BT: T = S N + 1 tokens. Rows are independent, so one backward pass of their sum serves all.
    """
    held: list[Tensor] = []

    def hold(module: torch.nn.Module, arguments: object, embedded: Tensor) -> Tensor:
        held.append(embedded.detach().requires_grad_())
        return held[-1]

    hook = model.get_input_embeddings().register_forward_hook(hold)
    try:
        hidden, _ = model.hidden(ids_BT[:, :-1])
    finally:
        hook.remove()
    last, targets = hidden[:, -model.segment :], ids_BT[:, -model.segment :]
    loss = model.nll(last.flatten(0, 1), targets.flatten()).sum() / model.segment
    (gradient,) = torch.autograd.grad(loss, held)
    return gradient.unflatten(1, (-1, model.segment)).flatten(2).norm(dim=2)
