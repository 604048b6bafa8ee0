"""Training: loop, schedule, curriculum, checkpoints and exact resume. Needs torch, so import it late."""

from infini_bench.train.checkpoint import load_checkpoint_model
from infini_bench.train.loop import TrainResult, train

__all__ = ["TrainResult", "load_checkpoint_model", "train"]
