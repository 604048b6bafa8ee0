"""All probes on one subject, in the order in which they can be trusted."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from infini_bench import outside
from infini_bench.contract.probes import SEQUENCE, repeatable
from infini_bench.contract.probes_memory import BEYOND, MEMORY, PRECISIONS, opened, tails
from infini_bench.contract.probes_use import USE
from infini_bench.contract.subject import Subject, UnobservableError, Verdict, draw, feed
from infini_bench.errors import UserError


def check(subject: Subject, length: int = 32768, seed: int = 0) -> Iterator[Verdict]:
    """A verdict for every property. length: tokens of the documents that show precision.

    The first probes see the module as it was built. For all others its gates are half open, so that a gate
    that starts shut cannot hide what lies behind it. Where reading the same document twice gives two results,
    no other probe means anything, and none is said to. Raises UserError if it cannot be read at all.
    """
    torch.manual_seed(seed)
    subject.eval()
    call(subject)
    first = repeatable(subject)
    yield first
    later = [*SEQUENCE, *BEYOND, *USE]
    if first.verdict == "FAIL":
        why = "the module is not repeatable, so no difference between two readings means anything"
        names = [each.property for each in [*MEMORY, *later, *PRECISIONS]]  # type: ignore[attr-defined]
        yield from (Verdict(name, "not applicable", why) for name in names)
        return
    for each in MEMORY:
        yield each(subject)
    with opened(subject):
        for each in later:
            yield each(subject)
        exact = functools.cache(lambda: tails(subject, length, torch.float32))
        for precise in PRECISIONS:
            yield precise(subject, length, exact)


@torch.no_grad()
def call(subject: Subject) -> None:
    """Reads a document of three segments. Raises UserError, with the place, if the module crashes."""
    try:
        feed(subject, draw(subject, 2, 3 * subject.segment, 0))
    except UnobservableError:
        return  # the probes say so
    except UserError:
        raise
    except Exception as error:  # whatever a foreign module raises
        words = f"The module crashes when it is called, so nothing was checked: {outside.where(error)}."
        raise UserError(words) from error
