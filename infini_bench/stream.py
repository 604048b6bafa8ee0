"""The only way evaluation reads long input: chunk by chunk, with the state carried, in constant memory.

A model here is anything with ``step``, ``losses`` and ``device`` as `infini_bench.decoder` has them. States
are values: none of these functions changes the one it is given, so one can be kept and continued twice.

Shapes: B batch, T tokens, t tokens of one chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infini_bench.decoding import decoding
from infini_bench.progress import Handle

State = Any  # MemoryCache, or None at the start of a document


def chunked(ids_BT: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Views (B, t) of ids, t = size but for the last."""
    for start in range(0, ids_BT.shape[1], size):
        yield ids_BT[:, start : start + size]


@torch.no_grad()
def stream_losses(
    model, ids_BT: np.ndarray, chunk: int, state: State = None, progress: Handle | None = None
) -> tuple[np.ndarray, State]:
    """Loss in nats of every token but the first: (B, T - 1) float32, and the state.

    The state has seen all tokens but the last, so the next call starts with that one: calls on
    ``ids[a:b + 1]`` and ``ids[b:c + 1]`` give together the losses of one call on ``ids[a:c + 1]``.
    """
    losses = []
    for inputs, targets in zip(chunked(ids_BT[:, :-1], chunk), chunked(ids_BT[:, 1:], chunk), strict=True):
        nats, state = model.losses(_tensor(inputs, model), _tensor(targets, model), state)
        losses.append(nats.float().cpu().numpy())
        _advance(progress, inputs)
    return np.concatenate(losses, axis=1), state


@torch.no_grad()
def feed(model, chunks: Iterable[np.ndarray], state: State = None, progress: Handle | None = None) -> State:
    """The state after reading all chunks (B, t); no logits are computed."""
    for chunk in chunks:
        _, state = model.step(_tensor(chunk, model), state, keep="none")
        _advance(progress, chunk)
    return state


@torch.no_grad()
def prefill_rows(
    model, rows: list[np.ndarray], state: State = None, progress: Handle | None = None
) -> tuple[Tensor, State]:
    """As `prefill`, for rows (t,) of different lengths that are short enough for one call."""
    width = max(map(len, rows))
    ids_BT = np.stack([np.pad(row.astype(np.int64), (width - len(row), 0)) for row in rows])
    if all(len(row) == width for row in rows):
        return prefill(model, [ids_BT], state, progress)
    mask_BT = np.stack([np.arange(width) >= width - len(row) for row in rows])
    mask = torch.from_numpy(mask_BT).to(model.device)
    logits, state = model.step(_tensor(ids_BT, model), state, keep="last", mask=mask)
    _advance(progress, np.concatenate(rows))
    return logits[:, -1], state


@torch.no_grad()
def prefill(
    model, chunks: Iterable[np.ndarray], state: State = None, progress: Handle | None = None
) -> tuple[Tensor, State]:
    """Logits after the last token, (B, V) float32, and the state.

    Chunks (B, t) may be made as they are read; two of them exist at a time.
    """
    chunks = iter(chunks)
    last = next(chunks, None)
    if last is None:
        raise ValueError("nothing to read: no chunk was given")
    for chunk in chunks:
        state = feed(model, [last], state, progress)
        last = chunk
    logits, state = model.step(_tensor(last, model), state, keep="last")
    _advance(progress, last)
    return logits[:, -1], state


@torch.no_grad()
def generate(
    model,
    logits_BV: Tensor,
    state: State,
    max_new_tokens: int,
    *,
    eos_id: int | None = None,
    greedy: bool = True,
    temperature: float = 1.0,
    top_p: float = 1.0,
    draws_BT: Tensor | None = None,
    progress: Handle | None = None,
) -> np.ndarray:
    """Tokens (B, new) int64 that follow `prefill`'s logits and state, one step at a time.

    A row ends with its first ``eos_id`` and stays at it; generation ends when all rows have, or after
    ``max_new_tokens``. Sampling draws from the smallest set of tokens that holds ``top_p`` of the mass at
    this temperature. draws_BT: numbers in [0, 1), one for each row and new token, which decide it, so that a
    row's text depends neither on its neighbours nor on the device's generator.
    """
    tokens: list[Tensor] = []
    steps = decoding(model, state)
    del state  # the steps replace it: what grows would else be held twice
    done_B1 = torch.zeros(len(logits_BV), 1, dtype=torch.bool, device=logits_BV.device)
    while len(tokens) < max_new_tokens:
        if tokens:
            logits_BV = steps.step(tokens[-1])
        if greedy:
            next_B1 = logits_BV.argmax(-1, keepdim=True)
        elif draws_BT is None:
            raise ValueError("sampling needs its draws, so that the run can be repeated")
        else:
            next_B1 = sample(logits_BV, temperature, top_p, draws_BT[:, len(tokens)])
        if eos_id is not None:
            next_B1 = next_B1.masked_fill(done_B1, eos_id)
            done_B1 |= next_B1 == eos_id
        tokens.append(next_B1)
        if progress is not None:
            progress.advance(1)
        if eos_id is not None and done_B1.all():
            break
    return torch.cat(tokens, dim=1).cpu().numpy()


def sample(logits_BV: Tensor, temperature: float, top_p: float, draw_B: Tensor) -> Tensor:
    """One token a row by nucleus sampling (Holtzman et al. 2020): (B, 1) int64 on the logits' device.

    draw_B: in [0, 1); the token is the one in whose share of the kept mass, largest first, the draw falls.
    """
    p_BV, order_BV = (logits_BV.float() / temperature).softmax(-1).sort(dim=-1, descending=True)
    p_BV = p_BV.masked_fill(p_BV.cumsum(-1) - p_BV >= top_p, 0.0)  # the first token always stays
    ends_BV = p_BV.cumsum(-1)
    goal_B1 = draw_B.to(ends_BV)[:, None] * ends_BV[:, -1:]
    last_B1 = (p_BV > 0).sum(-1, keepdim=True) - 1  # where rounding would go past the kept ones
    return order_BV.gather(-1, torch.searchsorted(ends_BV, goal_B1, right=True).minimum(last_B1))


def _tensor(ids_Bt: np.ndarray, model) -> Tensor:
    return torch.from_numpy(ids_Bt.astype(np.int64)).to(model.device)


def _advance(progress: Handle | None, chunk: np.ndarray) -> None:
    if progress is not None:
        progress.advance(chunk.size)
