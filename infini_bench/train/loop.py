"""The training loop: one budget, one optimizer and one log for every memory and task."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from infini_bench.config import to_dict
from infini_bench.device import peak_bytes
from infini_bench.errors import UserError
from infini_bench.files import write_json
from infini_bench.memory.base import forms
from infini_bench.models import MemoryLlamaForCausalLM, build_model, save_model
from infini_bench.origin import trained_config
from infini_bench.outside import is_outside
from infini_bench.pretrained import adapted_model, freeze, is_added, save_changes
from infini_bench.progress import NullProgress, Progress
from infini_bench.schema import RunConfig, TrainerConfig
from infini_bench.signals import StopRequest
from infini_bench.tasks import build_task
from infini_bench.train.checkpoint import Checkpoints, find_checkpoint
from infini_bench.train.curriculum import Curriculum
from infini_bench.train.device import build_accelerator
from infini_bench.train.log import MetricsLog, read_log
from infini_bench.train.optim import load_state_tensors, lr_factor, state_tensors
from infini_bench.train.parallel import full
from infini_bench.train.state import (
    Resumed,
    TrainState,
    check_same_run,
    read_checkpoint,
    run_of,
    tokens_so_far,
)
from infini_bench.train.step import Stepper, StepStats

Tensors = dict[str, torch.Tensor]
GATE_STEPS = 12  # whose gates a run's record keeps


@dataclass(frozen=True)
class TrainResult:
    """What a run gave. Losses in nats; ``best_loss`` is the lowest validation loss, None before the first."""

    folder: Path
    checkpoint: Path  # the last one
    steps: int
    tokens: int
    tokens_before: int
    seconds: float
    final_loss: float | None
    best_loss: float | None
    grad_norm_mean: float | None  # over all steps, before clipping
    grad_norm_max: float | None
    parameters: int
    non_embedding_parameters: int
    trained_parameters: int
    memory_parameters: int
    segmentwise: bool  # segments run one after the other
    state_floats: int
    peak_bytes: int
    task_version: str
    data_fingerprint: str
    tokenizer_fingerprint: str
    interrupted: bool
    # of logged steps: {"step", "gates": sigmoid(beta) (layers, H)}; empty without gates
    gates: list[dict[str, Any]] = field(default_factory=list)
    forms: list[str] = field(default_factory=list)  # that computed the memory, see `memory.base.forms`


def train(cfg: RunConfig, folder: Path, progress: Progress | NullProgress | None = None) -> TrainResult:
    """Trains ``cfg`` in ``folder``, or goes on with the run (or run's checkpoint) that ``cfg.resume`` names.

    Raises UserError for what the user can put right: a folder in use, a damaged checkpoint, a full disk, a
    loss that is no number. SIGINT and SIGTERM end the run after the current step with a checkpoint.
    """
    resume = Path(cfg.resume) if cfg.resume else None
    with StopRequest() as stop:
        trainer = Trainer(cfg, run_of(resume) if resume else Path(folder), resume)
        return trainer.run(stop, progress or NullProgress())


class Trainer:
    """One run: everything that is alive between two steps. ``log`` is None but on the main process."""

    def __init__(self, cfg: RunConfig, folder: Path, resume: Path | None) -> None:
        self.cfg, self.folder = cfg, folder
        self.checkpoints = Checkpoints(folder, cfg.trainer.keep)
        resumed = self.open_folder(resume)
        self.accelerator = build_accelerator(cfg)
        self.task = build_task(cfg, resumed.tokenizer if resumed else None)
        self.task.check_training()
        self.model = self.frozen(resumed.model) if resumed else self.new_model()
        self.stepper = Stepper(cfg, self.accelerator, self.task, self.model)
        self.curriculum = Curriculum(cfg.trainer)
        self.state = TrainState(
            tokens_before=tokens_so_far(cfg.base.model),
            processes=self.accelerator.num_processes,
            data=self.task.fingerprint,
        )
        if resumed:
            self.restore(resumed)
        self.log: MetricsLog | None = None
        if self.accelerator.is_main_process:
            self.log = self.prepare_folder(resumed)
        self.accelerator.wait_for_everyone()
        self.window = [0, 0.0]  # tokens and seconds of the steps since the last log line

    def open_folder(self, resume: Path | None) -> Resumed | None:
        """What to continue from; None at the start of a run. Nothing is changed yet."""
        if resume is not None:
            check_same_run(self.folder, self.cfg)
            return read_checkpoint(resume)
        if self.checkpoints.index()["last"] and not self.cfg.force:
            raise UserError(
                f"{self.folder} already holds a run; continue it with resume={self.folder}, or overwrite it "
                "with force=true."
            )
        return None

    def prepare_folder(self, resumed: Resumed | None) -> MetricsLog:
        """Makes the folder hold the run up to here and no more: no later step, no left-over of a crash."""
        self.checkpoints.rewind(resumed.name if resumed else None)
        for name in ("config.json", "metrics.jsonl"):
            for left_over in self.folder.glob(f".{name}.*"):
                left_over.unlink()
        write_json(self.folder / "config.json", to_dict(self.cfg))
        return MetricsLog(self.folder / "metrics.jsonl", self.state.step)

    def new_model(self) -> MemoryLlamaForCausalLM:
        torch.manual_seed(self.cfg.seed)
        words = self.task.tokenizer.vocab_size
        if self.cfg.base.model is None:
            return build_model(self.cfg.decoder, self.cfg.memory, words)
        model = adapted_model(self.cfg.base, self.cfg.memory, getattr(self.task, "separator", None))
        if words > model.config.vocab_size:
            raise UserError(
                f"The tokenizer has {words} tokens, {self.cfg.base.model} only {model.config.vocab_size}; "
                "set data.tokenizer to the model's own."
            )
        return model

    def frozen(self, model: MemoryLlamaForCausalLM) -> MemoryLlamaForCausalLM:
        """A resumed model, with the same weights frozen as before; one with LoRA comes frozen."""
        if self.cfg.base.freeze and not self.cfg.base.lora:
            freeze(model)
        return model

    def restore(self, resumed: Resumed) -> None:
        """Puts optimizer, counters and curriculum back. Raises UserError if data or processes changed."""
        before, now = resumed.state, self.state
        if before.data != now.data:
            raise UserError(f"The data of {self.folder} changed since it was trained; start a new run.")
        if before.processes != now.processes:
            raise UserError(
                f"{self.folder} was trained by {before.processes} processes, not {now.processes}; resume it "
                "with as many, because its batches depend on their number."
            )
        if before.torch != now.torch:
            self.say(f"Trained with torch {before.torch} so far: from here on, last digits may differ.")
        self.tell_schedule(trained_config(self.checkpoints.folder / resumed.name).trainer, before.step)
        self.state = before
        self.curriculum.load(before.curriculum)
        load_state_tensors(self.model, self.stepper.optimizer, resumed.optimizer)

    def tell_schedule(self, before: TrainerConfig, step: int) -> None:
        """Says so if another number of steps bends the schedule by which the checkpoint was trained."""
        now = self.cfg.trainer
        if now.steps != before.steps:
            old, new = (lr_factor(step, trainer) for trainer in (before, now))
            self.say(
                f"Trained for trainer.steps={before.steps} so far: from step {step} on the learning rate "
                f"follows the schedule of {now.steps} steps, {new:.2g} of trainer.lr after {old:.2g}; it is "
                f"not the run that had {now.steps} steps from its start."
            )

    def run(self, stop: StopRequest, progress: Progress | NullProgress) -> TrainResult:
        """All steps that are left, or those until a stop is requested."""
        steps, interrupted = self.cfg.trainer.steps, False
        try:
            with progress.task(f"train {self.cfg.model}", steps) as bar:
                bar.advance(self.state.step)
                while self.state.step < steps and not interrupted:
                    began, tokens = time.perf_counter(), self.state.tokens
                    stats = self.step(stop)
                    interrupted = stats.stop and self.state.step < steps
                    seconds = time.perf_counter() - began
                    self.state.seconds += seconds
                    self.window = [self.window[0] + self.state.tokens - tokens, self.window[1] + seconds]
                    self.after_step(stats, interrupted)
                    bar.advance(1)
        finally:
            if self.log:
                self.log.close()
        if interrupted:
            kind = self.cfg.memory.kind
            named = f" memory.kind={kind}" if is_outside(kind) else ""  # code is imported if it is named
            words = f"infini-bench train resume={self.folder}{named}"
            self.say(f"Saved at step {self.state.step}; go on with: {words}")
        return self.result(interrupted)

    def step(self, stop: StopRequest) -> StepStats:
        try:
            return self.stepper.step(self.state, self.curriculum, stop)
        except FloatingPointError as error:
            last = self.checkpoints.index()["last"]
            saved = (
                f"the last good checkpoint is {self.checkpoints.folder / last}"
                if last
                else "nothing was saved"
            )
            raise UserError(
                f"{error}; {saved}; lower trainer.lr or trainer.gate_lr, or raise trainer.warmup."
            ) from error

    def after_step(self, stats: StepStats, interrupted: bool) -> None:
        """Validation, log line and checkpoint, where they are due."""
        trainer, step = self.cfg.trainer, self.state.step

        def due(every: int | None) -> bool:
            return step == trainer.steps or (every is not None and step % every == 0)

        validation = self.stepper.validate(self.curriculum.longest) if due(trainer.validate_every) else None
        best = validation is not None and (self.state.best_loss is None or validation < self.state.best_loss)
        if best:
            self.state.best_loss = validation
        if due(trainer.log_every) or validation is not None:
            line = self.line(stats, validation)  # gates that are shared out are gathered by all
            if self.log:
                self.log.write(line)
        if due(trainer.save_every) or best or interrupted:
            self.save(best)

    def line(self, stats: StepStats, validation: float | None) -> dict:
        """The log's line for this step. Losses in nats; rate and peak are those of this process."""
        (tokens, seconds), self.window = self.window, [0, 0.0]
        rates = stats.rates
        line: dict[str, Any] = {
            "step": self.state.step,
            "tokens": self.state.tokens,
            "loss": stats.loss,
            "task_loss": stats.task_loss,
            "lr": rates.get("decay", rates.get("no_decay")),
            "gate_lr": rates.get("gates"),
            "grad_norm": stats.grad_norm,
            "level": stats.segments,
            "tokens_per_s": round(tokens / seconds, 1),
            "peak_bytes": peak_bytes(self.accelerator.device),
        }
        if validation is not None:
            line["validation_loss"] = validation
        gates = self.model.gates()
        if gates is not None:
            parts = {"mean": gates.mean(1), "min": gates.amin(1), "max": gates.amax(1), "all": gates}
            line["gates"] = {name: value.tolist() for name, value in parts.items()}
        found = (getattr(module, "written", None) for module in self.model.modules())
        if written := [w for w in found if isinstance(w, torch.Tensor)]:
            line["write"] = torch.stack(written).tolist()
        return line

    def save(self, best: bool) -> None:
        """Checkpoint of this step, written by the main process; what is shared out is gathered by all."""
        weights = {name: full(p.detach()) for name, p in self.model.named_parameters()}
        optimizer = state_tensors(self.model, self.stepper.optimizer)
        if self.log:
            self.log.sync()
            write = partial(self.write_checkpoint, weights, optimizer)
            self.checkpoints.save(self.state.step, write, best)
        self.accelerator.wait_for_everyone()

    def write_checkpoint(self, weights: Tensors, optimizer: Tensors, folder: Path) -> None:
        self.state.curriculum = self.curriculum.state()
        if self.cfg.base.save == "changes":
            save_changes(self.model, self.cfg.base, folder / "model")
        else:
            save_model(self.model, folder / "model", weights)
        self.task.tokenizer.save(folder / "tokenizer")
        write_json(folder / "config.json", to_dict(self.cfg))
        save_file(optimizer, folder / "optimizer.safetensors")
        write_json(folder / "state.json", self.state.to_dict())

    def result(self, interrupted: bool) -> TrainResult:
        parameters = sum(p.numel() for p in self.model.parameters())
        embeddings: Any = self.model.get_input_embeddings()
        count, total, largest = self.state.grad_norms
        return TrainResult(
            folder=self.folder,
            checkpoint=find_checkpoint(self.folder),
            steps=self.state.step,
            tokens=self.state.tokens,
            tokens_before=self.state.tokens_before,
            seconds=self.state.seconds,
            final_loss=self.state.loss,
            best_loss=self.state.best_loss,
            grad_norm_mean=total / count if count else None,
            grad_norm_max=largest if count else None,
            parameters=parameters,
            non_embedding_parameters=parameters - embeddings.weight.numel(),
            trained_parameters=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            segmentwise=self.model.segmentwise,
            memory_parameters=sum(p.numel() for name, p in self.model.named_parameters() if is_added(name)),
            state_floats=self.model.state_floats(),
            peak_bytes=peak_bytes(self.accelerator.device),
            task_version=self.task.version,
            data_fingerprint=self.task.fingerprint,
            tokenizer_fingerprint=self.task.tokenizer.fingerprint,
            interrupted=interrupted,
            gates=gate_history(self.folder / "metrics.jsonl") if self.log else [],
            forms=forms(self.model),
        )

    def say(self, text: str) -> None:
        """Tells the user something, once however many processes there are."""
        if self.accelerator.is_main_process:
            print(text, file=sys.stderr)


def gate_history(log: Path) -> list[dict[str, Any]]:
    """Gates of at most `GATE_STEPS` logged steps, evenly spread and with the first and the last."""
    lines = [line for line in read_log(log) if "all" in line.get("gates", {})]
    count = min(len(lines), GATE_STEPS)
    chosen = [lines[round(i * (len(lines) - 1) / max(count - 1, 1))] for i in range(count)]
    return [
        {"step": line["step"], "gates": [[round(g, 4) for g in layer] for layer in line["gates"]["all"]]}
        for line in chosen
    ]
