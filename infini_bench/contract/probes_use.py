"""How a language model is used: losses with ignored labels, generation from a long prompt and from none.

Shapes: B batch, T tokens, N segment length, V vocabulary.
"""

from __future__ import annotations

import torch

from infini_bench.contract.probes import Finding, probe
from infini_bench.contract.probes_memory import watching
from infini_bench.contract.subject import Subject, UnobservableError, draw, feed
from infini_bench.errors import UserError

TIE = 1e-3  # logits this near to the largest, as a share of it, count as the largest
REFUSALS = (ValueError, UserError)  # saying no in a sentence is an answer


def need_tokens(subject: Subject) -> int:
    if subject.vocab is None:
        raise UnobservableError("its inputs are vectors, not tokens")
    return subject.vocab


@probe("ignored labels")
@torch.no_grad()
def ignored(subject: Subject) -> Finding:
    """A loss on the last segment's labels only, as in question answering, is a number."""
    need_tokens(subject)
    n = subject.segment
    ids = draw(subject, 2, 3 * n + 1, 30)
    every = torch.ones_like(ids, dtype=torch.bool)
    last = every.clone()
    last[:, : 2 * n + 1] = False
    whole, answer = subject.loss(ids, every).item(), subject.loss(ids, last).item()
    if whole == whole and answer == answer:
        return (
            True,
            f"loss {answer:.3g} where only the last segment's labels count, {whole:.3g} on all",
            answer,
        )
    return False, f"loss {answer:.3g} where only the last of 3 segments' labels count", answer


@probe("generation")
@torch.no_grad()
def generation(subject: Subject) -> Finding:
    """Every generated token is the likeliest one given the whole prompt, and all of the prompt was read."""
    vocab, n = need_tokens(subject), subject.segment
    length, tokens, low = 3 * n + n // 2, 4, vocab // 2
    early = draw(subject, 1, length - n, 31) % low
    prompt = torch.cat([early, draw(subject, 1, n, 32) % (vocab - low) + low], 1)
    read: list[torch.Tensor] = []
    with watching(subject, lambda ids, _: read.append(ids.flatten())):
        more = subject.generate(prompt, tokens)
    fed = torch.cat(read).unique() if read else None
    if fed is not None:
        share = torch.isin(early.unique(), fed).float().mean().item()
        if share < 1:
            detail = f"of the tokens before the prompt's last segment {share:.0%} were fed to the model"
            return False, detail, share
    logits = feed(subject, torch.cat([prompt, more], 1))[0]
    if logits.shape[-1] != vocab:
        raise UnobservableError("its outputs are no logits")
    logits = logits[:, length - 1 : -1]
    gap = logits.amax(-1) - logits.gather(-1, more[..., None])[..., 0]
    worst = (gap / logits.abs().amax(-1)).max().item()
    if worst <= TIE:
        return True, f"{tokens} tokens, each the likeliest after all {length} tokens of the prompt", worst
    return (
        False,
        f"a generated token is not the likeliest after the whole prompt (short by {worst:.1g})",
        worst,
    )


@probe("empty prompt")
@torch.no_grad()
def empty(subject: Subject) -> Finding:
    """A prompt without tokens is continued, or refused in words."""
    need_tokens(subject)
    try:
        more = subject.generate(torch.zeros(1, 0, dtype=torch.long), 2)
    except REFUSALS as refusal:
        return True, f"refused: {' '.join(str(refusal).split())[:100]}", None
    return more.shape == (1, 2), f"gives {more.shape[1]} tokens where 2 were asked for", float(more.shape[1])


USE = (ignored, generation, empty)
