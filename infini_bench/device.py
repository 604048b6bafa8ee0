"""The machine a run uses: its device, and the most memory that a job of it held."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from infini_bench.errors import UserError
from infini_bench.rules import check_value


def torch_device(name: str) -> torch.device:
    """Raises UserError if a GPU is asked for and not there, and for what is neither a CPU nor a GPU."""
    check_value("device", name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device={name} was asked for, but PyTorch sees no GPU; use device=auto.")
    return torch.device(name)


@contextmanager
def computing(device: torch.device, precision: str) -> Iterator[None]:
    """Inside, a model computes in ``precision``: float32 as its weights are, or bf16 (autocast).

    A memory's own float32 products stay float32, not TF32 as in training: over a million tokens a delta rule
    multiplies tens of thousands of matrices near the identity, and their rounding decides what is left.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def reset_peak(device: torch.device) -> None:
    """Start counting peak memory anew, so that the jobs of a sweep do not inherit each other's.

    On a CPU first what was freed goes back to the system: the C library may keep hundreds of MiB of it.
    """
    clear = Path("/proc/self/clear_refs")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)
    if clear.exists():
        with suppress(OSError):  # some containers forbid it; then the peak is that of the process's life
            clear.write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Most memory since `reset_peak`: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return (peaks[0] if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024
