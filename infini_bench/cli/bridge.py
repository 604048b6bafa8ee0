"""The one place that knows Hydra: composing, checking, completing and launching what follows a verb.

Typer owns verbs, options and help; Hydra owns overrides, sweeps and launchers. For a sweep Hydra's own
entry point runs with ``sys.argv`` swapped, so that every launcher and sweeper works; all is composed and
checked before.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from hydra.plugins.completion_plugin import DefaultCompletionPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from infini_bench import outside
from infini_bench.cli import jobs
from infini_bench.config import TASKS, build_config, known_keys, to_dict, unknown_setting
from infini_bench.errors import UserError
from infini_bench.origin import bare_base
from infini_bench.rules import check_trainer
from infini_bench.schema import RunConfig
from infini_bench.units import counted, suggest
from infini_bench.unread import check_read

# What Hydra raises for overrides that it cannot compose; the last for values of the wrong kind.
REFUSALS = (HydraException, OmegaConfBaseException, ValueError)
MODULE, CONFIG, VERSION = "infini_bench.conf", "config", "1.3"
SEARCH = "hydra.searchpath="  # of the override that adds a folder of the user's own
OPEN = ("data.filter", "memory.options", "task.memory")  # settings whose keys the user makes up
SHOWN = ("job", "hydra", "all")


# --- composing and checking -----------------------------------------------------------------------------


def compose_run(overrides: Sequence[str]) -> RunConfig:
    """The run that these overrides of ``conf/`` describe. Raises UserError in one sentence."""
    with _loader() as loader:
        parsed = _parse(overrides, loader)
        _refuse(parsed, loader)
        try:
            config = hydra.compose(CONFIG, [*overrides])
            container: Any = OmegaConf.to_container(config, resolve=True)
        except REFUSALS as err:
            raise _explain(err, parsed, loader) from err
    cfg = build_config(container)
    check_trainer(cfg)  # not of what was recorded or trained: an evaluation has its checkpoint's trainer
    return _named(cfg)


def compose_runs(verb: str, overrides: Sequence[str], multirun: bool = False) -> list[RunConfig]:
    """As `compose_run`, for each job of a sweep. Also refused is a ``memory`` setting that no job reads.

    The memory of a checkpoint is not known here: `infini_bench.origin` judges what is given beside one.
    """
    runs = [compose_run(job) for job in (expand(overrides) if multirun else [overrides])]
    trained = [cfg.resume or (verb == "eval" and not (cfg.task.untrained or bare_base(cfg))) for cfg in runs]
    if not any(trained):
        check_read(given(overrides), runs)
    return runs


def _named(cfg: RunConfig) -> RunConfig:
    """What the user's own words compose to, code outside the package included, is named by him."""
    if outside.is_outside(cfg.memory.kind):
        outside.name(cfg.memory.kind)
    return cfg


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each job of a sweep: the product of all lists, ranges and globs in them."""
    with _loader() as loader:
        axes, parsed = [], _parse(overrides, loader)
        searched = any(override.key_or_group == "hydra/sweeper" for override in parsed)
        for override in parsed:
            if override.is_discrete_sweep():
                values = [*override.sweep_string_iterator()]
                if not values:
                    raise UserError(f'"{override.input_line}" matches nothing.')
                axes.append([f"{override.get_key_element()}={value}" for value in values])
            elif not override.is_sweep_override():
                axes.append([str(override.input_line)])
            elif not searched:  # an interval is for the sweeper that asked for it
                raise UserError(f'"{override.input_line}" needs a sweeper of its own; list values instead.')
    return [[*job] for job in itertools.product(*axes)]


def given(overrides: Sequence[str]) -> frozenset[str]:
    """Dotted names of what the user set; choosing an option of a group sets the group's name."""
    names = set()
    for override in OverridesParser.create().parse_overrides([*overrides]):
        key, value = override.key_or_group, override.value()
        names |= {key, *(f"{key}.{name}" for name in value)} if isinstance(value, dict) else {key}
    return frozenset(names)


def search_path(config_dir: Path | None) -> list[str]:
    """The override that adds a folder of the user's own YAML files."""
    if config_dir is None:
        return []
    if not config_dir.is_dir():
        raise UserError(f"--config-dir {config_dir} is no folder; give one laid out as conf/.")
    return [f"{SEARCH}[{quote(f'file://{config_dir.resolve()}')}]"]


def quote(value: str) -> str:
    """``value`` as one string in Hydra's grammar, whatever characters it has."""
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", value).replace("'", r"\'")
    return f"'{escaped}'"


@contextmanager
def _loader() -> Iterator[ConfigLoader]:
    """Hydra's view of ``conf/`` and of the dataclasses; inside a job it is there already."""
    if GlobalHydra.instance().is_initialized():
        yield GlobalHydra.instance().config_loader()
        return
    _store_schema()
    with hydra.initialize_config_module(MODULE, version_base=VERSION):
        yield GlobalHydra.instance().config_loader()


@functools.cache
def _store_schema() -> None:
    """The dataclasses as nodes that ``conf/`` builds on, once a process."""
    store = ConfigStore.instance()
    base = to_dict(RunConfig())
    del base["task"]
    store.store(name="schema", node=base)
    for name, cls in TASKS.items():
        store.store(group="schema", name=name, node=asdict(cls()))


def _parse(overrides: Sequence[str], loader: ConfigLoader) -> list[Override]:
    parser = OverridesParser.create(config_loader=loader)
    parsed = []
    for text in overrides:
        try:
            parsed += parser.parse_overrides([text])
        except HydraException as err:
            if re.match(r"[\w.+~/]+=", text):
                raise UserError(f'The value in "{text}" cannot be read; close or quote it.') from err
            raise _no_setting(text) from err
        if text.startswith("="):  # Hydra takes a group without a name
            raise _no_setting(text)
    return parsed


def _no_setting(text: str) -> UserError:
    return UserError(f'"{text}" is no setting; write key=value, such as trainer.steps=100.')


def _refuse(parsed: list[Override], loader: ConfigLoader) -> None:
    """Raises UserError for what Hydra composes to a run that nobody meant."""
    for override in parsed:
        line, key, value = override.input_line, override.key_or_group, override.value()
        own = any(f"{key}.".startswith(f"{group}.") for group in OPEN) or override.is_hydra_override()
        if override.is_delete() and not own:
            raise UserError(f'"{line}" leaves out what every run has; set it, as in {key}=VALUE.')
        if isinstance(value, list) and key != "experiment" and loader.get_group_options(key):
            raise UserError(f'"{line}" mixes several; name one, or with -m {key}=A,B one after the other.')


def _explain(err: Exception, parsed: list[Override], loader: ConfigLoader) -> UserError:
    """One sentence for what Hydra tells in several lines."""
    if missing := re.search(r"Could not find 'recipe/(\w+)_(\w+)'", str(err)):
        task, scale = missing.groups()
        recipes = loader.get_group_options("recipe", ObjectType.CONFIG)
        there = [name.removeprefix(f"{task}_") for name in recipes if name.startswith(f"{task}_")]
        return UserError(f"Task {task} has no scale={scale}: choose one of {', '.join(there)}.")
    search = [str(o.input_line) for o in parsed if str(o.input_line).startswith(SEARCH)]
    groups = []
    for override in parsed:
        line, key, value = override.input_line, override.key_or_group, override.value()
        if override.is_sweep_override():
            return UserError(f'"{line}" has several values: train and eval run one after the other with -m.')
        options = loader.get_group_options(key, ObjectType.CONFIG, CONFIG, search)
        groups += [str(line)] if options else []
        chosen = value if isinstance(value, list) else [] if override.is_delete() else [value]
        for name in chosen if options else []:
            if name not in options:
                choice = f"choose one of {', '.join(options)}"
                return UserError(f'There is no {key} "{name}"{suggest(str(name), options)}; {choice}.')
    try:
        task = hydra.compose(CONFIG, groups).task.name
    except REFUSALS:
        return UserError(" ".join(str(err).split("\n")[0].split()))
    known = [*known_keys(task), *loader.list_groups("")]
    for override in parsed:
        key = override.key_or_group
        if key == "data.filter" or key.startswith("data.filter."):
            return UserError("A filter is added with a plus sign: +data.filter.COLUMN=VALUE.")
        for group in ("memory.options", "task.memory"):
            if f"{key}.".startswith(f"{group}.") and group in known:
                return UserError(f"An option is added with two plus signs: ++{group}.NAME=VALUE.")
        if override.type is OverrideType.CHANGE and not override.is_hydra_override():
            inner = override.value()
            names = [f"{key}.{name}" for name in inner] if isinstance(inner, dict) else []
            for name in (name for name in [key, *names] if name not in known):
                return unknown_setting(name, known)
    return UserError(" ".join(str(err).split("\n")[0].split()))


# --- launching ------------------------------------------------------------------------------------------


def launch(verb: str, overrides: Sequence[str], *, multirun: bool = False, show: str | None = None) -> int:
    """Check every job, then run one as it is and many through Hydra; returns the exit code.

    show: ``job``, ``hydra`` or ``all`` prints the composed configuration instead.
    """
    overrides = [*overrides]
    if show not in (None, *SHOWN):
        raise UserError(f"--cfg shows {', '.join(SHOWN)}, not {show}.")
    if show and multirun:
        raise UserError("--cfg shows one run; leave out -m and name one value of each setting.")
    configs = compose_runs(verb, overrides, multirun)
    if not multirun and not show:
        _run_alone(verb, configs[0], overrides)
        return 0
    sweep = Path(configs[0].runs) / "sweeps" / datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    if not show:
        overrides.append(f"hydra.sweep.dir={quote(str(sweep))}")
        print(f"{counted(len(configs), 'job')}, log in {sweep}")
    flags = ["--cfg", show] if show else ["--multirun"]
    task = {"train": train_job, "eval": eval_job}[verb]
    entry = hydra.main(version_base=VERSION, config_path=f"pkg://{MODULE}", config_name=CONFIG)
    with _argv([jobs.PROGRAM, *flags, *overrides]), _plain_errors():
        try:
            entry(task)()
        except HydraException as err:  # of a launcher or sweeper: what fails in a job, the job keeps
            raise UserError(f"Hydra cannot run this: {' '.join(str(err).split())}") from err
    return 0 if show else jobs.summarize(sweep)


def _run_alone(verb: str, cfg: RunConfig, overrides: list[str]) -> None:
    """One job, for which Hydra would only compose ``cfg`` twice again."""
    search = [text for text in overrides if text.startswith(SEARCH)]
    own = [text for text in overrides if text not in search]
    if of_sweeps := [text for text in own if text.lstrip("+~").startswith(("hydra.", "hydra/"))]:
        raise UserError(f'"{of_sweeps[0]}" is for several runs; add -m, or leave it out.')
    _job(verb, cfg, own, search).run()


def train_job(cfg: DictConfig) -> None:
    """What a launcher runs for ``train``; importable, so that every launcher can send it elsewhere."""
    _run_in_sweep("train", cfg)


def eval_job(cfg: DictConfig) -> None:
    """What a launcher runs for ``eval``."""
    _run_in_sweep("eval", cfg)


def _run_in_sweep(verb: str, cfg: DictConfig) -> None:
    config = HydraConfig.get()
    container: Any = OmegaConf.to_container(cfg, resolve=True)
    search = [text for text in config.overrides.hydra if text.startswith(SEARCH)]
    job = _job(verb, _named(build_config(container)), [*config.overrides.task], search)
    job.run_in_sweep(int(config.job.num), Path(config.runtime.output_dir))


def _job(verb: str, cfg: RunConfig, overrides: list[str], search: list[str]) -> jobs.Job:
    def recompose(more: list[str]) -> RunConfig:
        return compose_run([*search, *overrides, *more])

    return jobs.Job(verb, cfg, overrides, given(overrides), recompose)


@contextmanager
def _argv(words: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Hydra passes a job's exception on instead of printing it and leaving the process."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        del os.environ["HYDRA_FULL_ERROR"]
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


# --- completing -----------------------------------------------------------------------------------------


def complete(words: Sequence[str], incomplete: str) -> list[str]:
    """What may stand for ``incomplete`` after the overrides ``words``.

    bash hands over ``model=inf`` as three words, other shells as one: the line is joined again, and in bash
    the part before ``=`` is taken off the answers.
    """
    line = re.sub(r"\s*=\s*", "=", " ".join([*words, incomplete]))
    with _loader() as loader:
        try:
            found = DefaultCompletionPlugin(loader)._query(CONFIG, line)
        except HydraException:  # the words before are no overrides, so nothing fits after them
            return []
    key, equals, _ = line.rpartition(" ")[2].rpartition("=")
    own = [text for text in found if incomplete.startswith("hydra") or not re.match("hydra|schema", text)]
    split = bool(equals) and (incomplete == "=" or "=" not in incomplete)
    return [text.removeprefix(f"{key}=") if split else text for text in own]
