"""Optimizer, parameter groups and learning-rate schedule.

The rate is a pure function of the step, so nothing of it needs to be stored for an exact resume.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from infini_bench.errors import UserError
from infini_bench.schema import TrainerConfig
from infini_bench.train.parallel import full, shared_like

GATES = ("memory_gate", "memory_decay")


def parameter_groups(model: nn.Module, cfg: TrainerConfig) -> list[dict]:
    """Groups ``gates``, ``writes``, ``no_decay`` and ``decay``, each with its rate before the schedule in
    ``base_lr``.

    A gate is one scalar a head that decides whether the memory is used at all: it has its own rate, and
    decay would pull it to one half. A write gate can have one: at a small rate Adam's steps do not take it
    from open to shut. Norms, biases, embeddings (a tied head included) and a memory's other
    parameters are not decayed. Frozen parameters are in no group.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[str, list] = {"gates": [], "writes": [], "no_decay": [], "decay": []}
    for name, parameter in model.named_parameters():
        leaf = name.split(".")[-1]
        if not parameter.requires_grad:
            continue
        if leaf in GATES:
            kind = "gates"
        elif leaf == "memory_write" and cfg.write_lr is not None:
            kind = "writes"
        elif parameter.ndim < 2 or id(parameter) in embeddings or leaf.startswith("memory_"):
            kind = "no_decay"
        else:
            kind = "decay"
        groups[kind].append(parameter)
    gate_lr = cfg.lr if cfg.gate_lr is None else cfg.gate_lr
    rates = {"gates": gate_lr, "writes": cfg.write_lr, "no_decay": cfg.lr, "decay": cfg.lr}
    decays = {"decay": cfg.weight_decay}
    return [
        {"name": kind, "params": params, "base_lr": rates[kind], "lr": rates[kind]}
        | {"weight_decay": decays.get(kind, 0.0)}
        for kind, params in groups.items()
        if params
    ]


def build_optimizer(model: nn.Module, cfg: TrainerConfig) -> torch.optim.Optimizer:
    """AdamW, or Adafactor as the paper used it (rate times the parameter's root mean square)."""
    groups = parameter_groups(model, cfg)
    if cfg.optimizer == "adamw":
        # fused: one kernel for all parameters of a GPU; by default it is a dozen passes over them
        return torch.optim.AdamW(
            groups, betas=(cfg.beta1, cfg.beta2), fused=torch.cuda.is_available() or None
        )
    if cfg.optimizer == "adafactor":
        for group in groups:
            if group["name"] == "gates":
                # a gate that starts at 0 has no root mean square to be scaled by: its rate is absolute
                group["eps"] = (None, 1.0)
        shared = any(isinstance(p, DTensor) for group in groups for p in group["params"])
        return (SharedAdafactor if shared else torch.optim.Adafactor)(groups)
    raise UserError(f'trainer.optimizer must be "adamw" or "adafactor", not "{cfg.optimizer}".')


class SharedAdafactor(torch.optim.Adafactor):
    """Adafactor of parameters that are shared out among processes; torch's own refuses them.

    Its factored second moment needs norms over whole rows and columns: one parameter after the other is
    gathered, updated by torch's Adafactor on every process alike, and shared out again. States, a row and a
    column each, are kept whole.
    """

    SETTINGS = ("lr", "beta2_decay", "eps", "d", "weight_decay")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            settings = {name: group[name] for name in self.SETTINGS}
            for p in group["params"]:
                if p.grad is None:
                    continue
                whole = nn.Parameter(full(p.detach()).clone())
                whole.grad = full(p.grad)
                one = torch.optim.Adafactor([whole], **settings)
                if p in self.state:
                    one.state[whole] = self.state[p]
                one.step()
                self.state[p] = one.state[whole]
                p.copy_(shared_like(whole.detach(), p))


def lr_factor(update: int, cfg: TrainerConfig) -> float:
    """Share of the base rate at update 1, 2 ... ``steps``: linear warm-up, then a cosine to ``min_lr``."""
    if update <= cfg.warmup:
        return update / cfg.warmup
    progress = (update - cfg.warmup) / (cfg.steps - cfg.warmup)
    return cfg.min_lr + (1 - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, update: int, cfg: TrainerConfig) -> dict[str, float]:
    """Sets every group's rate for this update; returns the rates by group name."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * lr_factor(update, cfg)
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors named ``<parameter>/<key>``, independent of group order."""
    named = {
        f"{name}/{key}": full(value.detach())
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return {name: value.contiguous() for name, value in named.items()}


def load_state_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Puts the tensors of ``state_tensors`` back. Raises KeyError for a tensor of an unknown parameter."""
    own = optimizer.state_dict()
    in_order = [n for group in own["param_groups"] for n in group["params"]]
    numbers = {id(p): n for p, n in zip(grouped_parameters(optimizer), in_order, strict=True)}
    parameters = dict(model.named_parameters())
    by_name = {name: numbers[id(parameter)] for name, parameter in model.named_parameters()}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition("/")
        of_size = key in ("exp_avg", "exp_avg_sq")  # AdamW's; Adafactor's states are kept whole
        share = shared_like(value, parameters[name]) if of_size else value
        state.setdefault(by_name[name], {})[key] = share
    optimizer.load_state_dict({"state": state, "param_groups": own["param_groups"]})


def grouped_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All parameters that are trained."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
