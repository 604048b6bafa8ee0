"""The tasks, one file each: what a model trains on and how it is judged; import ``infini_bench.tasks``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if "." not in __name__:
    raise ImportError("import infini_bench.tasks, not tasks: two copies of a module would differ")

if TYPE_CHECKING:
    from infini_bench.data import Tokenizer
    from infini_bench.schema import RunConfig

    from .base import Task

TASKS = {  # module -> class
    "lm": "LM",
    "passkey": "Passkey",
    "needles": "NeedlesTask",
    "booksum": "Booksum",
    "recall": "Recall",
    "mqar": "MQAR",
    "footprint": "Footprint",
    "capacity": "Capacity",
    "reach": "Reach",
    "efficiency": "Efficiency",
}


def build_task(cfg: RunConfig, tokenizer: Tokenizer | None = None) -> Task:
    """The task that ``cfg.task.name`` names. tokenizer: that of a checkpoint; unset = the task's own."""
    from infini_bench.errors import UserError
    from infini_bench.units import suggest

    name = cfg.task.name
    if name not in TASKS:
        raise UserError(f'There is no task "{name}"{suggest(name, TASKS)}; choose one of {", ".join(TASKS)}.')
    return getattr(import_module(f".{name}", __name__), TASKS[name])(cfg, tokenizer)
