"""Settings that a user gave and that nothing would read or that do not fit: told before any work.

Which kinds read a field of `MemoryConfig` stands in its metadata; a field without is read by all. What a
level of `profile` reads that the other one does not, stands in ``LEVELS``. A command
of several runs (a sweep, a plan) may give a setting that only some of its memories read: a mistake is what
none of them reads. What models, recipes, experiments and plans set is not the user's word and not asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from infini_bench.config import evaluated_memory
from infini_bench.errors import UserError
from infini_bench.outside import is_outside
from infini_bench.rules import check_memory
from infini_bench.schema import LOCALS, EfficiencyConfig, MemoryConfig, RunConfig

KINDS = {f.name: f.metadata["kinds"] for f in dataclasses.fields(MemoryConfig) if "kinds" in f.metadata}

WHOLE = ("task.modes", "task.against", "task.chunk", "task.decode", "memory.backend", "trainer.compile")
LEVELS = {**dict.fromkeys((*WHOLE, "trainer.checkpoint_segments"), "model"), "task.forms": "operator"}


def reads(memory: MemoryConfig, name: str) -> bool:
    """Whether the memory, or the local attention beside it, reads its field ``name``.

    Nobody knows of a memory outside this package: it may read any.
    """
    own = {memory.kind, memory.local} if memory.kind == "compressive" else {memory.kind}
    return name not in KINDS or is_outside(memory.kind) or not own.isdisjoint(KINDS[name])


def check_read(given: Iterable[str], runs: Sequence[RunConfig]) -> None:
    """given: dotted names of what the user set. Raises UserError for one that none of the runs reads.

    ``memory.NAME`` may also be for the memory that only the evaluation has (``task.memory``). That must fit
    the one trained, which only who asks here knows: before, a run has the memory of some other model.
    """
    for cfg in runs:
        check_memory(evaluated_memory(cfg))
    profiled = {cfg.task.level for cfg in runs if isinstance(cfg.task, EfficiencyConfig)}
    for key in given if runs else ():
        if profiled and LEVELS.get(key) not in {None, *profiled}:
            other = f"profile --level {LEVELS[key]}, not by --level {profiled.pop()}"
            raise UserError(f"{key} is read by {other}; leave it out.")
        section, _, name = key.removeprefix("task.").partition(".")
        name = name.partition(".")[0]  # options have names of their own
        if section != "memory" or name not in KINDS:
            continue
        memories = [evaluated_memory(cfg) for cfg in runs]
        memories += [] if key.startswith("task.") else [cfg.memory for cfg in runs]
        if not any(reads(memory, name) for memory in memories):
            beside = [f"compressive with memory.local={kind}" for kind in KINDS[name] if kind in LOCALS]
            readers = ", ".join([*KINDS[name], *beside]) or "FILE.py:CLASS"
            there = ", ".join(dict.fromkeys(memory.kind for memory in memories))
            raise UserError(f"{key} is read by memory.kind={readers}, not by {there}; leave it out.")
