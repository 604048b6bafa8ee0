"""Where a run starts from: the checkpoint that an evaluation reads, the run that a training continues.

``given`` names the settings that the user set (dotted, or a whole section such as ``data``); None means that
a program built the configuration on purpose and all of its task and data count.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from infini_bench.config import build_config, to_dict
from infini_bench.errors import UserError
from infini_bench.files import read_json
from infini_bench.report.records import KILLED, Record, read_records
from infini_bench.schema import RunConfig, TrainedConfig
from infini_bench.units import suggest
from infini_bench.unread import check_read

Values = dict[str, Any]
PACKAGE = Path(str(files("infini_bench")))
MODELS = Path(str(files("infini_bench.conf"))) / "model"

TRAINED = ("decoder", "memory", "base", "trainer", "data.tokenizer", "data.vocab_size")  # fixed by training
PLACES = ("device", "runs", "records", "force", "resume", "data.cache_dir")  # no part in what a run computes
OWN_SYMBOLS = ("recall", "mqar")  # tasks whose models know no other
MIXES = ("scale", "recipe", "experiment")  # groups whose choice sets the task's own settings
EXPORTED = (
    "is an exported folder, which says nothing of its training: give the run that it is from, as in "
    "`infini-bench eval TASK --checkpoint RUN`; the verbs lm-eval, remember and answer take the folder."
)


def find_origin(cfg: RunConfig, model: str | None = None) -> tuple[Path, str]:
    """The checkpoint folder to evaluate, and how to call it.

    ``cfg.checkpoint`` is a run or checkpoint folder, the name of a run or of a model, or (a shipped model)
    ``shipped/<task>``; unset, the shipped model or the latest finished run. model: only this one will do, and
    the shipped one only if there is no finished run of it.
    """
    from infini_bench.train.checkpoint import find_checkpoint

    path, words = _origin(cfg, model)
    if is_exported(path):
        raise UserError(f"{path} {EXPORTED}")
    path = find_checkpoint(path)
    return path, words + _how_far(cfg, path)


def _how_far(cfg: RunConfig, path: Path) -> str:
    """``, step 10 of 300, training failed`` of a checkpoint before its run's last step; else nothing."""
    if not (path / "state.json").exists():
        return ""
    step, steps = read_json(path / "state.json")["step"], trained_config(path).trainer.steps
    if step is None or step >= steps:
        return ""
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    last = max(records_of(cfg, run), key=lambda r: (r.started, r.id), default=None)
    status = "done" if last is None else "unfinished" if last.error == KILLED else last.status
    return f", step {step} of {steps}" + ("" if status == "done" else f", training {status}")


def _origin(cfg: RunConfig, model: str | None) -> tuple[Path, str]:
    if cfg.checkpoint is not None:
        for path in (Path(cfg.checkpoint), Path(cfg.runs) / cfg.checkpoint, PACKAGE / cfg.checkpoint):
            if path.exists():
                return path, f"checkpoint {path}"
        run = latest_run(cfg, cfg.checkpoint)
        if run is None:
            names = sorted(path.stem for path in MODELS.glob("*.yaml"))
            if cfg.checkpoint in names:
                on = f" on {cfg.task.name}" if cfg.task.name in OWN_SYMBOLS else ""
                words = f"`infini-bench train task={cfg.task.name} model={cfg.checkpoint}`"
                raise UserError(f"{cfg.checkpoint} has no finished run{on}: train it first, {words}.")
            raise UserError(
                f'The checkpoint "{cfg.checkpoint}" is neither a folder nor a model with a finished run'
                f"{suggest(cfg.checkpoint, names)}; `infini-bench ls runs` lists what there is."
            )
        return run, f"{run}, the latest finished run of {cfg.checkpoint}"
    shipped = PACKAGE / "shipped" / cfg.task.name
    ships = trained_config(shipped).model if shipped.is_dir() else None
    if ships and model is None:
        return shipped, f"the shipped model, {ships}"
    run = latest_run(cfg, model)
    if run is None and ships == model is not None:
        return shipped, f"the shipped model, {ships}, of which there is no finished run here"
    if run is None:
        wanted = f" model={model}" if model else ""
        raise UserError(
            f"There is no finished run to evaluate; run `infini-bench train task={cfg.task.name}{wanted}` "
            "first, or name a folder with --checkpoint."
        )
    return run, f"{run}, the latest finished run" + (f" of {model}" if model else "")


def find_model(name: str, cfg: RunConfig | None = None, given: Collection[str] = ()) -> tuple[Path, str]:
    """As `find_origin` of checkpoint ``name``, or a folder that ``export`` wrote: for verbs without a task.

    Raises UserError if ``given`` names another model or memory than is there.
    """
    cfg = replace(cfg or RunConfig(), checkpoint=name)
    folder = Path(name)
    if folder.is_dir() and not any((folder / part).exists() for part in ("checkpoints", "checksums.json")):
        if "model" in given or "memory.kind" in given:
            kind = read_json(folder / "config.json").get("memory", {}).get("kind")
            if kind != cfg.memory.kind:
                raise UserError(f"{name} holds memory.kind={kind}, not {cfg.memory.kind}; leave that out.")
        return folder, name
    path, words = find_origin(cfg)
    check_fixed(cfg, trained_config(path), given)
    return path, words


def is_exported(folder: Path) -> bool:
    """Whether ``export`` wrote ``folder``: a model and its tokenizer side by side, and nothing else."""
    from infini_bench.data.tokenizers import KIND_FILE

    return all((folder / name).exists() for name in ("config.json", KIND_FILE))


def given_model(cfg: RunConfig, given: Collection[str] | None) -> str | None:
    """The model that the user named; None if any will do."""
    return cfg.model if given is not None and "model" in given else None


def untrained(cfg: RunConfig) -> tuple[None, str]:
    """As `find_origin`, for a task that asks random weights."""
    if cfg.checkpoint is not None:
        raise UserError(
            f"eval {cfg.task.name} asks random weights; leave --checkpoint out and name a model=."
        )
    return None, f"{cfg.model} with random weights"


def attached(cfg: RunConfig) -> tuple[None, str]:
    """As `find_origin`, for a pretrained model to which nobody has trained the memory yet."""
    from infini_bench.pretrained import is_own, looks_local

    name, task = str(cfg.base.model), cfg.task
    if isinstance(task, TrainedConfig) and task.memory:
        raise UserError(f"{name} has had no training; give memory.NAME, not task.memory.NAME.")
    if is_own(name):
        raise UserError(f"{name} is a run; evaluate it with --checkpoint, not as a base.")
    if looks_local(name) and not Path(name).exists():
        raise UserError(f"{name} is no folder or file; give a hub id, a folder or a .gguf file.")
    if is_exported(Path(name)):
        raise UserError(f"{name} {EXPORTED}")
    return None, f"{cfg.base.model} with {cfg.model} attached and nothing trained"


def bare_base(cfg: RunConfig) -> bool:
    """Whether a pretrained model is to be evaluated, not a checkpoint of ours."""
    return cfg.base.model is not None and cfg.checkpoint is None and not cfg.task.untrained


def weightless(cfg: RunConfig, given: Collection[str] | None) -> RunConfig:
    """``cfg`` under the name of its baseline, of all books unless the user set how many.

    Recipes do so for models, which take long. Raises UserError for settings of a model, which has no part.
    """
    task: Any = cfg.task
    name = str(task.baseline)
    if cfg.checkpoint is not None:
        raise UserError(f"The baseline {name} has no weights; leave --checkpoint out.")
    for key in given or ():
        if key == "model" or (key.startswith((*TRAINED, "task.memory")) and not key.startswith("data.")):
            raise UserError(f"The baseline {name} is no model; leave {key} out.")
    if given is not None and "task.max_books" not in given:
        task = replace(task, max_books=None)
    return replace(cfg, model=name, task=task)


def checkpoint_name(path: Path) -> str:
    """How a record calls a checkpoint; `find_origin` finds it again, a shipped model's also elsewhere."""
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else str(path)


def latest_run(cfg: RunConfig, model: str | None) -> Path | None:
    """Folder of the newest finished run that is still there; one trained on ``cfg``'s task goes first.

    Of the tasks with symbols of their own, only such a one will do.
    """
    runs = [r for r in read_records(cfg.records) if r.kind == "train" and r.status == "done"]
    fitting = [r for r in runs if model in (None, r.config["model"]) and Path(r.train["folder"]).is_dir()]
    if cfg.task.name in OWN_SYMBOLS:
        fitting = [r for r in fitting if r.task == cfg.task.name]
    best = max(fitting, key=lambda r: (r.task == cfg.task.name, r.started, r.id), default=None)
    return Path(best.train["folder"]) if best else None


def records_of(cfg: RunConfig, run: Path) -> list[Record]:
    """Of the trainings of run folder ``run``; several, where it was resumed."""
    trainings = (r for r in read_records(cfg.records) if "folder" in r.train)
    return [r for r in trainings if Path(r.train["folder"]).resolve() == run.resolve()]


def trained_config(folder: Path) -> RunConfig:
    """Configuration of a run folder or checkpoint folder."""
    return build_config(read_json(folder / "config.json"))


def evaluated_config(cfg: RunConfig, trained: RunConfig, given: Collection[str] | None) -> RunConfig:
    """The evaluation that ``cfg`` asks of a trained model.

    Model, memory, decoder, trainer, scale and tokenizer are the checkpoint's; so are seed, data and task (if
    it is the same), apart from what the user set. Raises UserError if that is something fixed by training.
    """
    check_fixed(cfg, trained, given)
    asked, base = to_dict(cfg), to_dict(trained)
    mixed = given is None or any(group in given for group in MIXES)
    if not mixed and cfg.task.name == trained.task.name:
        asked["task"] = _overlaid(base["task"], asked["task"], "task", given or ())
    if given is not None and "data" not in given and "experiment" not in given:
        asked["data"] = _overlaid(base["data"], asked["data"], "data", (*given, "data.cache_dir"))
    asked["data"] |= {key: base["data"][key] for key in ("tokenizer", "vocab_size")}
    inherited = ["model", "scale", "decoder", "memory", "base", "trainer"]
    if given is not None and "seed" not in given:
        inherited.append("seed")  # so that tables count the seeds of the models
    evaluated = build_config({**asked, **{key: base[key] for key in inherited}})
    check_read((key for key in given or () if key.startswith("task.")), [evaluated])
    return evaluated


def check_fixed(cfg: RunConfig, trained: RunConfig, given: Collection[str] | None) -> None:
    """Raises UserError if the user set what training had fixed; model and memory.kind may be said again."""
    for key in given or ():
        if key.startswith(TRAINED) and not (key == "memory.kind" and cfg.memory.kind == trained.memory.kind):
            raise UserError(f"{key} was fixed when the checkpoint was trained; leave it out, or train anew.")
    if given is not None and "model" in given and cfg.model != trained.model:
        raise UserError(f"The checkpoint is of model={trained.model}, not {cfg.model}; give another one.")


def continued_run(cfg: RunConfig, given: Collection[str] | None) -> tuple[RunConfig, Path, Values]:
    """Configuration and folder of the run that ``cfg.resume`` names, and its other lengths so far.

    The last is for the record's hash: a run made longer is another run than one that long from its start.
    """
    from infini_bench.train.state import checkpoint_of, or_earlier, run_of

    folder, last = run_of(Path(str(cfg.resume))), checkpoint_of(Path(str(cfg.resume)))
    before = trained_config(folder)
    cfg = continued_config(cfg, before, given)
    step = 0
    if last:
        with or_earlier(last):
            step = read_json(last / "state.json")["step"]
    if step > cfg.trainer.steps:
        raise UserError(f"{folder} is at step {step} already; give a larger trainer.steps.")
    lengths = {r.config["trainer"]["steps"] for r in records_of(cfg, folder)}
    others = sorted({before.trainer.steps, *lengths} - {cfg.trainer.steps})
    return cfg, folder, {"other_lengths": others} if others else {}


def continued_config(cfg: RunConfig, before: RunConfig, given: Collection[str] | None) -> RunConfig:
    """The run of ``before``, to be continued; steps, how often to log and places may be others.

    Raises UserError if the user set anything else to another value than it had.
    """
    from infini_bench.train.state import FREE

    asked, base = to_dict(cfg), to_dict(before)
    changes: tuple[str, ...] = PLACES if given is None else tuple(given)
    free = {*PLACES, *(f"trainer.{key}" for key in FREE)}
    for key in changes:
        named = f"{key}.name" if key in ("task", "data") else key
        if key in ("recipe", "experiment") or (key not in free and _get(asked, named) != _get(base, named)):
            raise UserError(f"{key} cannot change when a run is resumed; leave it out, or start a new run.")
    for key in free.intersection(changes):
        section, _, leaf = key.rpartition(".")
        (base[section] if section else base)[leaf] = _get(asked, key)
    return replace(build_config(base), resume=cfg.resume)


def _overlaid(base: Values, asked: Values, section: str, given: Collection[str]) -> Values:
    """``base`` with those keys of ``asked`` that were given as ``section.key`` (or deeper)."""
    keys = {name.split(".")[1] for name in given if name.startswith(f"{section}.")}
    return base | {key: asked[key] for key in keys}


def _get(values: Values, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part, {})  # one side alone may have a setting of task.memory
    return values
