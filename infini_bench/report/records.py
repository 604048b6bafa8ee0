"""Result records: one JSON line a run, from which every table is rebuilt. Standard library only.

A record lies in ``<folder>/<id>.jsonl``, later perhaps packed (``.jsonl.xz``); a file may hold several lines.
What a run *was* (command, resolved config, code, data, machine) and what it *gave* (metric rows) stand side
by side, also when it failed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from infini_bench.errors import UserError
from infini_bench.outside import digest, is_outside
from infini_bench.report.record_files import (
    PLAIN,
    bare,
    drop_copies,
    pack,
    read_lines,
    record_files,
    write_lines,
)

SCHEMA = 1
KILLED = "the process ended without a word"  # the error of a run that nobody could end properly
# Where a run happens and what it is compared with later; none of these changes its numbers.
UNHASHED = ("runs", "records", "force", "device", "resume", "checkpoint")
# Settings younger than records, at their default: a run without them is the one that was recorded.
# By section; a task's by its name.
YOUNGER: dict[str, dict[str, Any]] = {
    "memory": {"write_cost": 0.0, "write_floor": 0.0, "floor_trained": False},
    "trainer": {"write_lr": None, "best": False},
    **{task: {"memory": {}} for task in ("needles", "recall", "mqar")},
    "booksum": {"memory": {}, "kind": None},
    "passkey": {"memory": {}, "straddling": 0.0},
}
PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "datasets", "numpy", "rouge-score")


@dataclass
class Record:
    """One run of one verb. Metric rows are those of ``tasks/base.py``, None where a key does not apply."""

    id: str
    kind: str  # train | eval
    status: str  # done | failed | interrupted
    command: list[str]
    config: dict[str, Any]  # the resolved RunConfig
    config_hash: str
    seed: int
    device: str  # in words, see device_name
    started: str  # ISO 8601, UTC
    task_version: str | None = None
    git_commit: str | None = None
    git_dirty: bool | None = None
    data_fingerprint: str | None = None
    tokenizer_fingerprint: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float | None = None
    tokens: int | None = None  # trained on, or read by the evaluation
    params: int | None = None
    state_floats: int | None = None  # carried over a segment boundary, one sequence
    peak_bytes: int | None = None
    forms: list[str] = field(default_factory=list)  # that computed the memory, and why: eager | triton | ...
    metrics: list[dict[str, Any]] = field(default_factory=list)
    train: dict[str, Any] = field(
        default_factory=dict
    )  # train: its summary; eval: the train record's id, hash, tokens
    plans: list[str] = field(
        default_factory=list
    )  # of ``reproduce`` that it is part of; one run may serve many
    error: str | None = None
    schema: int = SCHEMA

    def to_json(self) -> str:
        """One line of strict JSON; a number that is not finite becomes null."""
        return json.dumps(_finite(asdict(self)), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Raises ValueError saying what is wrong with the line."""
        values = json.loads(line)
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        if values.get("schema") != SCHEMA:
            raise ValueError(f"schema {values.get('schema')!r}, this version reads {SCHEMA}")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown field {unknown[0]!r}")
        try:
            return cls(**values)
        except TypeError as error:  # a required field is missing; the message names it
            raise ValueError(str(error).split("__init__() ")[-1]) from None

    @property
    def task(self) -> str:
        return self.config["task"]["name"]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def config_hash(config: dict[str, Any]) -> str:
    """Sixteen hex digits of all that decides a run's result.

    Paths, device and the checkpoint's place are left out, so that a rerun elsewhere is known as the same run;
    an evaluation's caller adds the train record's hash to ``config`` under a key of its own. Of ``data.path``
    the spelling does not count (``./books/`` is ``books``). A memory in a file of the user's counts with what
    the file says.
    """
    kept = {key: value for key, value in config.items() if key not in UNHASHED}
    if isinstance(kept.get("data"), dict):
        kept["data"] = {key: value for key, value in kept["data"].items() if key != "cache_dir"}
        if path := kept["data"].get("path"):
            kept["data"]["path"] = str(PurePosixPath(path))  # leaves "..", behind which a link may stand
    for section in ("memory", "trainer", "task"):
        if isinstance(given := kept.get(section), dict):
            younger = YOUNGER.get(given.get("name", section), {})
            kept[section] = {
                key: value for key, value in given.items() if (key, value) not in younger.items()
            }
    kind = str(kept["memory"]["kind"]) if isinstance(kept.get("memory"), dict) else ""
    if is_outside(kind):
        kept["code"] = digest(kind)
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def new_id(kind: str, config: dict[str, Any]) -> str:
    """Readable and unique, also for runs started side by side."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    what = f"{kind}-{config['task']['name']}-{config['model']}-{config['scale']}-seed{config['seed']}"
    return f"{stamp}-{what}-{uuid.uuid4().hex[:6]}"


def write_record(folder: Path | str, record: Record) -> Path:
    """Write ``<folder>/<id>.jsonl`` atomically and return its path."""
    path = Path(folder) / f"{record.id}{PLAIN}"
    write_lines(path, [record.to_json()])
    return path


def add_plan(folder: Path | str, record: Record, plan: str) -> None:
    """Note in ``record``, and in its line wherever that is in the folder, that it is part of ``plan``."""
    if plan in record.plans:
        return
    record.plans.append(plan)
    files = record_files(folder)
    for path in [path for path in files if bare(path) == record.id] or files:
        lines = read_lines(path)
        if any(mine := [bool(line.strip()) and json.loads(line)["id"] == record.id for line in lines]):
            new = [record.to_json() if own else line for own, line in zip(mine, lines, strict=True)]
            write_lines(path, new)


def read_records(folder: Path | str) -> list[Record]:
    """Every record of every file in the folder, by file name; none if there is no folder yet."""
    return [record for path in record_files(folder) for record in _records(path)]


def _records(path: Path) -> list[Record]:
    lines = enumerate(read_lines(path), start=1)
    return [_parse(line, path, number) for number, line in lines if line.strip()]


def pack_records(folder: Path | str) -> list[Path]:
    """Compress every plain file whose runs are all done; returns the packed files.

    The others stay as they are: a run that is still going on will write its record again. Of a file that is
    there plain and packed, the plain copy goes. Raises UserError, before anything is done, if they differ.
    """
    if not Path(folder).is_dir():
        raise UserError(f"There is no folder of records at {folder}; nothing was packed.")
    packed = drop_copies(folder)
    plain = [path for path in record_files(folder) if path.name.endswith(PLAIN)]
    done = [path for path in plain if all(record.status == "done" for record in _records(path))]
    return [*packed, *(pack(path) for path in done)]


def _parse(line: str, path: Path, number: int) -> Record:
    try:
        return Record.from_json(line)
    except ValueError as error:
        raise UserError(
            f"{path}, line {number}, is no readable record ({error}); delete the line or restore the file."
        ) from None


def current(records: Iterable[Record]) -> list[Record]:
    """Every finished training, and the newest finished evaluation of each; oldest first.

    A training repeated with the same settings and seed is a further run: GPUs do not repeat themselves to the
    bit, and no run hides another. Of what never finished, one a config hash: the newest.
    """
    best: dict[tuple, Record] = {}
    for record in sorted(records, key=lambda r: (r.status == "done", r.started, r.id)):
        same: tuple = (record.kind, record.config_hash, machine_of(record))
        if record.status == "done":
            best.pop(same, None)
            same += (training_of(record)[1],)
        best[same] = record
    return sorted(best.values(), key=lambda r: (r.started, r.id))


def machine_of(record: Record) -> str | None:
    """The machine, where it is what was measured: on another one it is another run."""
    return record.device if record.task == "efficiency" else None


def training_of(record: Record) -> tuple[str | None, str | None]:
    """(Config hash, name) of a training, or of the one whose model was evaluated; None without one."""
    if record.kind == "train":
        return record.config_hash, record.id
    name = record.train.get("id")
    return record.train.get("config_hash", name), name


def find_done(folder: Path | str, kind: str, config_hash: str, machine: str | None = None) -> Record | None:
    """The newest finished record of the same run, if there is one; machine: see `machine_of`."""
    wanted = (kind, config_hash, "done", machine)
    same = [
        r
        for r in read_records(folder)
        if (r.kind, r.config_hash, r.status, machine and machine_of(r)) == wanted
    ]
    return max(same, key=lambda r: (r.started, r.id), default=None)


def git_state() -> tuple[str | None, bool | None]:
    """(commit, whether code or configs differ from it); (None, None) where the package is in no git checkout.

    Results do not count as differences: otherwise every run but the first of a sweep would look dirty.
    A copy without history (on a compute node, say) names its commit in INFINI_BENCH_COMMIT.
    """
    if named := os.environ.get("INFINI_BENCH_COMMIT"):
        return named, False
    root = Path(__file__).resolve().parents[2]
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None or _git(root, "ls-files", "--error-unmatch", "infini_bench/report/records.py") is None:
        return None, None  # the second: installed into an environment inside somebody else's checkout
    changes = _git(root, "status", "--porcelain", "--", "infini_bench", "tasks", "conf")
    return commit, bool(changes)


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, str]:
    """Python, infini-bench and the packages that can change a number; absent ones are left out."""
    found = {"python": platform.python_version()}
    for package in ("infini-bench", *PACKAGES):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: str) -> str:
    """The machine in words: the CPU's model and usable cores, or the GPU's name (which needs torch)."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"CPU {model}, {cores} cores"
