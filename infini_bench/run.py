"""One training or one evaluation from configuration to record, whatever happens in between. No Hydra here."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infini_bench import outside
from infini_bench.config import evaluated_memory, to_dict
from infini_bench.data.local import shared_out
from infini_bench.data.sources import SPLITS
from infini_bench.device import computing, peak_bytes, reset_peak, torch_device
from infini_bench.errors import UserError
from infini_bench.files import read_json, writing
from infini_bench.origin import (
    attached,
    bare_base,
    checkpoint_name,
    continued_run,
    evaluated_config,
    find_origin,
    given_model,
    trained_config,
    untrained,
    weightless,
)
from infini_bench.progress import Handle, NullProgress, Progress
from infini_bench.report import records
from infini_bench.report.records import Record
from infini_bench.schema import RunConfig
from infini_bench.show import quiet, say, show_metrics, show_training, tell_choices

Given = Collection[str] | None


def run_train(
    cfg: RunConfig, *, given: Given = None, command: list[str] | None = None, progress: Progress | None = None
) -> Record:
    """Train ``cfg``, or continue the run of ``cfg.resume``; returns the record, which is also written.

    given: see `infini_bench.origin`. command: what to store as the command line; unset = ``sys.argv``.
    progress: where to show it; whoever gives one does all the showing, and nothing is printed here.
    A run that is recorded as done is not run again unless ``cfg.force``. After SIGINT or SIGTERM the record's
    status is ``interrupted``; an exception is recorded as ``failed`` and raised again, but a UserError before
    the first step leaves no record.
    """
    from infini_bench.train import train
    from infini_bench.train.log import curve

    if cfg.task.untrained:
        name = cfg.task.name
        raise UserError(f"The task {name} trains nothing; run `infini-bench eval {name} model={cfg.model}`.")
    if getattr(cfg.task, "baseline", None):
        raise UserError("task.baseline is for eval; leave it out.")
    if cfg.resume:
        cfg, folder, lineage = continued_run(cfg, given)
        record = new_record("train", cfg, command, lineage)
    else:
        cfg = on_base(cfg) if cfg.base.model is not None else cfg
        record = new_record("train", cfg, command)
        record.id = agreed(record.id, cfg)
        folder = Path(cfg.runs) / record.id
    record.train = {"folder": str(folder)}
    if done := already_done(record, cfg, progress):
        return done
    if progress is None and leads() and (shared := told_shares(cfg, *SPLITS)):
        say(shared)
    quiet()
    if progress is None and leads():
        tell_choices()
    with recorded(record, cfg, progress or (Progress() if leads() else NullProgress())) as shown:
        result = train(cfg, folder, shown)
        record.status = "interrupted" if result.interrupted else "done"
        record.task_version = result.task_version
        record.data_fingerprint = result.data_fingerprint
        record.tokenizer_fingerprint = result.tokenizer_fingerprint
        record.tokens, record.params = result.tokens, result.parameters
        record.state_floats, record.forms = result.state_floats, result.forms
        losses = ["final_loss", "best_loss", "grad_norm_mean", "grad_norm_max"]
        sizes = ["non_embedding_parameters", "trained_parameters", "memory_parameters"]
        keys = ["steps", "seconds", "tokens_before", *losses, *sizes, "segmentwise", "gates"]
        record.train |= {key: getattr(result, key) for key in keys}
        record.train["curve"] = curve(folder / "metrics.jsonl")
    if progress is None and leads():
        show_training(record, folder)
    return record


def run_eval(
    cfg: RunConfig, *, given: Given = None, command: list[str] | None = None, progress: Progress | None = None
) -> Record:
    """Evaluate ``cfg.checkpoint`` (unset: the shipped model or the latest finished run) on ``cfg``'s task.

    Model, memory, decoder and tokenizer are the checkpoint's; an untrained task has none and takes all from
    ``cfg``, and so does ``cfg.base`` without a checkpoint; a baseline without weights has none of them.
    Otherwise as `run_train`.
    """
    path: Path | None
    if bare_base(cfg):
        path, words = attached(cfg)
        cfg = on_base(cfg)
    elif cfg.task.weightless:
        cfg = weightless(cfg, given)
        path, words = None, f"{cfg.model}, which has no weights"
    elif cfg.task.untrained:
        path, words = untrained(cfg)
    else:
        path, words = find_origin(cfg, given_model(cfg, given))
    if progress is None:
        say(f"evaluating {words}")
    if path is None:
        record = new_record("eval", cfg, command)
    else:
        trained = trained_config(path)
        cfg = replace(evaluated_config(cfg, trained, given), checkpoint=checkpoint_name(path), resume=None)
        origin = train_reference(trained, path)
        if progress is None and (changes := getattr(cfg.task, "memory", {})):
            kept = given is not None and not any(key.startswith("task.memory") for key in given)
            whence = "; the training was given it, ++task.memory={} leaves it out" if kept else ""
            say(f"with task.memory: {', '.join(f'{key}={value}' for key, value in changes.items())}{whence}")
        if progress is None and trained.task.name != cfg.task.name:
            say(f"warning: trained on {trained.task.name}, evaluated on {cfg.task.name}")
        record = new_record("eval", cfg, command, {key: origin[key] for key in ("config_hash", "steps")})
        record.train = origin
    if progress is None and (shared := told_shares(cfg, getattr(cfg.task, "split", ""))):
        say(f"{shared} (task.split={'|'.join(SPLITS)})")
    if done := already_done(record, cfg, progress):
        record = done
    else:
        quiet()
        if progress is None:
            tell_choices()
        with recorded(record, cfg, progress or Progress()) as shown:
            evaluate(record, cfg, path, shown)
            record.status = "done"
    if progress is None:
        show_metrics(record)
    return record


def told_shares(cfg: RunConfig, *splits: str) -> str | None:
    """See `shared_out`; None also for a task that reads no text."""
    if cfg.data.source != "local" or not hasattr(cfg.task, "split"):
        return None
    return shared_out(cfg.data, *splits)


def on_base(cfg: RunConfig) -> RunConfig:
    """``cfg`` with the architecture of its pretrained model."""
    from infini_bench.pretrained import decoder_of

    assert cfg.base.model is not None
    return replace(cfg, decoder=decoder_of(cfg.base.model, cfg.decoder))


def evaluate(record: Record, cfg: RunConfig, path: Path | None, progress: Progress) -> None:
    """Fill ``record`` with what ``cfg``'s task finds out about the model of checkpoint ``path``.

    path None: about what the task builds with random weights, ``cfg.base`` with a new memory, or what has no
    weights.
    """
    from infini_bench.memory.base import forms
    from infini_bench.models import with_memory
    from infini_bench.pretrained import adapted_model, merge_lora
    from infini_bench.tasks import build_task
    from infini_bench.train import load_checkpoint_model

    device = torch_device(cfg.device)
    asked = replace(cfg, memory=evaluated_memory(cfg))  # its segments are also those that a task counts in
    model: Any = None
    tokenizer = None
    if path is not None:
        model, tokenizer, _ = load_checkpoint_model(path)
        if asked.memory != cfg.memory:
            merge_lora(model)  # the decoder that is built anew has none
            model = with_memory(model, asked.memory)
        model.to(device)
        record.tokenizer_fingerprint = tokenizer.fingerprint
        record.train["segmentwise"] = model.segmentwise
    random.seed(cfg.seed)
    np.random.seed(cfg.seed % 2**32)
    torch.manual_seed(cfg.seed)
    task: Any = build_task(asked, tokenizer)
    record.task_version = task.version
    if not cfg.task.weightless:
        if model is None:
            based, separator = cfg.base.model is not None, getattr(task, "separator", None)
            model = adapted_model(cfg.base, cfg.memory, separator).to(device) if based else task.build(device)
        record.params, record.state_floats = sum(p.numel() for p in model.parameters()), model.state_floats()
    with computing(device, cfg.precision):
        record.metrics = task.evaluate(model, progress)
    record.forms = forms(model) if model is not None else []
    record.data_fingerprint = task.fingerprint


def train_reference(trained: RunConfig, path: Path) -> dict[str, Any]:
    """What an evaluation's record says about the training of checkpoint ``path``.

    Tokens: up to there; those of the stages before by themselves.
    """
    run = path.parent.parent.name if path.parent.name == "checkpoints" else checkpoint_name(path)
    state = read_json(path / "state.json") if (path / "state.json").exists() else {}
    counts = {"steps": state.get("step"), "tokens": state.get("tokens"), "seconds": state.get("seconds")}
    if state.get("tokens_before"):
        counts["tokens_before"] = state["tokens_before"]
    digest = records.config_hash(to_dict(trained))
    corpus = {"task": trained.task.name, "data": trained.data.name, "path": trained.data.path}
    corpus["train_kind"] = getattr(trained.task, "train_kind", None)
    return {"id": run, "config_hash": digest, "seed": trained.seed, **corpus, **counts}


# --- several processes ----------------------------------------------------------------------------------


def leads() -> bool:
    """Whether this is the only process, or the one of several that speaks and writes for all."""
    return int(os.environ.get("RANK", "0")) == 0


def agreed(name: str, cfg: RunConfig) -> str:
    """The leading process's ``name``, in every process of ``torchrun`` or ``accelerate launch``."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return name
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=torch_device(cfg.device).type == "cpu")
    return broadcast_object_list([name])[0]


# --- records --------------------------------------------------------------------------------------------


def new_record(
    kind: str, cfg: RunConfig, command: list[str] | None, origin: dict[str, Any] | None = None
) -> Record:
    """A record of a run that has not begun; origin: what else decides its result, for the hash."""
    config = to_dict(cfg)
    commit, dirty = records.git_state()
    return Record(
        id=records.new_id(kind, config),
        kind=kind,
        status="failed",
        command=sys.argv if command is None else command,
        config=config,
        config_hash=records.config_hash({**config, **({"origin": origin} if origin else {})}),
        seed=cfg.seed,
        device=records.device_name(torch_device(cfg.device).type),
        started=records.now(),
        git_commit=commit,
        git_dirty=dirty,
        versions=records.versions(),
    )


def already_done(record: Record, cfg: RunConfig, progress: Progress | None) -> Record | None:
    """The finished record of the same run, unless ``cfg.force`` or another machine's.

    Records travel with the repository, run folders do not: a training counts if its folder is here, an
    evaluation if it is of this very run.
    """
    same = cfg.records, record.kind, record.config_hash, records.machine_of(record)
    done = None if cfg.force else records.find_done(*same)
    if done is None:
        return None
    here = (
        Path(done.train["folder"]).is_dir()
        if done.kind == "train"
        else done.train.get("id") == record.train.get("id")
    )
    if here and progress is None:
        say(f"already done: {done.id} (force=true runs it again)")
    return done if here else None


class Watched:
    """A progress display that knows whether the work has begun: whether anybody asked it for a bar."""

    def __init__(self, shown: Progress | NullProgress):
        self.shown, self.begun = shown, False

    def task(self, description: str, total: int) -> Handle:
        self.begun = True
        return self.shown.task(description, total)


@contextmanager
def recorded(record: Record, cfg: RunConfig, progress: Progress | NullProgress) -> Iterator[Any]:
    """Whatever happens inside, the record is written with what it came to; exceptions go on.

    Only what the user can mend before any work has begun leaves no record: nothing was tried.
    """
    folder = Path(cfg.records)
    with writing(folder):  # before hours of work, not after
        folder.mkdir(parents=True, exist_ok=True)
    record.error = records.KILLED  # what stays if it is killed
    if leads():
        records.write_record(folder, record)
    record.error = None
    device, began, work = torch_device(cfg.device), time.perf_counter(), Watched(progress)
    reset_peak(device)
    mistaken = False
    try:
        with progress:
            yield work
    except BaseException as error:
        record.status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        record.error = f"{type(error).__name__}: {error}"
        words = None if isinstance(error, UserError) else outside.fault(error)
        mistaken = (isinstance(error, UserError) or words is not None) and not work.begun
        if "allocate" in str(error) or isinstance(error, MemoryError):  # of the CPU or a GPU
            raise UserError(
                "Not enough memory; lower decoder.dim, trainer.batch, task.batch or task.chunk."
            ) from error
        if words is not None:  # in a memory of the user's
            raise UserError(words) from error
        raise
    finally:
        inner = [row["value"] for row in record.metrics if row["metric"] == "peak_bytes"]  # counted anew
        record.seconds = time.perf_counter() - began
        record.peak_bytes = max(peak_bytes(device), *inner) if inner else peak_bytes(device)
        if leads() and not mistaken:
            records.write_record(folder, record)
        elif leads():
            (folder / f"{record.id}.jsonl").unlink(missing_ok=True)
