"""From a plain mapping to a checked `RunConfig`, and back. Everything wrong is told in one sentence.

Used for what the command line composed and for the ``config.json`` of a run folder alike.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from infini_bench.errors import UserError
from infini_bench.rules import (
    check_base,
    check_booksum,
    check_decoder,
    check_memory,
    check_needles,
    check_pairs,
    check_passkey,
    check_sources,
    check_value,
)
from infini_bench.schema import (
    BooksumConfig,
    CapacityConfig,
    EfficiencyConfig,
    FootprintConfig,
    LMConfig,
    MemoryConfig,
    MQARConfig,
    NeedlesConfig,
    PasskeyConfig,
    ReachConfig,
    RecallConfig,
    RunConfig,
    TaskConfig,
    TrainedConfig,
)
from infini_bench.units import format_length, parse_depth, parse_length, suggest

TASKS: dict[str, type[TaskConfig]] = {
    "lm": LMConfig,
    "passkey": PasskeyConfig,
    "needles": NeedlesConfig,
    "booksum": BooksumConfig,
    "recall": RecallConfig,
    "mqar": MQARConfig,
    "footprint": FootprintConfig,
    "capacity": CapacityConfig,
    "reach": ReachConfig,
    "efficiency": EfficiencyConfig,
}


def build_config(container: Mapping[str, Any]) -> RunConfig:
    """The run that ``container`` describes; keys left out keep their defaults.

    Raises UserError for an unknown key (with the nearest known one), a value of the wrong type, or a value
    that no run could use.
    """
    task = container.get("task", {})
    name = task.get("name") if isinstance(task, Mapping) else task
    if not isinstance(name, str) or name not in TASKS:
        there = f"choose one of {', '.join(TASKS)}"
        raise UserError(f'There is no task "{name}"{suggest(str(name), TASKS)}; {there}.')
    cfg = _build(RunConfig, container, "", {"task": TASKS[name]})
    for key, value in _leaves(cfg):
        check_value(key, value)
    check_decoder(cfg)
    check_memory(cfg.memory)
    check_sources(cfg)
    check_base(cfg)
    last = cfg.decoder.layers - 1
    if cfg.memory.layers is not None and cfg.base.model is None and max(cfg.memory.layers) > last:
        raise UserError(f"memory.layers={cfg.memory.layers}: the last of the {last + 1} layers is {last}.")
    if isinstance(cfg.task, MQARConfig):
        check_pairs(cfg.task)
    if isinstance(cfg.task, TrainedConfig):
        memory = evaluated_memory(cfg)
        cfg.task.memory = {
            name: getattr(memory, name) for name in cfg.task.memory
        }  # 0 is 0.0 if it is a share
    if isinstance(cfg.task, PasskeyConfig | NeedlesConfig | EfficiencyConfig | BooksumConfig):
        cfg.task.lengths = [format_length(parse_length(length)) for length in cfg.task.lengths]
        if not cfg.task.lengths and not isinstance(cfg.task, BooksumConfig):
            raise UserError("task.lengths must be at least one length, not [].")
    if isinstance(cfg.task, BooksumConfig):
        check_booksum(cfg.task)
    if isinstance(cfg.task, PasskeyConfig | NeedlesConfig):
        cfg.task.depths = [parse_depth(depth) for depth in cfg.task.depths]
    if isinstance(cfg.task, PasskeyConfig):
        check_passkey(cfg.task)
    if isinstance(cfg.task, NeedlesConfig):
        check_needles(cfg.task)
    return cfg


# Starting values of what weights hold by then, and what only a loss or a gradient feels
ONLY_TRAINED = (
    *("gate_start", "gate_split", "gate_frozen", "write_start", "write_split", "write_cost", "decay"),
    *("floor_trained", "gradient_depth"),
)


def evaluated_memory(cfg: RunConfig) -> MemoryConfig:
    """The trained memory with what ``task.memory`` changes for the evaluation.

    Raises UserError for what is no setting of a memory, or of the wrong type. Whether its settings fit one
    another is asked where the trained memory is known (`infini_bench.unread`).
    """
    changes = getattr(cfg.task, "memory", {})
    unknown = [
        key for key in changes if key not in {field.name for field in dataclasses.fields(MemoryConfig)}
    ]
    if unknown:
        raise unknown_setting(f"memory.{unknown[0]}", known_keys(cfg.task.name))
    if spent := [key for key in changes if key in ONLY_TRAINED]:
        raise UserError(f"task.memory.{spent[0]} acts in training alone; leave it out.")
    if "options" in changes:
        changes = {**changes, "options": {**cfg.memory.options, **changes["options"]}}
    memory = _build(MemoryConfig, {**dataclasses.asdict(cfg.memory), **changes}, "task.memory.", {})
    for key, value in _leaves(memory):
        check_value(f"memory.{key}", value)
    return memory


def to_dict(cfg: RunConfig) -> dict[str, Any]:
    """Plain nested dictionaries, as in records and in ``config.json``; `build_config` reads them back."""
    return dataclasses.asdict(cfg)


def known_keys(task: str) -> list[str]:
    """Every dotted key that a run of ``task`` has, sections included (``trainer`` and ``trainer.steps``)."""
    cfg = RunConfig(task=TASKS[task]())
    leaves = [key for key, _ in _leaves(cfg)]
    return sorted({key.rpartition(".")[0] for key in leaves} - {""} | set(leaves))


def unknown_setting(key: str, known: Iterable[str]) -> UserError:
    """The error for a dotted key that does not exist: another task's, misplaced, or misspelt."""
    owners = [task for task in TASKS if key in known_keys(task)]
    if owners:
        return UserError(f"The setting {key} belongs to task={', '.join(owners)}; leave it out.")
    section, _, leaf = key.rpartition(".")
    leaves = {other.rpartition(".")[2]: other for other in known}
    near = suggest(leaf, [name for name, other in leaves.items() if other.rpartition(".")[0] == section])
    near = f' (did you mean "{leaves[leaf]}"?)' if leaf in leaves else near.replace('"', f'"{section}.', 1)
    near = (near or suggest(key, leaves.values())).replace('".', '"')
    return UserError(f'There is no setting "{key}"{near}; `infini-bench train --cfg job` lists all.')


def _build(cls: type, values: Any, prefix: str, subclasses: dict[str, type]) -> Any:
    """An instance of the dataclass ``cls``, strictly from ``values``."""
    if not isinstance(values, Mapping):
        raise UserError(f"{prefix.rstrip('.')} must be a group of settings, not {_shown(values)}.")
    hints = typing.get_type_hints(cls)
    built = {}
    for key, value in values.items():
        if key not in hints:
            raise unknown_setting(f"{prefix}{key}", [f"{prefix}{name}" for name in hints])
        if dataclasses.is_dataclass(hints[key]):
            built[key] = _build(subclasses.get(key, hints[key]), value, f"{prefix}{key}.", {})
            continue
        try:
            built[key] = _convert(hints[key], value)
        except (ValueError, OverflowError) as err:
            wanted = _in_words(hints[key])
            raise UserError(f"{prefix}{key} must be {wanted}, not {_shown(value)}.") from err
    return cls(**built)


def _convert(annotation: Any, value: Any) -> Any:
    """``value`` as the annotated type, where nothing is lost. Raises ValueError if it is of another kind."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if types.NoneType in args:
        return None if value is None else _convert(args[0], value)
    if origin is list and isinstance(value, list):
        return [_convert(args[0], item) for item in value]
    if origin is dict and isinstance(value, Mapping):
        return {_convert(args[0], key): _convert(args[1], item) for key, item in value.items()}
    if annotation is Any:
        return value
    if annotation in (bool, str) and isinstance(value, annotation):
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and (annotation in (float, str) or (annotation is int and int(value) == value)):
        return annotation(value)  # 1e3 is a whole number, 2024 a folder's name
    raise ValueError


def _shown(value: Any) -> str:
    return "empty" if value is None or value == "" else f'"{value}"'


def _in_words(annotation: Any) -> str:
    args = typing.get_args(annotation)
    if types.NoneType in args:
        return _in_words(args[0]) + " or null"
    if typing.get_origin(annotation) is list:
        return "a list such as " + ("[2,4]" if args == (int,) else "[4K,1M]")
    if typing.get_origin(annotation) is dict:
        return "a mapping such as {language: en}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[annotation]


def _leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value
