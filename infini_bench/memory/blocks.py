"""Cut the tokens of one call into segments that continue where the last call stopped, and join the results.

A call may hold any number of tokens. The state carries the raw (pre-position) keys and values of the last,
unfinished segment, so segment borders lie at multiples of N of the *document*, however it is cut into calls.

Shapes: B batch, T tokens of the call, S segments touched, N segment length, H heads, G KV heads, D head size,
Q queries per segment (N, or only the call's tokens when S = 1), K keys per segment (at most N).
Counts are Python ints while all rows of a batch agree (no host synchronisation) and (B,) tensors once padding
or a row reset made them differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Count = int | Tensor
Slots = range | Tensor


def select(x_BS: Tensor, index: Count) -> Tensor:
    """Entry ``index`` of axis 1, the same for all rows or one for each: (B, S, ...) -> (B, ...)."""
    if isinstance(index, int):
        return x_BS[:, index]
    return x_BS[torch.arange(x_BS.shape[0], device=x_BS.device), index]


@dataclass
class Blocks:
    """The tokens of a call, cut at segment borders.

    q_BSQHD, k_BSKGD, v_BSKGD: raw projections; slots after a row's last token hold zeros.
    slots: position inside its segment of every query: a range, or (B, Q) where rows differ and S = 1.
    done: segments completed before the call. full: segments that the call completes.
    left: tokens of the unfinished segment after the call.
    """

    q_BSQHD: Tensor
    k_BSKGD: Tensor
    v_BSKGD: Tensor
    slots: Slots
    done: Count
    full: Count
    left: Count
    place: Count  # slot of the call's first token, or (B, T) the slot of each where rows differ
    tokens: int  # of the call, padding included

    def ages(self) -> Tensor:
        """Segments finished before each segment of the call: (S,) or (B, S), int64."""
        steps = torch.arange(self.q_BSQHD.shape[1], device=self.q_BSQHD.device)
        return steps + self.done if isinstance(self.done, int) else steps + self.done[:, None]

    def slot_tensor(self) -> Tensor:
        """``slots``, (Q,) or (B, Q), int64."""
        if isinstance(self.slots, Tensor):
            return self.slots
        return torch.arange(self.slots.start, self.slots.stop, device=self.q_BSQHD.device)

    def rest(self) -> tuple[Tensor, Tensor]:
        """Raw keys and values of the unfinished segment: (B, left, G, D); (B, N, G, D) where rows differ."""
        if isinstance(self.full, int) and not self.full:
            k, v = self.k_BSKGD[:, 0], self.v_BSKGD[:, 0]
            return (k[:, : self.left], v[:, : self.left]) if isinstance(self.left, int) else (k, v)
        if isinstance(self.full, int) and isinstance(self.left, int):
            flat = [x.flatten(1, 2) for x in (self.k_BSKGD, self.v_BSKGD)]
            begin = self.full * self.k_BSKGD.shape[2]
            # cloned, so that a state does not keep the whole call's activations alive
            k, v = (x[:, begin : begin + self.left].clone() for x in flat)
            return k, v
        padded = [F.pad(x, (0, 0, 0, 0, 0, 0, 0, 1)) for x in (self.k_BSKGD, self.v_BSKGD)]
        return select(padded[0], self.full), select(padded[1], self.full)

    def join(self, out_BSQHD: Tensor) -> Tensor:
        """Outputs in the order of the call's tokens: (B, T, H, D)."""
        if out_BSQHD.shape[1] == 1 and out_BSQHD.shape[2] == self.tokens:
            return out_BSQHD[:, 0]
        flat = out_BSQHD.flatten(1, 2)
        if isinstance(self.place, int):
            return flat[:, self.place : self.place + self.tokens]
        index = self.place.clamp(0, flat.shape[1] - 1)[..., None, None].expand(-1, -1, *flat.shape[2:])
        return flat.gather(1, index)


def cut(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    rest: tuple[Tensor, Tensor, Count] | None,
    done: Count,
    n: int,
) -> Blocks:
    """Blocks of a call in which every row continues at the same slot."""
    fill = 0
    if rest is not None:
        assert isinstance(rest[2], int)
        fill = rest[2]
        if fill:  # nothing is copied for nothing: on a GPU each copy costs as much as a pass of a kernel
            k_BTGD, v_BTGD = torch.cat([rest[0], k_BTGD], 1), torch.cat([rest[1], v_BTGD], 1)
    tokens, total = q_BTHD.shape[1], k_BTGD.shape[1]
    n_seg, full = -(-total // n), total // n
    slots = range(fill, total)
    if n_seg > 1:
        tail = n_seg * n - total
        if fill or tail:
            q_BTHD = F.pad(q_BTHD, (0, 0, 0, 0, fill, tail))
        if tail:
            k_BTGD, v_BTGD = (F.pad(x, (0, 0, 0, 0, 0, tail)) for x in (k_BTGD, v_BTGD))
        slots = range(n)
    q, k, v = (x.unflatten(1, (n_seg, -1)) for x in (q_BTHD, k_BTGD, v_BTGD))
    return Blocks(q, k, v, slots, done, full, total - full * n, fill, tokens)


def cut_ragged(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    rest: tuple[Tensor, Tensor, Count] | None,
    done: Count,
    mask_BT: Tensor,
    n: int,
) -> Blocks:
    """Blocks of a call with padding (mask False) or rows at different slots; padding is never written."""
    batch, tokens = mask_BT.shape
    fill = torch.zeros(batch, dtype=torch.long, device=q_BTHD.device)
    if rest is not None:
        fill = fill + rest[2]
    if isinstance(done, int):
        done = torch.full_like(fill, done)
    place = fill[:, None] + mask_BT.cumsum(1) - 1
    total = fill + mask_BT.sum(1)
    most = int(total.max())
    n_seg = max(1, -(-most // n))
    size = n_seg * n
    target = torch.where(mask_BT, place, size)  # padding goes to a slot that is cut off again

    def scatter(x: Tensor, start: Tensor | None) -> Tensor:
        flat = x.new_zeros(batch, size + 1, *x.shape[2:])
        if start is not None:
            flat[:, : start.shape[1]] = start
        index = target[..., None, None].expand(-1, -1, *x.shape[2:])
        return flat.scatter(1, index, x)[:, :size].unflatten(1, (n_seg, n))

    k = scatter(k_BTGD, rest[0] if rest else None)
    v = scatter(v_BTGD, rest[1] if rest else None)
    slots: Slots = range(n)
    if n_seg == 1:
        q, slots = q_BTHD[:, None], place.clamp(min=0)
    else:
        q = scatter(q_BTHD, None)
    full = total // n if most >= n else 0
    return Blocks(q, k, v, slots, done, full, total % n, place, tokens)


def cut_one(
    q_B1HD: Tensor, k_B1GD: Tensor, v_B1GD: Tensor, rest: tuple[Tensor, Tensor, Count], done: Count
) -> Blocks:
    """Blocks of a call of one token that completes no row's segment; no shape depends on where rows stand.

    rest: keys and values of all N slots (B, N, G, D), in which the token's are written in place, and how many
    of them are filled (B,).
    """
    k, v, fill = rest[0], rest[1], torch.as_tensor(rest[2])
    rows, slots = torch.arange(len(k), device=k.device), fill[:, None]
    k[rows, fill], v[rows, fill] = k_B1GD[:, 0], v_B1GD[:, 0]
    return Blocks(q_B1HD[:, None], k[:, None], v[:, None], slots, done, 0, fill + 1, slots, 1)
