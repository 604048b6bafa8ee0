"""The wheel holds every package: an editable install would not show one that pyproject.toml forgets."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [
        f.parent.relative_to(ROOT)
        for top in ("infini_bench", "tasks", "conf")
        for f in (ROOT / top).rglob("__init__.py")
    ]
    names = [".".join(f.parts) for f in folders]
    assert sorted(listed) == sorted(n if n.startswith("infini_bench") else f"infini_bench.{n}" for n in names)
