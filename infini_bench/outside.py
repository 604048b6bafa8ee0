"""Code that is not this package's, named as FILE.py:NAME or MODULE:NAME. Standard library only.

It is imported only after the user has named it himself, on the command line or in a configuration of his own
(`name`). A name that stands in a checkpoint is somebody else's until then: `resolve` refuses it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from infini_bench.errors import UserError

PACKAGE = Path(__file__).parent
_named: set[str] = set()
_modules: set[str] = set()  # names of those that were loaded because the user named them


def is_outside(target: str) -> bool:
    """Whether a name means code outside this package."""
    return ":" in target


def name(target: str) -> None:
    """The user names ``target``: from now on this process may import it."""
    _named.add(target)


def resolve(target: str) -> Any:
    """The object of ``target``. Raises UserError if the user has not named it, or it cannot be imported."""
    if target not in _named:
        raise UserError(
            f"This model's memory is code outside infini-bench, {target}; name it again if you trust it, "
            f"with memory.kind={target}, or with model=NAME and the --config-dir where your YAML says so."
        )
    return load(target)


def digest(target: str) -> str | None:
    """SHA-256 of the file of FILE.py:NAME; None for modules (their package has a version) and lost files."""
    path = Path(target.rpartition(":")[0])
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.suffix == ".py" and path.is_file() else None


def check_same(target: str, trained: str | None) -> None:
    """Raises UserError if the file of ``target`` has another `digest` than ``trained``; None: any will do."""
    if trained is not None and digest(target) not in (trained, None):
        raise UserError(
            f"{target.rpartition(':')[0]} is not what this model was trained with: the file has changed; "
            "put the old one back, or train anew."
        )


def load(target: str) -> Any:
    """The object that ``target`` names; a file is imported once. Raises UserError in one sentence."""
    source, _, attribute = target.rpartition(":")
    if not source or not attribute:
        raise UserError(f'"{target}" names no code; write FILE.py:NAME or MODULE:NAME.')
    path = Path(source)
    if path.suffix == ".py" and not path.is_file():
        raise UserError(f"{path} is no file; give the path from here, {Path.cwd()}.")
    folder = str(path.parent.resolve()) if path.suffix == ".py" else os.getcwd()
    sys.path.insert(0, folder)  # what a script of that folder could import
    try:
        module = _file(path.resolve()) if path.suffix == ".py" else importlib.import_module(source)
    except Exception as error:  # whatever stands in the user's file
        raise UserError(f"{source} cannot be imported: {where(error)}.") from error
    finally:
        sys.path.remove(folder)
    _modules.add(module.__name__)
    if not hasattr(module, attribute):
        raise UserError(f'{source} has no "{attribute}".')
    return getattr(module, attribute)


@functools.cache
def _file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"outside_{path.stem}_{abs(hash(path))}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def fault(error: BaseException) -> str | None:
    """In a sentence, an error of code that the user named, with its line there; None if it is another's."""
    return f"Code outside infini-bench fails with {where(error)}." if _theirs(error) else None


def where(error: BaseException) -> str:
    """The error and its line, in one line; no line of the import system or of this file."""
    frames = traceback.extract_tb(error.__traceback__)
    last = [frame for frame in frames if not frame.filename.startswith("<frozen ")][-1:]
    last = [frame for frame in last if frame.filename not in (__file__, importlib.__file__)]
    places = [f" ({Path(f.filename).name}, line {f.lineno})" for f in [*_theirs(error), *last]]
    text = " ".join(str(error).split())[:200].rstrip(".")
    return f"{type(error).__name__}: {text}" + "".join(places[:1])


def _theirs(error: BaseException) -> list[traceback.FrameSummary]:
    """Where code that the user named failed, or something that it called; empty if that was this package.

    Either may be at fault then.
    """
    frames = traceback.extract_tb(error.__traceback__)
    files = {getattr(sys.modules.get(name), "__file__", None) for name in _modules}
    at = max((i for i, frame in enumerate(frames) if frame.filename in files), default=len(frames))
    ours = any(Path(frame.filename).is_relative_to(PACKAGE) for frame in frames[at:])
    return [] if ours else frames[at : at + 1]
