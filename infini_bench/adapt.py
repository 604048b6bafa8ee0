"""``infini-bench adapt``: a pretrained model gets a memory, in stages that build on each other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from infini_bench.cli.bridge import compose_run, given, quote
from infini_bench.config import to_dict
from infini_bench.errors import UserError
from infini_bench.files import writing
from infini_bench.origin import find_origin, trained_config
from infini_bench.pretrained import is_own, looks_local, merge_lora
from infini_bench.report.records import Record, config_hash, read_records
from infini_bench.schema import RunConfig
from infini_bench.units import suggest
from infini_bench.unread import check_read

STAGES = ("pretrain", "passkey", "passkey_far", "needles", "booksum", "pretrain_paper", "passkey_paper")
OF_STAGE = re.compile(rf"([+~]*)({'|'.join(STAGES)})\.(.+)", re.DOTALL)  # an override for one stage only


def adapt(model: str, stages: Sequence[str], overrides: Sequence[str] = ()) -> list[Record]:
    """Train ``model`` (hub id, folder, GGUF file or run folder) through ``stages``, each from the one before.

    overrides hold for every stage, those that begin with a stage's name (``pretrain.task.sequence=512``) for
    that one only. A stage that is recorded as done is not run again; an interrupted one ends the call, and
    the next call goes on with it. Returns the records. Raises UserError for what does not exist, before
    anything is trained.
    """
    from infini_bench.run import run_train

    if looks_local(model) and not Path(model).exists():
        raise UserError(f"{model} is no folder or file; give a hub id, a folder or a .gguf file.")
    check_stages(stages, overrides)
    cfgs: list[RunConfig] = []
    for stage in stages:
        own = of_stage(stage, overrides)
        cfgs.append(compose_run(stage_words(model, stage, own)))
        check_read(given(own), cfgs[-1:])
    for before, stage, cfg in zip(cfgs, stages, cfgs[1:], strict=False):
        check_memory(stage, before, cfg)
        check_data(cfg)  # the first stage's are read at once anyway
    records: list[Record] = []
    for stage in stages:
        words = stage_words(model, stage, of_stage(stage, overrides))
        record = run_train(begun(compose_run(words)), command=["infini-bench", "train", *words])
        records.append(record)
        if record.status != "done":
            break
        model = record.train["folder"]
    return records


def begun(cfg: RunConfig) -> RunConfig:
    """``cfg``, or what goes on with the newest run of it if that was interrupted and is here."""
    from infini_bench.run import on_base
    from infini_bench.standing import there

    trainings = [r for r in read_records(cfg.records) if r.kind == "train"]
    if cfg.force or all(r.status == "done" for r in trainings):  # a base's shape takes seconds to read
        return cfg
    digest = config_hash(to_dict(on_base(cfg)))
    found = there([r for r in trainings if r.config_hash == digest])
    if found is None or found.status == "done":
        return cfg
    return replace(cfg, resume=found.train["folder"])


def of_stage(stage: str, overrides: Sequence[str]) -> list[str]:
    """The overrides that hold for ``stage``, as Hydra reads them; its own come last and so win.

    stage "": those that hold for all.
    """
    matches = [(word, OF_STAGE.fullmatch(word)) for word in overrides]
    own = [match[1] + match[3] for _, match in matches if match and match[2] == stage]
    return [*(word for word, match in matches if not match), *own]


def check_stages(stages: Sequence[str], overrides: Sequence[str]) -> None:
    """Raises UserError for a stage that does not exist, and for an override of one that is not run."""
    for stage in stages:
        if stage not in STAGES:
            raise UserError(
                f'There is no stage "{stage}"{suggest(stage, STAGES)}; choose {", ".join(STAGES)}.'
            )
    for word in overrides:
        if (match := OF_STAGE.fullmatch(word)) and match[2] not in stages:
            raise UserError(
                f"{word} is for the stage {match[2]}, which is not among those that are run; leave it out."
            )


def check_memory(stage: str, cfg: RunConfig, after: RunConfig) -> None:
    """Raises UserError if what goes on from ``cfg``, the stage of this name, would have another memory."""
    own, later = asdict(cfg.memory), asdict(after.memory)
    for key in (key for key in own if own[key] != later[key]):
        raise UserError(
            f"A memory stays as it is from stage to stage, but memory.{key} is {own[key]} in {stage} and "
            f"{later[key]} after it; set {stage}.memory.{key}={later[key]}."
        )


def check_data(cfg: RunConfig) -> str:
    """Reads the data of a stage to come; their fingerprint. Raises UserError as its training would."""
    from infini_bench.tasks import build_task

    task = build_task(cfg)
    task.check_training()
    return task.fingerprint


def stage_words(model: str, stage: str, overrides: Sequence[str]) -> list[str]:
    """All overrides of a stage that begins with ``model``."""
    return [f"experiment=adapt_{stage}", *on(model), *overrides]


def on(model: str) -> list[str]:
    """Overrides for a training that goes on from ``model``, with its tokenizer."""
    from infini_bench.train.checkpoint import find_checkpoint

    tokenizer = str(find_checkpoint(Path(model)) / "tokenizer") if is_own(model) else model
    return [f"base.model={quote(model)}", f"data.tokenizer={quote(tokenizer)}"]


def added(record: Record) -> str:
    """What the memory added to the model, in one sentence."""
    train, floats = record.train, record.state_floats or 0
    before = train.get("tokens_before", 0)
    stages = f" ({before:,} of them in the stages before)" if before else ""
    return (
        f"{root(record.config['base']['model'])}: {record.params:,} parameters, "
        f"{train['trained_parameters']:,} of them trained and {train['memory_parameters']:,} the memory's; "
        f"{before + (record.tokens or 0):,} tokens of training{stages}; state: {4 * floats:,} "
        "bytes a sequence in float32."
    )


def root(model: str) -> str:
    """The pretrained model that a chain of stages began with; the first run, if that began from scratch."""
    from infini_bench.train.checkpoint import find_checkpoint

    while is_own(model) and (before := trained_config(find_checkpoint(Path(model))).base.model):
        model = before
    return model


def export(checkpoint: Path | str, out: Path) -> None:
    """A model, LoRA merged, and its tokenizer as one Hugging Face folder.

    checkpoint: as ``eval --checkpoint``, a folder or the name of a run or of a model with a finished run.
    """
    from infini_bench.models import save_model
    from infini_bench.show import quiet
    from infini_bench.train.checkpoint import load_checkpoint_model

    with writing(out):
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out} is not empty; give a new folder.")
    quiet()
    model, tokenizer, _ = load_checkpoint_model(find_origin(RunConfig(checkpoint=str(checkpoint)))[0])
    merge_lora(model)
    with writing(out):
        save_model(model, out)
        tokenizer.save(out)
