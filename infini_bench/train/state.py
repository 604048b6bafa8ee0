"""What a run needs to go on exactly where it was, beside weights and optimizer state."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from infini_bench.config import build_config, to_dict
from infini_bench.data import Tokenizer
from infini_bench.errors import UserError
from infini_bench.files import read_json
from infini_bench.models import MemoryLlamaForCausalLM, load_model
from infini_bench.pretrained import is_own
from infini_bench.schema import RunConfig
from infini_bench.train.checkpoint import Checkpoints, find_checkpoint, verify

# What may change when a run is resumed: nothing here has a part in a step's numbers but ``steps``, which a
# user sets to train longer; the schedule is then that of the longer run.
FREE = {"steps", "log_every", "validate_every", "validate_rows", "save_every", "keep"}
PINNED = ("seed", "decoder", "memory", "data", "task", "trainer")


@dataclass
class TrainState:
    """Counters of a run after ``step`` updates.

    grad_norms: number, sum and largest of the gradient norms before clipping, as far as they were counted.

    cursor: rows drawn, all processes together. tokens_before: those of the stages before this run. seconds:
    of all sessions. loss: of the last step, nats.
    best_loss: lowest validation loss. data: the task's fingerprint. There is no generator state, because each
    step seeds its own from (seed, step, process), and none for the data, because a batch is a function of the
    cursor.
    """

    step: int = 0
    cursor: int = 0
    tokens: int = 0
    tokens_before: int = 0
    seconds: float = 0.0
    loss: float | None = None
    best_loss: float | None = None
    curriculum: dict = field(default_factory=dict)
    grad_norms: list[float] = field(default_factory=lambda: [0, 0.0, 0.0])
    processes: int = 1
    data: str = ""
    torch: str = str(torch.__version__)

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass
class Resumed:
    """A checkpoint read in whole."""

    name: str
    state: TrainState
    model: MemoryLlamaForCausalLM
    optimizer: dict[str, torch.Tensor]
    tokenizer: Tokenizer


def tokens_so_far(base: str | None) -> int:
    """Tokens of all stages that end in ``base``; 0 if that is no run of ours.

    Also 0 for a checkpoint that is for evaluation only and does not say.
    """
    state = find_checkpoint(Path(base)) / "state.json" if base is not None and is_own(base) else None
    if state is None or not state.exists():
        return 0
    counts = read_json(state)
    return counts["tokens"] + counts.get("tokens_before", 0)


def run_of(path: Path) -> Path:
    """The run folder that ``resume=`` means: itself, or that of one of its checkpoints."""
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    if not (run / "config.json").exists():
        raise UserError(f"resume={path} is no training run (it has no config.json); give a run folder.")
    return run


def checkpoint_of(path: Path) -> Path | None:
    """The checkpoint that ``resume=`` means: itself, or the last one of a run folder, if it has any."""
    run = run_of(path)
    index = Checkpoints(run, 1).index()
    name = index["last"] if run == path else path.name
    if name is None:
        return None
    folder = run / "checkpoints" / name
    if name not in index["kept"]:
        raise UserError(f"{folder} is no finished checkpoint; the run has {', '.join(index['kept'])}.")
    return folder


@contextmanager
def or_earlier(folder: Path) -> Iterator[None]:
    """Adds to what is wrong with a checkpoint the latest one before it that is whole, if there is one."""
    try:
        yield
    except UserError as error:
        kept = Checkpoints(folder.parent.parent, 1).index()["kept"]
        earlier = (folder.parent / name for name in reversed(kept[: kept.index(folder.name)]))
        if (path := next(filter(is_whole, earlier), None)) is None:
            raise
        reason = str(error).rstrip(".")
        raise UserError(f"{reason}; an earlier one can be resumed: resume={path}.") from error


def is_whole(folder: Path) -> bool:
    """Whether nothing of a checkpoint is missing or damaged."""
    try:
        verify(folder)
    except UserError:
        return False
    return True


def read_checkpoint(path: Path) -> Resumed | None:
    """The checkpoint ``path``, or the last one of run folder ``path``; None if the run died before its first.

    Raises UserError naming the file if anything of it is missing or damaged.
    """
    folder = checkpoint_of(path)
    if folder is None:
        return None
    with or_earlier(folder):
        verify(folder)
    return Resumed(
        folder.name,
        TrainState(**read_json(folder / "state.json")),
        load_model(folder / "model"),
        load_file(folder / "optimizer.safetensors"),
        Tokenizer.load(folder / "tokenizer"),
    )


def check_same_run(run: Path, cfg: RunConfig) -> None:
    """Raises UserError if ``cfg`` would not continue the run of that folder but be another one."""
    before, now = (pinned(c) for c in (build_config(read_json(run / "config.json")), cfg))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise UserError(
                f"{run} was trained with {key}={before.get(key)}, not {now.get(key)}; resume it without that "
                "override, or start a new run."
            )


def pinned(cfg: RunConfig) -> dict[str, str]:
    """Dotted key -> JSON of every setting that must not change at a resume."""
    flat: dict[str, str] = {}
    for section, value in to_dict(cfg).items():
        if section in PINNED:
            values = value if isinstance(value, dict) else {"": value}
            flat |= {f"{section}.{key}".rstrip("."): json.dumps(v) for key, v in values.items()}
    free = {f"trainer.{key}" for key in FREE} | {"data.cache_dir"}
    return {key: value for key, value in flat.items() if key not in free}
