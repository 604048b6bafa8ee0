"""Cheaper attention inside the own segment, and the choice of what stands beside a compressive memory.

``sparse``: the fixed pattern of Sparse Transformer (arXiv 1904.10509) with a sliding window: with stride l,
slot i of a segment sees the last l slots, itself included, and before them slots l-1, 2l-1, 3l-1 ...
It is computed in blocks of l queries, whose keys are their own block, the block before and the N / l strided
ones: 2l + N / l keys a query instead of N.

``kernel``: causal linear attention (arXiv 2006.16236) with sigma = ELU + 1 and the sum as normaliser. Sums
that forget where a key stood would make it blind to order, so the numerator's features are rotated and the
normaliser's are not (RoFormer, arXiv 2104.09864, Eq. 19):
    o_i = sum_{j<=i} (R_i sigma(q_i) . R_j sigma(k_j)) v_j / sum_{j<=i} sigma(q_i) . sigma(k_j)
It is computed in chunks: masked scores inside a chunk, and a D x D sum for the chunks before it, in float32.

Both look at the own segment only, are differentiated throughout, and carry nothing over a boundary.

Shapes: B batch, S segments, K keys of a segment (N, or as many as there are), Q queries, l stride, P blocks,
L tokens of a chunk, H heads, G KV heads, R = H / G, D and E head size.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from infini_bench.memory.base import Memory, Rope, State, attend, rotate
from infini_bench.memory.blocks import Blocks
from infini_bench.memory.features import elu1
from infini_bench.memory.window import WindowMemory
from infini_bench.schema import MemoryConfig

CHUNK = 64  # L, tokens


class LocalMemory(Memory):
    """Attention that ends at its segment's start. A subclass computes it for whole segments and for a few
    queries of one."""

    has_memory = False
    steady = True
    settled = 0

    def start(self, k_BTGD: Tensor) -> State:
        return {}

    def state_floats(self) -> int:
        return 0

    def segments(self, b: Blocks, carry: State, rope: Rope) -> tuple[Tensor, State]:
        if isinstance(b.slots, Tensor) or b.q_BSQHD.shape[2] == 1:
            return self.few(b, rope), {}
        before = b.k_BSKGD.shape[2] - b.q_BSQHD.shape[2]  # tokens of the segment that earlier calls answered
        q = F.pad(b.q_BSQHD, (0, 0, 0, 0, before, 0))
        return self.whole(q, b.k_BSKGD, b.v_BSKGD, rope)[:, :, before:], {}

    @abstractmethod
    def whole(self, q_BSKHD: Tensor, k_BSKGD: Tensor, v_BSKGD: Tensor, rope: Rope) -> Tensor:
        """Outputs (B, S, K, H, D) of segments with a query at every slot."""

    @abstractmethod
    def few(self, b: Blocks, rope: Rope) -> Tensor:
        """Outputs (B, S, Q, H, D) of one token, or of rows that stand at different slots."""


class SparseMemory(LocalMemory):
    """The last ``stride`` keys of the segment, and every ``stride``-th before them."""

    def __init__(self, cfg: MemoryConfig, heads: int, kv_heads: int, head_dim: int):
        super().__init__(cfg, heads, kv_heads, head_dim)
        self.stride = cfg.stride

    def seen(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether the query at one slot sees the key at another: bool, broadcast."""
        strided = key % self.stride == self.stride - 1
        return (key >= 0) & (key <= query) & ((query - key < self.stride) | strided)

    def whole(self, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        length, step = q.shape[2], self.stride
        blocks = -(-length // step)
        q, k = rotate(q, rope, range(length)), rotate(k, rope, range(length))
        padded = [F.pad(x, (0, 0, 0, 0, 0, blocks * step - length)).flatten(0, 1) for x in (q, k, v)]
        keys, values = (self.gather(x) for x in padded[1:])
        begin = step * torch.arange(blocks, device=q.device)[:, None, None]
        query = begin + torch.arange(step, device=q.device)[:, None]
        near = begin - step + torch.arange(2 * step, device=q.device)
        far = step * torch.arange(1, blocks + 1, device=q.device) - 1
        # a strided key of the own block or the one before is there already
        mask = torch.cat([(far < begin - step) & self.seen(query, far), self.seen(query, near)], -1)
        queries = padded[0].unflatten(1, (blocks, step))
        out = attend(queries, keys, values, mask.repeat(len(queries), 1, 1)[:, None], False)
        return out.flatten(1, 2)[:, :length].unflatten(0, q.shape[:2])

    def gather(self, x_BKGD: Tensor) -> Tensor:
        """What each block may see, its strided entries first: (B, P, P+2l, G, D)."""
        step = self.stride
        near = F.pad(x_BKGD, (0, 0, 0, 0, step, 0)).unfold(1, 2 * step, step).movedim(-1, 2)
        far = x_BKGD[:, None, step - 1 :: step].expand(-1, near.shape[1], -1, -1, -1)
        return torch.cat([far, near], 2)

    def few(self, b: Blocks, rope: Rope) -> Tensor:
        length, step = b.k_BSKGD.shape[2], self.stride
        slots = torch.arange(length, device=b.q_BSQHD.device)
        if isinstance(b.slots, Tensor):
            q, k = rotate(b.q_BSQHD, rope, b.slots), rotate(b.k_BSKGD, rope, range(length))
            return attend(q, k, b.v_BSKGD, self.seen(b.slots[..., None], slots)[:, None], False)
        last = max(length - step, 0)  # one token, at the last slot: the keys that it sees, and no others
        seen = torch.cat([slots[step - 1 : last : step], slots[last:]])
        k = rotate(b.k_BSKGD[:, :, seen], rope, seen)
        return attend(rotate(b.q_BSQHD, rope, b.slots), k, b.v_BSKGD[:, :, seen], None, False)


class KernelMemory(LocalMemory):
    """Linear attention: ELU + 1 features, rotated in the numerator."""

    def whole(self, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        length = q.shape[2]
        slots = range(length)
        with torch.autocast(q.device.type, enabled=False):
            plain_q, plain_k = elu1(q.float()), elu1(k.float())
            norm = torch.einsum("bskgrd,bskgd->bskgr", self.grouped(plain_q), plain_k.cumsum(2))
            q, k = rotate(plain_q, rope, slots).float(), rotate(plain_k, rope, slots).float()
            chunks = -(-length // CHUNK)
            q_, k_, v_ = (
                F.pad(x, (0, 0) * (x.dim() - 3) + (0, chunks * CHUNK - length)).unflatten(2, (chunks, -1))
                for x in (self.grouped(q), k, v.float())
            )
            sums = torch.einsum("bsplgd,bsplge->bspgde", k_, v_).cumsum(2)
            earlier = torch.einsum("bsplgrd,bspgde->bsplgre", q_[:, :, 1:], sums[:, :, :-1])
            scores = torch.einsum("bsplgrd,bspmgd->bspgrlm", q_, k_).tril()
            top = torch.einsum("bspgrlm,bspmge->bsplgre", scores, v_)
            top = torch.cat([top[:, :, :1], top[:, :, 1:] + earlier], 2).flatten(2, 3)[:, :, :length]
            return (top / norm[..., None]).flatten(3, 4).to(v.dtype)

    def few(self, b: Blocks, rope: Rope) -> Tensor:
        own, slots = range(b.k_BSKGD.shape[2]), b.slot_tensor()
        seen = torch.arange(len(own), device=slots.device) <= slots[..., None]
        seen = seen.view(-1, 1, slots.shape[-1], 1, 1, len(own))
        with torch.autocast(slots.device.type, enabled=False):
            q, k = elu1(b.q_BSQHD.float()), elu1(b.k_BSKGD.float())
            norm = (torch.einsum("bsqgrd,bskgd->bsqgrk", self.grouped(q), k) * seen).sum(-1)
            q, k = rotate(q, rope, b.slots).float(), rotate(k, rope, own).float()
            scores = torch.einsum("bsqgrd,bskgd->bsqgrk", self.grouped(q), k) * seen
            top = torch.einsum("bsqgrk,bskge->bsqgre", scores, b.v_BSKGD.float())
            return (top / norm[..., None]).flatten(3, 4).to(b.q_BSQHD.dtype)

    def grouped(self, x_BSQHD: Tensor) -> Tensor:
        """(B, S, Q, G, R, D)"""
        return x_BSQHD.unflatten(3, (self.kv_heads, -1))


PATHS: dict[str, type[Memory]] = {
    "block": WindowMemory,
    "sliding": WindowMemory,
    "xl": WindowMemory,
    "sparse": SparseMemory,
    "kernel": KernelMemory,
}


def local_path(cfg: MemoryConfig, heads: int, kv_heads: int, head_dim: int) -> Memory:
    """The attention ``memory.local`` that stands beside a compressive memory, with a cache of its own."""
    return PATHS[cfg.local](replace(cfg, kind=cfg.local), heads, kv_heads, head_dim)
