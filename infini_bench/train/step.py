"""One update of the weights, and the validation loss.

A step draws ``rows x accumulate x processes`` rows, from number ``cursor`` on. What they are depends on their
numbers alone, so a resumed run replays nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from infini_bench.models import MemoryLlamaForCausalLM
from infini_bench.schema import RunConfig
from infini_bench.signals import StopRequest
from infini_bench.tasks.base import Batch, Task
from infini_bench.train.curriculum import Curriculum
from infini_bench.train.loss import SequenceLoss
from infini_bench.train.optim import build_optimizer, grouped_parameters, set_lr
from infini_bench.train.parallel import full, shard
from infini_bench.train.state import TrainState


@dataclass(frozen=True)
class StepStats:
    """One update, averaged over all its rows. Losses in nats; ``segments`` None = the task's own length."""

    loss: float
    task_loss: float
    grad_norm: float
    rates: dict[str, float]
    segments: int | None
    stop: bool


class Stepper:
    """Model, optimizer and task on the machine's devices."""

    def __init__(
        self, cfg: RunConfig, accelerator: Accelerator, task: Task, model: MemoryLlamaForCausalLM
    ) -> None:
        self.cfg, self.accelerator, self.task = cfg, accelerator, task
        self.ready: dict[tuple[int, int, int | None], Batch] = {}
        self.loss = SequenceLoss(model, cfg.trainer.checkpoint_segments, cfg.trainer.compile)
        self.net: Any
        if cfg.trainer.parallel == "fsdp":
            shard(self.loss, model.model.layers, accelerator)
            self.net, self.optimizer = self.loss, accelerator.prepare(build_optimizer(model, cfg.trainer))
        else:
            self.net, self.optimizer = accelerator.prepare(self.loss, build_optimizer(model, cfg.trainer))

    def step(self, state: TrainState, curriculum: Curriculum, stop: StopRequest) -> StepStats:
        """One update; moves ``state`` and ``curriculum`` on.

        Raises FloatingPointError, the weights untouched, if loss or gradient is not finite.
        stop: of this process; the result says whether any process was asked to stop.
        """
        trainer, segments = self.cfg.trainer, curriculum.segments
        self.seed(state.step)
        rates = set_lr(self.optimizer, state.step + 1, trainer)
        rows = curriculum.rows * trainer.accumulate * self.accelerator.num_processes
        sums, tokens = self.gradients(state.cursor, curriculum)
        norm = full(self.accelerator.clip_grad_norm_(grouped_parameters(self.optimizer), trainer.clip))
        flag = torch.tensor([float(stop.requested)], device=sums.device)
        sums = self.accelerator.reduce(torch.cat([sums, flag]), "sum")
        loss, task_sum, task_count, stops, grad_norm = torch.cat([sums, norm.detach()[None]]).tolist()
        loss /= trainer.accumulate * self.accelerator.num_processes
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise FloatingPointError(f"Step {state.step + 1} gave loss {loss} and gradient norm {grad_norm}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        state.step, state.cursor, state.tokens = state.step + 1, state.cursor + rows, state.tokens + tokens
        state.loss = loss
        count, total, largest = state.grad_norms
        state.grad_norms = [count + 1, total + grad_norm, max(largest, grad_norm)]
        curriculum.update(task_sum / task_count)
        return StepStats(loss, task_sum / task_count, grad_norm, rates, segments, stops > 0)

    def gradients(self, cursor: int, curriculum: Curriculum) -> tuple[Tensor, int]:
        """Gradients of a step's micro-batches; their sums (see SequenceLoss), and tokens of all processes."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        rows = curriculum.rows
        sums, tokens = torch.zeros(3, device=self.accelerator.device), 0
        for micro in range(self.cfg.trainer.accumulate):
            first = cursor + (micro * processes + rank) * rows
            for start in range(0, rows, curriculum.at_once):
                n = min(curriculum.at_once, rows - start)
                batch = self.batch(first + start, n, curriculum.segments)
                part = self.accelerator.no_sync if start + n < rows else self.accelerator.accumulate
                with part(self.net):
                    with self.accelerator.autocast():  # for a net that accelerate did not prepare
                        loss, more = self.net(*self.on_device(batch))
                    self.accelerator.backward(loss * (n / rows))
                sums += more * more.new_tensor([n / rows, 1, 1])
                tokens += batch.read * processes
                after = start + n if start + n < rows else processes * rows
                following = (first + after, min(curriculum.at_once, rows - after % rows), curriculum.segments)
                self.ready = {following: self.task.batch(*following)}  # made while a GPU is still busy
        return sums, tokens

    def batch(self, cursor: int, rows: int, segments: int | None) -> Batch:
        """Rows of the train split: those made ahead, unless the curriculum has moved on."""
        key = (cursor, rows, segments)
        return self.ready.pop(key) if key in self.ready else self.task.batch(*key)

    @torch.no_grad()
    def validate(self, segments: int | None) -> float:
        """Mean loss of the first ``validate_rows`` rows of the validation split, nats."""
        total, rows = 0.0, self.cfg.trainer.validate_rows
        self.loss.eval()
        for cursor in range(0, rows, self.cfg.trainer.batch):
            n = min(self.cfg.trainer.batch, rows - cursor)
            batch = self.task.batch(cursor, n, segments, split="validation")
            with self.accelerator.autocast():
                total += n * self.loss(*self.on_device(batch))[0].item()
        self.loss.train()
        if isinstance(self.loss, FSDPModule):
            self.loss.reshard()  # what no backward pass follows stays gathered, and hides the trained share
        return total / rows

    def on_device(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, list[Tensor] | None]:
        """Tokens, weights, task weights (the weights themselves where the task has none), and ``before``."""
        task_weights = batch.weights if batch.task_weights is None else batch.task_weights
        device = self.accelerator.device
        before = None if batch.before is None else [ids.to(device) for ids in batch.before]
        return batch.tokens.to(device), batch.weights.to(device), task_weights.to(device), before

    def seed(self, step: int) -> None:
        """Makes whatever a step draws at random a function of (seed, step, process): no state to store."""
        numbers = np.random.SeedSequence([self.cfg.seed, step, self.accelerator.process_index])
        torch.manual_seed(int(numbers.generate_state(1)[0]))
