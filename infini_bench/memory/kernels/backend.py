"""Which form computes a call of the compressive memory, eager or Triton: one explicit rule, logged once.

``memory.backend=auto`` runs them on a CUDA device unless ``refusal`` finds something against it; ``eager``
never; ``triton`` always, and raises UserError where they cannot run. A call of one token is never theirs:
launching them costs more than what they compute.
"""

from __future__ import annotations

import logging
import os
from dataclasses import fields
from functools import cache
from importlib.util import find_spec

import torch

from infini_bench.errors import UserError
from infini_bench.memory.blocks import Blocks
from infini_bench.schema import MemoryConfig

log = logging.getLogger(__name__)

UPDATES = ("linear", "delta", "delta_token")
FEATURES = ("elu1", "relu2", "exp")
SIZES = (16, 32, 64, 128)
SHARED = (96 << 10, 192 << 10)  # bytes of shared memory that a program takes, up to head size 64 and above
# Settings that the kernels heed, or that do not touch what they compute; any other must be at its default.
HEEDED = {
    "kind", "segment", "update", "features", "local", "write_start", "write_split", "write_cost",
    "write_floor", "floor_trained", "gate_start", "gate_split", "gate_frozen", "window", "sinks", "stride",
    "compressed", "rate", "compression", "entries", "neighbours", "index", "layer", "layers", "backend",
}  # fmt: skip


@torch.compiler.assume_constant_result  # it asks the driver: traced, that would cut every layer in parts
def _of_device(device: torch.device, shared: int) -> str | None:
    return _asked(device, shared)


@cache
def _asked(device: torch.device, shared: int) -> str | None:
    if not find_spec("triton"):
        return "triton is not installed (pip install 'infini-bench[gpu]')"
    if device.type != "cuda":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else f"the tensors are on {device.type}, not on a CUDA device"
    found = torch.cuda.get_device_properties(device)
    if found.major < 8 or getattr(found, "shared_memory_per_block_optin", 0) < shared:
        return f"{found.name} lacks bfloat16 matrix products or {shared >> 10} KiB of shared memory"
    return None


def unsupported(cfg: MemoryConfig) -> str | None:
    """Which setting has no kernel; None if all have."""
    plain = MemoryConfig()
    if cfg.update == "delta_token":  # alone it has no z, and a write gate
        plain = MemoryConfig(normaliser="none", write_gate=cfg.write_gate)
    names = (f.name for f in fields(cfg) if f.name not in HEEDED)
    other = next((name for name in names if getattr(cfg, name) != getattr(plain, name)), None)
    if cfg.update not in UPDATES:
        return f"there is no kernel for memory.update={cfg.update}"
    if cfg.features not in FEATURES:
        return f"there is no kernel for memory.features={cfg.features}"
    if cfg.write_floor and cfg.features != "relu2":
        return f"there is no kernel for memory.write_floor with memory.features={cfg.features}"
    if other is not None:
        return f"there is no kernel for memory.{other}={getattr(cfg, other)}"
    return None


def refusal(cfg: MemoryConfig, b: Blocks, setting: str | None) -> str | None:
    """Why the kernels cannot run here; None if they can. setting: ``unsupported``, asked once a layer."""
    size, dtypes = b.q_BSQHD.shape[-1], {x.dtype for x in (b.q_BSQHD, b.k_BSKGD, b.v_BSKGD)}
    known = {torch.bfloat16, torch.float16}
    if b.q_BSQHD.device.type == "cpu":
        known.add(torch.float32)  # only Triton's interpreter comes here; the tests want exact sums of it
    if setting is not None:
        return setting
    if size not in SIZES:
        return f"the head size is {size}, not one of {', '.join(map(str, SIZES))}"
    if len(dtypes) > 1 or not dtypes <= known:
        found = " and ".join(sorted(str(t)[6:] for t in dtypes))
        return f"the model computes in {found}, not in bfloat16 or float16"
    if cfg.update == "delta_token" and torch.float16 in dtypes:
        # A segment's map is kept as I - P in halves of bfloat16. Where P has forgotten nearly all, the
        # gradient of the memory before it has 2.5 times the error that float16 leaves the eager form.
        return "there is no kernel for memory.update=delta_token in float16"
    if not isinstance(b.done, int) or not isinstance(b.full, int):
        return "the rows of the batch are padded or at different places"
    return _of_device(b.q_BSQHD.device, SHARED[int(size > 64)])  # torch 2.11 traces no bool as an index


@torch.compiler.assume_constant_result  # a compiled layer tells it while it is traced
def _tell(form: str) -> None:
    _told(form)


@cache
def _told(form: str) -> None:
    log.info("form of the memory: %s", form)


def choose(cfg: MemoryConfig, b: Blocks, setting: str | None) -> str:
    """``triton``, or ``eager`` and why. UserError where ``memory.backend=triton`` asks too much.

    setting: as in ``refusal``.
    """
    device = b.q_BSQHD.device.type
    if cfg.backend == "eager":
        return "eager, as memory.backend=eager"
    if cfg.backend == "auto" and device != "cuda":  # not even in Triton's interpreter
        why: str | None = f"the tensors are on {device}, not on a CUDA device"
    else:
        why = refusal(cfg, b, setting)
    if cfg.backend == "triton" and why:
        raise UserError(f"memory.backend=triton cannot run: {why}; write memory.backend=auto.")
    form = f"eager, as {why}" if why else "triton"
    if cfg.backend == "auto":
        _tell(form)
    return form
