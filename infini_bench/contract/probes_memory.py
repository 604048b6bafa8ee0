"""What a module remembers: whether it is read, can be learned, stays bounded, is found again, and is precise.

Shapes: B batch, T tokens, N segment length.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infini_bench.contract.probes import NOTHING, SAME, Finding, probe, replaced
from infini_bench.contract.subject import Subject, UnobservableError, Verdict, distance, draw, feed, tensors

READ = 1e-3  # share of the own segment's effect below which a memory might as well be absent
ALIVE = 1e-2  # share of a gate's largest gradient below which it hardly moves
OPEN = 0.5  # neither sigmoid nor tanh is shut or saturated here
DRIFT = 0.1  # error of half precision that is nobody's fault
FOUND = 0.99  # share of the stored entries that must be found again
BEHIND = 4096  # tokens at most, where the state grows or a document is one call


def gates(subject: Subject) -> dict[str, nn.Parameter]:
    """Parameters called gate that are a number or a vector, by name."""
    named = subject.named_parameters()
    return {n: p for n, p in named if "gate" in n.rpartition(".")[2] and p.numel() == max(p.shape, default=1)}


@contextmanager
def opened(subject: Subject, value: float = OPEN) -> Iterator[None]:
    """Inside, every gate stands at ``value``: a gate that starts shut would hide what lies behind it."""
    before = {name: p.detach().clone() for name, p in gates(subject).items()}
    with torch.no_grad():
        for p in gates(subject).values():
            p.fill_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in gates(subject).items():
                p.copy_(before[name])


def need_memory(subject: Subject) -> None:
    if not subject.has_memory:
        raise UnobservableError("nothing is left behind and remembered, by its declaration")


def effect(subject: Subject, x: Tensor, where: slice) -> float:
    """Root mean square change of the last output when the tokens of ``where`` are others."""
    change = feed(subject, replaced(subject, x, where))[0][:, -1] - feed(subject, x)[0][:, -1]
    return change.float().square().mean().sqrt().item()


@probe("memory is read")
@torch.no_grad()
def is_read(subject: Subject) -> Finding:
    """As built, earlier segments change the outputs, next to what the own segment does."""
    need_memory(subject)
    n = subject.segment
    x = draw(subject, 4, 3 * n, 20)
    own = effect(subject, x, slice(2 * n, 3 * n - 1)) if n > 1 else effect(subject, x, slice(2 * n, None))
    share = effect(subject, x, slice(0, 2 * n)) / max(own, 1e-12)
    detail = f"as built, earlier segments have {share:.1g} of the own segment's effect on an output"
    return share >= READ, detail, share


@probe("gates can learn")
def gates_learn(subject: Subject) -> Finding:
    """As built, every gate gets a gradient of the size that it has when half open."""
    need_memory(subject)
    if not gates(subject):
        raise UnobservableError("no parameter is called gate")
    x = draw(subject, 4, 3 * subject.segment, 21)
    start = gate_gradients(subject, x)
    with opened(subject, 0.0):
        best = gate_gradients(subject, x)
    shares = {name: start[name] / best[name] for name in start if best[name] > 0}
    if not shares:
        raise UnobservableError("the gates have no gradient in any position")
    worst = min(shares, key=lambda name: shares[name])
    short = ".".join(worst.split(".")[-2:])
    detail = f"{short} starts with {shares[worst]:.1g} of the gradient that it has at 0 ({start[worst]:.1g})"
    return shares[worst] >= ALIVE, detail, shares[worst]


def gate_gradients(subject: Subject, x: Tensor) -> dict[str, float]:
    """Largest gradient in every gate of a random function of the outputs."""
    y = feed(subject, x)[0]
    found = torch.autograd.grad(random_sum(y), [*gates(subject).values()], allow_unused=True)
    return {n: 0.0 if g is None else g.abs().max().item() for n, g in zip(gates(subject), found, strict=True)}


def random_sum(y: Tensor) -> Tensor:
    """A fixed random function of outputs, a scalar."""
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    return (y * weight.to(y.dtype)).sum() / y.numel() ** 0.5


@probe("gradient reach")
def reach(subject: Subject) -> Finding:
    """Where an earlier segment changes an output, a gradient comes back to it: writing can be learned."""
    need_memory(subject)
    if not subject.differentiable:
        raise UnobservableError("what crosses a boundary is not differentiated, by its declaration")
    n, back = subject.segment, (1, 2, 3)
    x = draw(subject, 2, 4 * n, 22)
    parts = [slice((3 - d) * n, (4 - d) * n) for d in back]
    with torch.no_grad():
        base = feed(subject, x)[0][:, 3 * n :]
        seen = [distance(feed(subject, replaced(subject, x, p))[0][:, 3 * n :], base) for p in parts]
    if max(seen) <= NOTHING:
        raise UnobservableError("nothing of earlier segments is read, so there is nothing to differentiate")
    gradient = input_gradient(subject, x, slice(3 * n, None))
    own = gradient[:, 3 * n :].norm().item()
    norms = [gradient[:, p].norm().item() / own for p in parts]
    words = ", ".join(f"{norm:.2g}" for norm in norms)
    lost = [d for d, norm, s in zip(back, norms, seen, strict=True) if s > NOTHING and norm == 0]
    if lost:
        return (
            False,
            f"{lost[0]} segment(s) back is read but gets no gradient (norms 1, 2, 3 back: {words})",
            0.0,
        )
    return True, f"gradient norms 1, 2, 3 segments back, own segment 1: {words}", norms[-1]


def input_gradient(subject: Subject, x: Tensor, outputs: slice) -> Tensor:
    """Gradient of some outputs in the inputs, or in the embeddings of token ids: (B, T, dim)."""
    if subject.vocab is None:
        x = x.requires_grad_()
        return torch.autograd.grad(random_sum(feed(subject, x)[0][:, outputs]), x)[0]
    seen: list[Tensor] = []
    with watching(subject, lambda ids, vectors: seen.append(vectors)):
        y = feed(subject, x)[0]
    if sum(v.shape[1] for v in seen) != x.shape[1] or not all(v.requires_grad for v in seen):
        raise UnobservableError("its tokens do not pass one nn.Embedding with a gradient")
    found = torch.autograd.grad(random_sum(y[:, outputs]), seen, allow_unused=True)
    return torch.cat([torch.zeros_like(v) if g is None else g for v, g in zip(seen, found, strict=True)], 1)


@contextmanager
def watching(subject: Subject, see) -> Iterator[None]:
    """Inside, ``see(ids, vectors)`` is called wherever token ids (B, T) are embedded."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if inputs[0].dim() == 2:
            see(inputs[0], output)

    tables = [
        m for m in subject.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == subject.vocab
    ]
    handles = [table.register_forward_hook(hook) for table in tables]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@probe("gradient cut")
def cut(subject: Subject) -> Finding:
    """The call for truncated back-propagation gives the same outputs, and a state without gradient."""
    x = draw(subject, 2, 2 * subject.segment, 23)
    first, more = x.split(subject.segment, 1)
    _, state = subject.detached(first, None)
    y, after = subject.detached(more, state)
    gap = distance(y.detach(), feed(subject, x)[0][:, subject.segment :].detach())
    held = [t for t in (*tensors(state), *tensors(after)) if t.requires_grad]
    if held:
        return False, f"{len(held)} tensors of the state still carry a gradient", float(len(held))
    return gap <= SAME, f"outputs agree with uncut calls to {gap:.1g}, and no state carries a gradient", gap


@probe("state growth")
@torch.no_grad()
def growth(subject: Subject) -> Finding:
    """The state of a document of 16 segments is as large as that of 8."""
    if not subject.has_state:
        raise UnobservableError("it takes no state")
    if not subject.bounded:
        raise UnobservableError("it keeps everything, by its declaration")
    state, sizes = None, []
    for index, piece in enumerate(draw(subject, 1, 16 * subject.segment, 24).split(subject.segment, 1)):
        state = feed(subject, piece, state=state)[1]
        sizes += [subject.floats(state)] if index + 1 in (8, 16) else []
    grown = (sizes[1] - sizes[0]) / (8 * subject.segment)
    if grown <= 0:
        return True, f"{sizes[1]:,} floats after 8 and after 16 segments", 0.0
    return False, f"the state grows by {grown:,.3g} floats a token ({sizes[0]:,} to {sizes[1]:,})", grown


@probe("state size")
@torch.no_grad()
def size(subject: Subject) -> Finding:
    """What crosses a boundary is as large as the module says: tables and budgets go by its word."""
    if not subject.has_state:
        raise UnobservableError("it takes no state")
    declared = subject.declared_floats()
    state, sizes = None, []
    for piece in draw(subject, 1, 16 * subject.segment, 27).split(subject.segment, 1):
        state = feed(subject, piece, state=state)[1]
        sizes.append(subject.floats(state))
    live, what = (
        (sizes[-1], "a boundary") if subject.bounded else (sizes[-1] - sizes[-2], "each segment more")
    )
    return declared == live, f"{live:,} floats at {what}, and it says {declared:,}", float(live)


@probe("look-ups")
@torch.no_grad()
def lookups(subject: Subject, entries: int = 512) -> Finding:
    """What was stored last is found again, also after the store has wrapped around; and of a store that is
    full the best match of any query, which an approximate index may miss."""
    store, piece = subject.store(entries), entries // 10  # does not divide the capacity
    generator = torch.Generator().manual_seed(25)
    contents, keys = torch.randn(2, 5 * entries // 2, store.size, generator=generator)
    keys, queries = (
        F.normalize(each, dim=-1) for each in (keys, torch.randn(entries, store.size, generator=generator))
    )
    shares, best = [], 0.0
    for begin in range(0, len(keys) - piece + 1, piece):
        new = slice(begin, begin + piece)
        store.write(keys[new], contents[new])
        right = (store.read(keys[new]) - contents[new]).abs().amax(-1) < 1e-3
        shares.append((begin + piece, right.float().mean().item()))
        if new.stop <= entries < new.stop + piece:
            match = contents[(queries @ keys[: new.stop].T).argmax(-1)]
            best = ((store.read(queries) - match).abs().amax(-1) < 1e-3).float().mean().item()
    before = min(share for end, share in shares if end <= entries)
    after = min(share for end, share in shares if end > entries)
    detail = f"of the entries just written {before:.0%} are found, {after:.0%} once the store has wrapped"
    detail += f"; of other queries' best matches {best:.0%}"
    return min(before, after, best) >= FOUND, detail, min(after, best)


Tails = dict[int, tuple[Tensor, list[Tensor]]]


def precision(dtype: torch.dtype) -> Callable[[Subject, int, Callable[[], Tails]], Verdict]:
    """The probe of one dtype, weights and inputs cast to it; ``exact`` gives float32's `tails`."""

    @probe(str(dtype).removeprefix("torch."))
    @torch.no_grad()
    def precise(subject: Subject, length: int, exact: Callable[[], Tails]) -> Finding:
        """Over a long document outputs stay finite, and neither they nor the state get much further from
        float32 than at its start: a sum that stalls may not show in what is divided by another one."""
        lower = tails(subject, length, dtype)
        first, end = min(lower), max(lower)
        if not lower[end][0].isfinite().all():
            return False, f"outputs are not finite any more by {end:,} tokens", float(end)
        errors = [error(lower[at][0], exact()[at][0]) for at in (first, end)]
        detail = f"error against float32 {errors[0]:.2%} at first, {errors[1]:.2%} by {end:,} tokens"
        holds = errors[1] <= max(DRIFT, 4 * errors[0])
        states = [state_error(lower[at][1], exact()[at][1]) for at in (first, end)]
        if not holds or not lower[end][1]:
            return holds, detail, errors[1]
        detail += f", of the state {states[0]:.2%} and {states[1]:.2%}"
        return states[1] <= max(DRIFT, 4 * states[0]), detail, max(errors[1], states[1])

    return precise


def tails(subject: Subject, length: int, dtype: torch.dtype) -> Tails:
    """Outputs (float32) of the first segment, and of those before the ends of calls 1, 2, 4, ... and last;
    and the tensors of the state that a call leaves behind, where documents are read in several.

    By the position of their end; the last is the first that is not finite, if one is not.
    """
    n, lower = subject.segment, copy.deepcopy(subject).to(dtype)
    streams = subject.has_state and subject.bounded
    tokens = max((length if streams else min(length, BEHIND)) // n, 2) * n
    x = draw(subject, 1, tokens, 26)
    x = x.to(dtype) if subject.vocab is None else x
    size = max((subject.chunk or n) // n, 1) * n if streams else tokens
    found: Tails = {}
    state, end, due = None, 0, size
    for piece in x.split(size, 1):
        y, state = feed(lower, piece, [piece.shape[1]], state)
        end, whole = end + piece.shape[1], bool(y.isfinite().all())
        left = [t.float().clone() for t in tensors(state) if t.is_floating_point()] if streams else []
        found.setdefault(n, (y[:, :n].float(), left))
        if end >= due or end == tokens or not whole:
            found[end], due = ((y[:, -n:] if whole else y).float(), left), 2 * due
        if not whole:
            break
    return found


def error(a: Tensor, b: Tensor) -> float:
    """Root mean square difference, as a share of b's."""
    return ((a - b).norm() / b.norm()).item()


def state_error(state: list[Tensor], exact: list[Tensor]) -> float:
    """The largest `error` of the state's tensors that hold anything."""
    return max((error(a, b) for a, b in zip(state, exact, strict=True) if b.any()), default=0.0)


MEMORY = (gates_learn, is_read)  # with gates as they are built
BEYOND = (reach, cut, growth, size, lookups)  # with gates open
PRECISIONS = (precision(torch.float16), precision(torch.bfloat16))
