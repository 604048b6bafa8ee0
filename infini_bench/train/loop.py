"""The training loop: one budget, one optimizer and one log for every memory and task.

A step draws ``rows x accumulate x processes`` rows, ``cursor`` ... ``cursor + that - 1``, so that a batch is a
function of the cursor alone and a resumed run replays nothing.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from infini_bench.config import to_dict
from infini_bench.errors import UserError
from infini_bench.files import write_json
from infini_bench.models import build_model, save_model
from infini_bench.progress import NullProgress, Progress
from infini_bench.schema import RunConfig
from infini_bench.tasks import build_task
from infini_bench.tasks.base import Batch
from infini_bench.train.checkpoint import Checkpoints
from infini_bench.train.curriculum import Curriculum
from infini_bench.train.device import build_accelerator, peak_bytes
from infini_bench.train.log import MetricsLog
from infini_bench.train.loss import SequenceLoss
from infini_bench.train.optim import build_optimizer, grouped_parameters, load_state_tensors, set_lr, state_tensors
from infini_bench.train.signals import StopRequest
from infini_bench.train.state import Resumed, TrainState, check_same_run, read_checkpoint, run_of


@dataclass(frozen=True)
class TrainResult:
    """What a run gave. Losses in nats; None where nothing was measured (a run interrupted before)."""

    folder: Path
    checkpoint: Path  # the last one
    steps: int
    tokens: int
    seconds: float
    final_loss: float | None
    best_loss: float | None  # validation
    parameters: int
    non_embedding_parameters: int
    state_floats: int
    peak_bytes: int
    task_version: str
    data_fingerprint: str
    tokenizer_fingerprint: str
    interrupted: bool


@dataclass(frozen=True)
class StepStats:
    """One update, averaged over all its rows. Losses in nats."""

    loss: float
    task_loss: float
    grad_norm: float
    rates: dict[str, float]
    tokens: int
    segments: int | None
    stop: bool


def train(cfg: RunConfig, folder: Path, progress: Progress | NullProgress | None = None) -> TrainResult:
    """Trains ``cfg`` in ``folder``, or goes on with the run (or run's checkpoint) that ``cfg.resume`` names.

    Raises UserError for what the user can put right: a folder in use, a damaged checkpoint, a full disk, a loss
    that is no number. SIGINT and SIGTERM end the run after the current step with a checkpoint.
    """
    resume = Path(cfg.resume) if cfg.resume else None
    folder = run_of(resume) if resume else Path(folder)
    with StopRequest() as stop:
        return Trainer(cfg, folder, resume, stop).run(progress or NullProgress())


class Trainer:
    """One run: everything that is alive between two steps."""

    def __init__(self, cfg: RunConfig, folder: Path, resume: Path | None, stop: StopRequest) -> None:
        self.cfg, self.folder, self.stop = cfg, folder, stop
        self.accelerator = build_accelerator(cfg)
        self.checkpoints = Checkpoints(folder, cfg.trainer.keep)
        resumed = self.open_folder(resume)
        self.task = build_task(cfg, resumed.tokenizer if resumed else None)
        if resumed:
            self.model = resumed.model
        else:
            torch.manual_seed(cfg.seed)
            self.model = build_model(cfg.decoder, cfg.memory, self.task.tokenizer.vocab_size)
        self.loss = SequenceLoss(self.model, cfg.trainer.checkpoint_segments, cfg.trainer.compile)
        self.net, self.optimizer = self.accelerator.prepare(self.loss, build_optimizer(self.model, cfg.trainer))
        self.curriculum = Curriculum(cfg.trainer)
        self.state = TrainState(processes=self.accelerator.num_processes, data=self.task.fingerprint)
        if resumed:
            self.restore(resumed)
        self.started, self.started_seconds = time.perf_counter(), self.state.seconds
        self.log: MetricsLog | None = None
        if self.accelerator.is_main_process:
            self.checkpoints.rewind(resumed.name if resumed else None)
            write_json(folder / "config.json", to_dict(cfg))
            self.log = MetricsLog(folder / "metrics.jsonl", self.state.step)
        self.accelerator.wait_for_everyone()

    def open_folder(self, resume: Path | None) -> Resumed | None:
        """What to continue from; None at the start of a run. Nothing is changed yet."""
        if resume is not None:
            check_same_run(self.folder, self.cfg)
            return read_checkpoint(resume, self.cfg.trainer.keep)
        if self.checkpoints.index()["last"] and not self.cfg.force:
            raise UserError(
                f"{self.folder} already holds a run; continue it with resume={self.folder}, or overwrite it with "
                "force=true."
            )
        return None

    def restore(self, resumed: Resumed) -> None:
        """Puts optimizer, counters and curriculum back. Raises UserError if data or processes are others now."""
        before = resumed.state
        if before.data != self.state.data:
            raise UserError(f"The data of {self.folder} changed since it was trained; start a new run.")
        if before.processes != self.state.processes:
            raise UserError(
                f"{self.folder} was trained by {before.processes} processes, not {self.state.processes}; resume it "
                "with as many, or its batches would be others."
            )
        if before.torch != torch.__version__:
            self.say(f"note: trained with torch {before.torch} so far; losses may differ in the last digits")
        self.state = before
        self.curriculum.load(before.curriculum)
        load_state_tensors(self.model, self.optimizer, resumed.optimizer)

    def run(self, progress: Progress | NullProgress) -> TrainResult:
        """All steps that are left."""
        interrupted = False
        try:
            with progress.task(f"train {self.cfg.model}", self.cfg.trainer.steps) as bar:
                bar.advance(self.state.step)
                window = time.perf_counter(), self.state.tokens
                while self.state.step < self.cfg.trainer.steps and not interrupted:
                    stats = self.step()
                    interrupted = stats.stop and self.state.step < self.cfg.trainer.steps
                    window = self.after_step(stats, window, interrupted)
                    bar.advance(1)
        finally:
            if self.log:
                self.log.close()
        if interrupted:
            self.say(
                f"Interrupted at step {self.state.step} and saved; go on with: infini-bench train resume={self.folder}"
            )
        return self.result(interrupted)

    def step(self) -> StepStats:
        """One update of the weights."""
        cfg, rows, segments = self.cfg.trainer, self.curriculum.rows, self.curriculum.segments
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        torch.manual_seed(np.random.SeedSequence([self.cfg.seed, self.state.step, rank]).generate_state(1)[0].item())
        rates = set_lr(self.optimizer, self.state.step + 1, cfg)
        sums = torch.zeros(3, device=self.accelerator.device)
        tokens = 0
        for micro in range(cfg.accumulate):
            cursor = self.state.cursor + (micro * processes + rank) * rows
            batch = self.task.batch(cursor, rows, segments)
            with self.accelerator.accumulate(self.net):
                loss, parts = self.forward(batch)
                self.accelerator.backward(loss)
            sums += torch.cat([loss.detach()[None], parts])
            tokens += batch.weights.numel() * processes
        norm = self.accelerator.clip_grad_norm_(grouped_parameters(self.optimizer), cfg.clip)
        stop = torch.tensor([float(self.stop.requested)], device=sums.device)
        sums = self.accelerator.reduce(torch.cat([sums, stop]), "sum")
        total, task_sum, task_count, stops, grad_norm = torch.cat([sums, norm.detach()[None]]).tolist()
        mean = total / (cfg.accumulate * processes)
        self.check_finite(mean, grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.step += 1
        self.state.cursor += rows * cfg.accumulate * processes
        self.state.tokens += tokens
        self.state.loss = mean
        task_loss = task_sum / task_count
        self.curriculum.update(task_loss)
        return StepStats(mean, task_loss, grad_norm, rates, tokens, segments, stops > 0)
