"""What any causal module must keep, however it remembers: causality, heads, rows, cuts, padding, documents.

Every probe is a function of a `Subject` that returns a `Verdict`. Inputs are random and seeded; differences
are relative to the largest output (`distance`). What a module remembers is probed in `probes_memory.py`.

Shapes: B batch, T tokens, N segment length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from infini_bench.contract.subject import Subject, UnobservableError, Verdict, distance, draw, feed

SAME = 1e-4  # float32 sums in another order differ by less
NOTHING = 1e-6  # what a token that cannot be seen may change
POSITIONS = 48  # tokens changed one by one, at most

Finding = tuple[bool, str, float | None]


def probe(name: str) -> Callable[[Callable[..., Finding]], Callable[..., Verdict]]:
    """A function that finds something, as one that returns a `Verdict`; a module that crashes has failed."""

    def wrap(find: Callable[..., Finding]) -> Callable[..., Verdict]:
        @functools.wraps(find)
        def run(*args: object) -> Verdict:
            try:
                holds, detail, measured = find(*args)
            except UnobservableError as reason:
                return Verdict(name, "not applicable", str(reason))
            except Exception as error:  # whatever a foreign module raises
                words = " ".join(str(error).split())[:200]
                return Verdict(name, "FAIL", f"crashes with {type(error).__name__}: {words}")
            return Verdict(name, "pass" if holds else "FAIL", detail, measured)

        run.property = name  # type: ignore[attr-defined]
        return run

    return wrap


def replaced(subject: Subject, x: Tensor, where: slice) -> Tensor:
    """``x`` with every token of ``where`` exchanged for another."""
    y = x.clone()
    if subject.vocab is None:
        y[:, where] = draw(subject, x.shape[0], x.shape[1], 99)[:, where]
    else:
        first = 0 if subject.start_token is None else subject.start_token + 1
        y[:, where] = (x[:, where] - first + 1) % (subject.vocab - first) + first
    return y


def influence(subject: Subject, x: Tensor, positions: list[int], sizes: list[int] | None = None) -> Tensor:
    """How much each output of a document (1, T) changes when one token does: (len(positions), T), relative.

    The changed documents are rows of one batch, unless its rows turn out to mix.
    """
    changed = [replaced(subject, x, slice(j, j + 1)) for j in positions]
    together = feed(subject, torch.cat([x, *changed]), sizes)[0]
    base = feed(subject, x.repeat(len(changed) + 1, *[1] * (x.dim() - 1)), sizes)[0]
    if not torch.equal(together[0], base[0]):
        base = feed(subject, x, sizes)[0]
        together = torch.cat([base, *(feed(subject, other, sizes)[0] for other in changed)])
    scale = base.abs().max().clamp_min(1e-12)
    return (together[1:] - base[:1]).abs().flatten(2).amax(2) / scale


def spread(tokens: int, segment: int) -> list[int]:
    """Positions to change: all, or some that lie evenly and all that touch a border."""
    if tokens <= POSITIONS:
        return [*range(tokens)]
    even = torch.linspace(0, tokens - 1, POSITIONS).long().tolist()
    borders = [b + d for b in range(segment, tokens, segment) for d in (-1, 0)]
    return sorted({*even, *borders})


@probe("repeatable")
@torch.no_grad()
def repeatable(subject: Subject) -> Finding:
    """The same document gives the same outputs, whatever was read in between."""
    x, other = draw(subject, 2, 3 * subject.segment, 1), draw(subject, 2, 3 * subject.segment, 2)
    before, _ = feed(subject, x)
    feed(subject, other)
    gap = distance(feed(subject, x)[0], before)
    if gap <= NOTHING:
        return True, "a document read twice gives the same outputs", gap
    return False, f"a document read again, after another, gives other outputs ({gap:.1g}): not reset", gap


@probe("causality")
@torch.no_grad()
def causality(subject: Subject) -> Finding:
    """No output changes with a later token."""
    tokens = 3 * subject.segment
    x, positions = draw(subject, 1, tokens, 3), spread(tokens, subject.segment)
    seen = influence(subject, x, positions)
    if subject.has_state and one_call_works(subject, x):
        seen = seen.maximum(influence(subject, x, positions, [tokens]))
    ahead = torch.tensor(positions)[:, None] - torch.arange(tokens)
    leaks = (seen > NOTHING) & (ahead > 0)
    if not leaks.any():
        return True, f"no output changes with a later token ({len(positions)} tokens changed)", 0.0
    count, far = int(leaks.any(0).sum()), int((ahead * leaks).max())
    detail = f"{count} of {tokens} outputs change with later tokens, up to {far} ahead"
    return False, detail, float(far)


def one_call_works(subject: Subject, x: Tensor) -> bool:
    """Whether a document may be one call; if not, `splits` says so."""
    try:
        subject(x, None)
    except Exception:
        return False
    return True


@probe("head mixing")
@torch.no_grad()
def head_mixing(subject: Subject) -> Finding:
    """Every token of a segment reaches every later one: heads split by a bare reshape see slices."""
    n = subject.segment
    if n < 4:
        raise UnobservableError("a segment of fewer than 4 tokens shows no slices")
    positions = [j for j in spread(n, n) if j < n]
    seen = influence(subject, draw(subject, 1, n, 4), positions) > NOTHING
    back = torch.arange(n) - torch.tensor(positions)[:, None]
    due = (back >= 0) & (back < (subject.window or n))
    if not (seen & due & (back > 0)).any():
        raise UnobservableError("as built, no token of a segment sees another (are its weights zero?)")
    missing = (due & ~seen).sum(0)
    worst = int(missing.argmax())
    sees, all_due = int((due & seen)[:, worst].sum()), int(due[:, worst].sum())
    if not missing.any():
        return True, f"every token of a segment reaches every later one ({n} of {n})", 1.0
    return False, f"token {worst + 1} of a segment sees {sees} of {all_due} tokens up to it", sees / all_due


@probe("rows")
@torch.no_grad()
def rows(subject: Subject) -> Finding:
    """A row's outputs do not depend on the other rows of its batch, also not through the state."""
    x = draw(subject, 3, 3 * subject.segment, 5)
    other = torch.cat([x[:1], draw(subject, 2, 3 * subject.segment, 6)])
    gap = distance(feed(subject, other)[0][:1], feed(subject, x)[0][:1])
    if gap <= NOTHING:
        return True, "a row's outputs do not depend on the rows beside it", gap
    return False, f"a row's outputs change with the rows beside it ({gap:.1g})", gap


@probe("any length")
@torch.no_grad()
def lengths(subject: Subject) -> Finding:
    """The outputs of a document's beginning are those of the whole, wherever it ends."""
    n = subject.segment
    x = draw(subject, 2, 3 * n, 7)
    whole = feed(subject, x)[0]
    tried = sorted({1, max(n - 1, 1), n, n + 1, 2 * n + n // 2})
    gaps = {t: distance(feed(subject, x[:, :t])[0], whole[:, :t]) for t in tried}
    worst = max(gaps, key=lambda t: gaps[t])
    if gaps[worst] <= SAME:
        words = ", ".join(map(str, tried))
        return (
            True,
            f"the first {words} tokens give what they give in {3 * n} ({gaps[worst]:.1g})",
            gaps[worst],
        )
    return (
        False,
        f"{worst} tokens alone give other outputs than inside {3 * n} ({gaps[worst]:.2g})",
        gaps[worst],
    )


@probe("split invariance")
@torch.no_grad()
def splits(subject: Subject) -> Finding:
    """Any cut of a document into calls gives the outputs of segment-wise calls, down to single tokens."""
    n = subject.segment
    if not subject.has_state:
        raise UnobservableError("it takes no state, so a document cannot be cut")
    if subject.call_is_segment:
        raise UnobservableError("a call is a segment by its declaration, so other cuts are other documents")
    tokens = 2 * n + n // 2
    x = draw(subject, 2, tokens, 8)
    whole = feed(subject, x)[0]
    uneven = [n - n // 4, n // 2 + 1]
    uneven = [*uneven, tokens - sum(uneven)]
    cuts = {
        "one call": [tokens],
        f"calls of {'+'.join(map(str, uneven))}": uneven,
        "single tokens": [1] * tokens,
    }
    gaps = {name: distance(feed(subject, x, sizes)[0], whole) for name, sizes in cuts.items()}
    worst = max(gaps, key=lambda name: gaps[name])
    if gaps[worst] <= SAME:
        return True, f"{', '.join(cuts)} agree with segment-wise calls ({gaps[worst]:.1g})", gaps[worst]
    return False, f"{worst} disagree with segment-wise calls ({gaps[worst]:.2g})", gaps[worst]


@probe("state is a value")
@torch.no_grad()
def values(subject: Subject) -> Finding:
    """A state that was given to a call can be used again: kept, compared, handed to another beam."""
    if not subject.has_state:
        raise UnobservableError("it takes no state")
    n = subject.segment
    first, more = draw(subject, 2, n + n // 2, 9), draw(subject, 2, n, 10)
    _, state = feed(subject, first)
    once, after = feed(subject, more, state=state)
    feed(subject, more, state=after)
    gap = distance(feed(subject, more, state=state)[0], once)
    if gap <= NOTHING:
        return True, "a state used twice gives the same outputs twice", gap
    return False, f"a state used twice gives other outputs ({gap:.1g}): calls write into it", gap


@probe("padding")
@torch.no_grad()
def padding(subject: Subject) -> Finding:
    """Padding on the left of a row changes nothing: it is neither seen nor written."""
    tokens, pad = 3 * subject.segment, subject.segment // 2 + 1
    x = draw(subject, 2, tokens, 11)
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[1, :pad] = False
    y = subject.padded(x, mask)
    alone = feed(subject, x[1:, pad:])[0]
    gap = max(distance(y[1:, pad:], alone), distance(y[:1], feed(subject, x[:1])[0]))
    if gap <= SAME:
        return True, f"{pad} padding tokens change nothing ({gap:.1g})", gap
    return False, f"{pad} padding tokens change the outputs of the row's own tokens ({gap:.2g})", gap


@probe("new document in a row")
@torch.no_grad()
def documents(subject: Subject) -> Finding:
    """A row that begins a new document forgets the old one; the others go on."""
    n = subject.segment
    first, x = draw(subject, 2, 2 * n, 12), draw(subject, 2, n, 13)
    begins = torch.tensor([False, True])
    if subject.start_token is not None:
        x[begins, 0] = subject.start_token
    y = subject.restart(x, feed(subject, first)[1], begins)
    on = distance(y[:1], feed(subject, x[:1], state=feed(subject, first[:1])[1])[0])
    new = distance(y[1:], feed(subject, x[1:])[0])
    if max(on, new) <= SAME:
        return True, "the row starts afresh and the other goes on", max(on, new)
    what = (
        f"the new row still differs from a fresh document ({new:.2g})"
        if new > SAME
        else "the other row changed"
    )
    return False, what, max(on, new)


SEQUENCE = (causality, head_mixing, rows, lengths, splits, values, padding, documents)
