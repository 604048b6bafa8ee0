"""A task of a few bytes and the runs of the training tests, also those in processes that get killed."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from infini_bench.data import Tokenizer, build_tokenizer
from infini_bench.schema import DataConfig, DecoderConfig, LMConfig, MemoryConfig, RunConfig, TrainerConfig
from infini_bench.tasks.base import Batch
from infini_bench.train import loop, train

SEGMENT = 8
PATTERN = np.array([3, 1, 4, 1, 5, 9, 2, 6])


@dataclass
class FakeTask:
    """Rows are a repeated pattern that starts somewhere, a function of seed, split and row number."""

    cfg: RunConfig
    tokenizer: Tokenizer
    version: str = "1"
    fingerprint: str = "0123456789abcdef"
    weight: float = 1.0  # of every target, times 1 / T

    def check_training(self) -> None:
        """It can be trained on anything."""

    def batch(self, cursor: int, rows: int, segments: int | None = None, split: str = "train") -> Batch:
        length = (segments or 3) * SEGMENT
        starts = [
            np.random.default_rng([self.cfg.seed, len(split), cursor + r]).integers(8) for r in range(rows)
        ]
        tokens = np.stack([np.resize(np.roll(PATTERN, -s), length + 1) for s in starts])
        weights = torch.full((rows, length), self.weight / rows / length)
        return Batch(torch.from_numpy(tokens), weights)


def run_config(**trainer) -> RunConfig:
    """A model of two layers that steps in milliseconds."""
    settings = {"steps": 8, "batch": 2, "warmup": 2, "log_every": 1, "save_every": 2, "validate_rows": 3}
    return RunConfig(
        device="cpu",
        decoder=DecoderConfig(layers=2, dim=16, heads=2, ffn=16),
        memory=MemoryConfig(segment=SEGMENT),
        data=DataConfig(tokenizer="bytes"),
        task=LMConfig(),
        trainer=TrainerConfig(**{**settings, **trainer}),
    )


def fake_task(cfg: RunConfig, tokenizer: Tokenizer | None = None) -> FakeTask:
    return FakeTask(cfg, tokenizer or build_tokenizer(cfg.data, lambda: []))


def train_in_child(
    cfg: RunConfig, folder: Path, die_at: int | None = None, environment: dict | None = None
) -> None:
    """Trains in this process, which kills itself at its ``die_at``-th forced write, rename or batch."""
    os.environ.update(environment or {})
    torch.set_num_threads(1)
    loop.build_task = fake_task
    if die_at is not None:
        arm(die_at)
    train(cfg, folder)


def arm(die_at: int) -> None:
    """Lets the process die just before one of the moments at which something could be left half done."""
    moments = 0

    def mortal(function):
        def wrapper(*args, **kwargs):
            nonlocal moments
            moments += 1
            if moments == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    os.fsync, os.rename, os.replace = mortal(os.fsync), mortal(os.rename), mortal(os.replace)
    FakeTask.batch = mortal(FakeTask.batch)
