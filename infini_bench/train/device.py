"""The machine a run trains on: device, precision and processes, through accelerate."""

from __future__ import annotations

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState

from infini_bench.errors import UserError
from infini_bench.schema import RunConfig
from infini_bench.train.parallel import check_launcher


def build_accelerator(cfg: RunConfig) -> Accelerator:
    """Device and autocast of ``cfg``; under ``torchrun`` or ``accelerate launch`` DDP over their processes.

    ``auto`` precision is bf16 on a GPU and float32 on a CPU. Raises UserError for a GPU that is not there.
    """
    check_launcher(cfg.trainer)
    gpu = torch.cuda.is_available() and cfg.device != "cpu"
    if cfg.device.startswith("cuda") and not gpu:
        raise UserError(f"PyTorch sees no GPU for device={cfg.device}; use device=cpu or device=auto.")
    if ":" in cfg.device:
        torch.cuda.set_device(torch.device(cfg.device))
    bf16 = gpu if cfg.trainer.precision == "auto" else cfg.trainer.precision == "bf16"
    if bf16 and gpu:
        # the memory's float32 products run in TF32: their factors come from bf16 projections anyway
        torch.set_float32_matmul_precision("high")
    # accelerate keeps the first run's settings for the whole process; the jobs of a sweep have their own
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        cpu=not gpu,
        mixed_precision="bf16" if bf16 else "no",
        gradient_accumulation_steps=cfg.trainer.accumulate,
        # a gate gets no gradient while no sequence is longer than a segment
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)],
    )
