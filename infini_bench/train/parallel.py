"""Several processes: each with the whole model (DDP, by accelerate) or with a share of it (FSDP2, by torch).

accelerate knows the processes, their devices and precision, and reduces; it shards on GPUs only, so that
torch's own ``fully_shard`` is called here, on any device alike.
"""

from __future__ import annotations

import os

from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from infini_bench.errors import UserError
from infini_bench.schema import TrainerConfig


def check_launcher(trainer: TrainerConfig) -> None:
    """Raises UserError if the launcher was told to shard, which is a setting of the run here, or if it is
    ``accelerate launch --cpu``: that starts one process, whatever its ``--num_processes`` says.
    """
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true" and "RANK" not in os.environ:
        raise UserError("accelerate launch --cpu starts one process only; start several with torchrun.")
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise UserError("Launch without --use_fsdp and set trainer.parallel=fsdp: the record then says so.")
    if trainer.parallel == "fsdp" and "RANK" not in os.environ:
        raise UserError("trainer.parallel=fsdp shares a model among processes; start it with torchrun.")


def shard(loss: nn.Module, layers: nn.ModuleList, accelerator: Accelerator) -> None:
    """Gives each process its share of every layer's parameters and of all others, in place.

    Parameters, gradients and optimizer states become DTensors, float32; a layer is gathered while it runs.
    """
    loss.to(accelerator.device)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(loss, mesh=mesh)


def full(x: Tensor) -> Tensor:
    """The whole of a tensor that may be shared out; every process must ask, in the same order."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shared_like(x: Tensor, parameter: Tensor) -> Tensor:
    """This process's share of a whole tensor, as the parameter of the same shape is shared out."""
    if not isinstance(parameter, DTensor):
        return x
    return distribute_tensor(x.to(parameter.device), parameter.device_mesh, parameter.placements)
