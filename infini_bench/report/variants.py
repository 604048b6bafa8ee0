"""What tells runs apart: the settings that decide a result, and those that a table's row must name."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, fields
from typing import Any

from infini_bench.config import TASKS
from infini_bench.report.cells import is_shape
from infini_bench.report.records import UNHASHED, Record
from infini_bench.schema import EXTRACTIVE, MemoryConfig, RunConfig
from infini_bench.unread import reads

VIEWS = ("diag_features", "diag_gates", "diag_local")  # plans whose runs, of several tasks, share a table
BY_BASE = ("table3_passkey", "table3_hard")  # whose sheets are of one pretrained model, or from scratch
# How a run is computed, saved and watched: no number depends on it beyond rounding.
NEUTRAL = (
    *("trainer.compile", "trainer.checkpoint_segments", "trainer.log_every", "trainer.validate_every"),
    *("trainer.validate_rows", "trainer.save_every", "trainer.keep", "memory.backend", "memory.index"),
    *("task.compile", "task.memory.backend", "task.memory.index"),
)
# What an evaluation covers, not what it measures: runs that differ in it may meet in one line of a table.
COVERAGE = (
    *("task.lengths", "task.depths", "task.trials", "task.batch", "task.chunk", "task.controls"),
    *("task.segments_after", "task.fillers", "task.pairs", "task.kinds", "task.questions"),
    *("task.gates", "task.baseline", "task.samples", "task.kind"),
    *("task.map_tokens", "task.map_new_tokens", "task.any_alignment"),  # they stand in the protocol
    *("task.after", "task.keys", "task.ratios", "task.per_segment", "task.distances", "task.between"),
    *("task.level", "task.modes", "task.forms", "task.against", "task.vs", "task.decode", "task.repeats"),
    "task.seconds",
)
# What makes a memory another one than the paper's: named in the variant even where nothing else differs.
DEFINING = (
    *(
        "memory.features",
        "memory.normaliser",
        "memory.decay",
        "memory.write_gate",
        "memory.write_start",
        "memory.write_split",
        "memory.write_cost",
        "memory.write_floor",
        "memory.floor_trained",
        "memory.gradient_depth",
    ),
    *("memory.gate_start", "memory.gate_split", "memory.gate_input", "memory.gate_frozen"),
)
WEIGHTS = ("decoder", "memory", "base", "trainer", "scale")  # settings of what has weights
# Known by the name of the file or folder: where that lies on a machine decides nothing.
PLACED = ("base.model", "data.path", "data.tokenizer", "memory.kind", "task.memory.kind")
# What follows from settings, or from files that have changed: named where no setting tells two runs apart.
DERIVED = ("trained.steps", "data_fingerprint", "tokenizer_fingerprint")
# Settings of a training, which name no row of a pretrained model that was asked as it is.
OF_TRAINING = (
    *("trainer.", "trained.", "base.freeze", "base.lora", "base.save", "decoder.init_std", "task.train_"),
    *("task.segments", "task.own_segment", "task.crossing", "task.straddling", "task.text_share"),
    "task.lm_weight",
)
# Of the stages before a training their own settings; those of the model are the training's, too.
OF_STAGES = ("task.", "data.", "trainer.")
NOT_OF_STAGES = "task.split"  # what a stage would be asked on
MEASURED_WITH = ("task_version", "data_fingerprint", "tokenizer_fingerprint")


def variants_of(shown: list[tuple[Record, str]]) -> dict[tuple[str, str], str | None]:
    """(Record id, table) -> the settings that tell it from others of the same scale, machine, corpus.

    A memory's own settings are compared among runs of its model, all others among all runs. DEFINING settings
    that are not at their default, those of the paper, are always named, DERIVED ones only where they have to.
    In VIEWS a model's memory is compared among the runs of all tasks, which then stand in one line.
    What some evaluations of a model change in its memory (``task.memory``), others have as it was trained.
    """
    default = {f"memory.{key}": _text(value) for key, value in asdict(MemoryConfig()).items()}
    groups: dict[tuple, list[tuple[tuple[str, str], dict[str, str]]]] = defaultdict(list)
    views: dict[tuple, list[dict[str, str]]] = defaultdict(list)  # a model's setups in a table of VIEWS
    for r, table in shown:
        task = r.config["task"]
        place: tuple = (table, r.kind, r.task, r.config["scale"], r.device, r.config["data"]["name"])
        place += (task.get("split"), task.get("joined", False), task.get("level"))  # lines of their own
        place += (r.config["model"],) if weightless(r.config) else ()
        place += (pretrained(r.config),) if table in BY_BASE else ()
        setup = setup_of(r, "task.protocol" if _has_column(r, table) else None)
        place += (_shape(r),)
        groups[place].append(((r.id, table), setup))
        views[table, r.config["scale"], setup["model"]].append(setup)
    names: dict[tuple[str, str], str | None] = {}
    for place, group in groups.items():
        group = [(run, _as_asked(setup, [other for _, other in group])) for run, setup in group]
        keys = sorted({key for _, setup in group for key in setup})
        for run, setup in group:
            same = [other for _, other in group if other["model"] == setup["model"]]
            rivals = {key: same if of_memory(key) else [other for _, other in group] for key in keys}
            if place[0] in VIEWS:
                beside = views[place[0], setup["scale"], setup["model"]]
                rivals |= {key: beside for key in keys if key.startswith("memory.") and of_memory(key)}
            # among those that have the setting: where one does not, another setting says so
            differing = [key for key in keys if len({o[key] for o in rivals[key] if key in o}) > 1]
            differing = [key for key in differing if key not in DERIVED]
            differing = [key for key in differing if key != "model"]
            own = {key for key in DEFINING if setup.get(key, default[key]) != default[key]}
            named = sorted({*differing, *own, *_decisive(setup, [other for _, other in group], keys)})
            names[run] = " ".join(f"{key}={setup[key]}" for key in named if key in setup) or None
    return names


def _as_asked(setup: dict[str, str], others: list[dict[str, str]]) -> dict[str, str]:
    """``setup`` with a value for each ``task.memory`` setting of its model's: its own, or the trained one."""
    same = [other for other in others if other["model"] == setup["model"]]
    changed = {key for other in same for key in other if key.startswith("task.memory.")}
    trained = {key: setup[own] for key in changed if (own := key.removeprefix("task.")) in setup}
    return {**trained, **setup}


def _decisive(setup: dict[str, str], others: list[dict[str, str]], keys: list[str]) -> list[str]:
    """Those of DERIVED that alone tell a run from others on its budget."""
    shared = [key for key in keys if key not in DERIVED and not of_memory(key)]
    alike = [other for other in others if all(other.get(key) == setup.get(key) for key in shared)]
    found = []
    for key in DERIVED:
        same = [other for other in alike if other.get(key) == setup.get(key)]
        found += [key] if len(same) < len(alike) else []
        alike = same
    return found


def _has_column(record: Record, table: str) -> bool:
    """Whether the protocol of a run's training stands in a column of the table, so that it names no row."""
    shown = {row.get("protocol") for row in record.metrics} - {None}
    trained = str(record.config["task"].get("protocol"))
    return table not in VIEWS and bool(shown) and all(str(name).startswith(trained) for name in shown)


def _shape(record: Record) -> frozenset[str]:
    """b1-h8-d128-n2048: the size of what was timed, which names its rows in `efficiency`."""
    if record.task != "efficiency":
        return frozenset()
    words = (str((row.get("extra") or {}).get("variant")) for row in record.metrics)
    return frozenset(filter(is_shape, words))  # the others: peers


def pretrained(config: dict[str, Any]) -> str | None:
    """The pretrained model that was adapted, without its folder; None from scratch."""
    model = (config.get("base") or {}).get("model")
    return _place(model)


def _place(path: str | None) -> str | None:
    """The name of a file or folder, without where it lies."""
    return None if path is None else str(path).rstrip("/").rpartition("/")[2]


def weightless(config: dict[str, Any]) -> bool:
    """Whether what was evaluated has no weights: settings of a model say nothing about it."""
    return config["task"].get("baseline") in EXTRACTIVE


def of_memory(key: str) -> bool:
    """Whether a setting belongs to the memory rather than to the budget that all models share.

    The feed-forward's width does: it makes room for a memory's parameters, so that all models have as many.
    """
    memory = key.startswith(("memory.", "task.memory")) and key != "memory.segment"
    return memory or key in ("model", "decoder.ffn")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def setup_of(record: Record, but: str | None = None) -> dict[str, str]:
    """All that decides the result but the seed, flat: ``{"memory.segment": "64", ...}``.

    A setting younger than the record has its default, which is how the run behaved; one that its memory does
    not read is left out, and so is ``but``. No path is among it.
    """
    flat: dict[str, str] = {}
    left_out = {*COVERAGE, *NEUTRAL, "data.cache_dir", but}
    left_out |= {"data.path"} if record.kind == "eval" else set()  # it has the fingerprint
    if chosen(record):
        left_out -= {"trainer.validate_every", "trainer.validate_rows"}  # they decide which checkpoint it is
    if record.task == "efficiency":
        left_out -= {"trainer.compile", "trainer.checkpoint_segments", "memory.backend"}  # speed does

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else key, item)
        elif prefix not in left_out:
            flat[prefix] = _text(_place(value) if prefix in PLACED else value)

    known = asdict(RunConfig(task=TASKS[record.task]()))
    without = {*UNHASHED, "seed", *(WEIGHTS if weightless(record.config) else ())}
    for config in (known, record.config):
        walk("", {key: value for key, value in config.items() if key not in without})
    given = record.config.get("memory", {})
    memory = MemoryConfig(**{f.name: given[f.name] for f in fields(MemoryConfig) if f.name in given})
    for name in (f.name for f in fields(MemoryConfig) if not reads(memory, f.name)):
        flat.pop(f"memory.{name}", None)
    if record.kind == "train":  # of one that failed no more is known, and it stands beside its finished seeds
        return {key: value for key, value in flat.items() if not key.startswith("task.memory.")}
    walk("", {key: getattr(record, key) for key in MEASURED_WITH})
    flat.pop("task.train_kind", None)  # an evaluation's own says nothing of what its model learned
    if pretrained(record.config) and "id" not in record.train:  # asked as it is
        flat = {key: value for key, value in flat.items() if not key.startswith(OF_TRAINING)}
        # where no protocol tells it from a trained one, this does
        return flat if but else {**flat, "trained.task": "null"}
    trained = {key: record.train.get(key) for key in ("task", "data", "steps", "train_kind")}
    if chosen(record):  # which step it was is a result
        trained["steps"] = record.config["trainer"]["steps"]
    walk("trained", {**trained, "corpus": _place(record.train.get("path"))})
    if pretrained(record.config):
        before = record.train.get("before")
        flat["trained.before"] = _stages(before) if before else "nothing"
        flat |= _settings_before(before)
    return flat


def chosen(record: Record) -> bool:
    """Whether a training stands for its best checkpoint."""
    return bool(record.config["trainer"].get("best"))


def _stages(record: Record) -> str:
    """The stages up to a training that others go on from (`adapted.rooted`), in words."""
    before, corpus = record.train.get("before"), record.config["data"]
    own = f"{record.task} on {_place(corpus.get('path')) or corpus['name']}"
    return f"{_stages(before)}, then {own}" if before else own


def _settings_before(record: Record | None) -> dict[str, str]:
    """What decided the result of the stages up to a training, as `setup_of`: ``before.task.sequence``, ..."""
    if record is None:
        return {}
    setup = setup_of(record).items()
    own = {key: value for key, value in setup if key.startswith(OF_STAGES) and key != NOT_OF_STAGES}
    own |= _settings_before(record.train.get("before"))
    return {f"before.{key}": value for key, value in own.items()}
