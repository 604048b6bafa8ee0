"""Memorizing Transformers' memory (arXiv 2203.08913): exact top-k attention over C stored keys and values.

In one chosen layer, on top of the Transformer-XL cache that all layers have. After every segment its raw
(pre-position) keys and values are appended, oldest first out; nothing is differentiated through the store,
so the layer learns to read, not to write. Queries and keys of the look-up are L2-normalised and scaled by a
learned positive factor a head, exp(memory_scale), 1 at the start. The look-up is mixed with the local
attention by one gate a head, g A_knn + (1 - g) A_local, g = 0.5 at the start unless ``gate_start`` differs.

The search is exact whoever does it (``memory.index``): torch on any device, or faiss's flat inner-product
index on the CPU. Both find the same entries, but for ties. Only the choice sees all C scores of a query, by
torch ``SCORES`` of them at once, and without gradient. Gradients flow through what was chosen: kept for the
backward pass are n scores and places a query, less than 1 KiB a head at n = 32, and sums over the chosen rows
are taken without a copy of these (`weighted_rows`), which would be 16 KiB at D = 64. To ``torch.compile`` the
search is one opaque operator, `nearest`.

Shapes: B batch, S segments, N segment length, Q queries, C stored entries, P entries before and in a call,
H heads, G KV heads, R = H / G, D head size, n neighbours; Y = B G, and X = Q R queries that share a KV head.
"""

from __future__ import annotations

import importlib.util
import logging
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infini_bench.errors import UserError
from infini_bench.memory.base import Rope, State
from infini_bench.memory.blocks import Blocks, Count
from infini_bench.memory.window import WindowMemory
from infini_bench.schema import MemoryConfig

log = logging.getLogger(__name__)
told: set[str] = set()  # what the log says already
FAISS = importlib.util.find_spec("faiss") is not None
SCORES = 2**27  # that exist at once: 512 MiB in float32
WEIGHTS = 2**25  # of rows summed by one kernel: CUDA's backward pass counts 32 threads for each, in int32
FOLD = 16  # scores of which the first round of a search sees the largest only


def searcher(index: str, device: str) -> str:
    """``torch`` or ``faiss``: who searches on this kind of device; told once in the log.

    Raises UserError where faiss is asked for and missing, or cannot reach the tensors.
    """
    if index == "faiss" and not FAISS:
        raise UserError("memory.index=faiss needs faiss: install faiss-cpu, or set memory.index=torch.")
    if index == "faiss" and device != "cpu":
        raise UserError(f"memory.index=faiss searches on the CPU, not on {device}; set memory.index=torch.")
    chosen = finder(index, device)
    if chosen not in told:
        told.add(chosen)
        log.info("neighbours on %s are found by %s", device, chosen)
    return chosen


def finder(index: str, device: str) -> str:
    """As `searcher`, of what can be."""
    return "faiss" if index != "torch" and FAISS and device == "cpu" else "torch"


class KnnMemory(WindowMemory):
    """Transformer-XL's cache and a first-in-first-out store of ``entries`` keys and values.

    State: the cache, and ``mem_k``, ``mem_v`` (B, <= C, G, D), newest last; ``stored``: how many of them are
    live in each row. (dk + dv) G C floats here, plus the cache: Table 1 counts the first, Table 2 both.
    """

    steady = False

    def __init__(self, cfg: MemoryConfig, heads: int, kv_heads: int, head_dim: int):
        super().__init__(cfg, heads, kv_heads, head_dim)
        if cfg.index == "faiss":
            searcher(cfg.index, "cpu")  # where it is missing, better said now than at the first look-up
        self.memory_gate = nn.Parameter(torch.full((heads,), cfg.gate_start))
        self.memory_scale = nn.Parameter(torch.zeros(heads))

    def reset_parameters(self) -> None:
        self.memory_gate.fill_(self.cfg.gate_start)
        self.memory_scale.zero_()

    def state_floats(self) -> int:
        return super().state_floats() + 2 * self.head_dim * self.kv_heads * self.cfg.entries

    def start(self, k_BTGD: Tensor) -> State:
        empty = k_BTGD[:, :0].detach()
        return {**super().start(k_BTGD), "mem_k": empty, "mem_v": empty, "stored": 0}

    def segments(self, b: Blocks, carry: State, rope: Rope) -> tuple[Tensor, State]:
        local, cache = super().segments(b, carry, rope)
        own = [x.detach().flatten(1, 2) for x in (b.k_BSKGD, b.v_BSKGD)]
        k, v = (torch.cat([carry[name], x], 1) for name, x in zip(("mem_k", "mem_v"), own, strict=True))
        kept = keep(k, v, carry["mem_k"].shape[1], carry["stored"], b.full, self.segment, self.cfg.entries)
        state = {**cache, **kept}
        if not self.enabled:
            return local, state
        with torch.autocast(local.device.type, enabled=False):
            read, known = self.look_up(b, k, v, carry)
            gate = torch.sigmoid(self.memory_gate.float())[:, None]
            mixed = gate * read + (1 - gate) * local.float()
            return torch.where(known[:, :, None, None, None], mixed, local.float()).to(local.dtype), state

    def look_up(self, b: Blocks, k_BPGD: Tensor, v_BPGD: Tensor, carry: State) -> tuple[Tensor, Tensor]:
        """Top-k attention of each segment over what is stored before it, and whether anything is.

        (B, S, Q, H, D) float32, and bool (B or 1, S).
        """
        self.form = f"neighbours by {finder(self.cfg.index, k_BPGD.device.type)}"
        before, stored = carry["mem_k"].shape[1], carry["stored"]
        steps = torch.arange(b.q_BSQHD.shape[1], device=k_BPGD.device) * self.segment
        known = torch.as_tensor(stored, device=k_BPGD.device).view(-1, 1) + steps > 0
        # counts are equal while no entry is dead, and then nothing needs a mask
        oldest = None if isinstance(stored, int) else (before - stored).repeat_interleave(self.kv_heads)
        q = F.normalize(b.q_BSQHD.float(), dim=-1).unflatten(3, (self.kv_heads, -1))
        q = q.permute(0, 3, 1, 2, 4, 5)  # (B, G, S, Q, R, D)
        keys, values = F.normalize(k_BPGD.float(), dim=-1), v_BPGD.float()
        keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (keys, values))
        ends = [before + s * self.segment for s in range(q.shape[2])]
        most = min(self.cfg.neighbours, keys.shape[1])
        settings = (ends, self.cfg.entries, most, self.cfg.index)
        top, place = nearest(q.flatten(3, 4).flatten(0, 1), keys, oldest, *settings)
        scale = self.memory_scale.float().exp().view(self.kv_heads, 1, 1, -1, 1)
        # rows without any live entry are replaced by the caller; finite scores keep their gradient finite too
        weights = torch.softmax(scale * top.view(*q.shape[:-1], most).clamp_min(-1e4), -1)
        read = weighted_rows(weights.view(place.shape), place, values).view(q.shape)
        return read.permute(0, 2, 3, 1, 4, 5).flatten(3, 4), known


def keep(
    k_BPGD: Tensor,
    v_BPGD: Tensor,
    before: int,
    stored: Count,
    full: Count,
    segment: int,
    entries: int | None = None,
) -> State:
    """The newest ``entries`` (None = all) of the completed segments; rows that differ are aligned at the end.

    before: of the P entries, those stored before the call. stored: how many of these are live in each row.
    """
    most = k_BPGD.shape[1] if entries is None else entries
    live, end = stored + full * segment, before + full * segment
    if isinstance(live, int) and isinstance(end, int):
        part = slice(max(end - most, 0), end)
        return {"mem_k": k_BPGD[:, part].clone(), "mem_v": v_BPGD[:, part].clone(), "stored": min(live, most)}
    ends = torch.as_tensor(end, device=k_BPGD.device).expand(k_BPGD.shape[0])
    size = min(int(ends.max()), most)
    index = (ends[:, None] - size + torch.arange(size, device=ends.device)).clamp_min(0)[..., None, None]
    index = index.expand(-1, -1, *k_BPGD.shape[2:])
    live = torch.as_tensor(live).clamp(max=most)
    return {"mem_k": k_BPGD.gather(1, index), "mem_v": v_BPGD.gather(1, index), "stored": live}


@torch.library.custom_op(
    "infini_bench::nearest",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor? oldest, int[] ends, int entries, int n, str index)"
    " -> (Tensor, Tensor)",
)
def nearest(q_YSXD, k_YPD, oldest_Y, ends, entries, n, index):
    """The n largest inner products of every query, and the row of each key in (Y P, D): (Y, S, X, n).

    ends: a segment's queries see the ``entries`` keys before this one. oldest: each row's first live key;
    None = all are. Scores are -inf where fewer than n are there. Differentiable in the queries.
    """
    top = q_YSXD.new_full((*q_YSXD.shape[:3], n), -torch.inf)
    place = torch.zeros_like(top, dtype=torch.long)
    search = by_faiss if searcher(index, q_YSXD.device.type) == "faiss" else by_torch
    for s, end in enumerate(ends):
        first = max(end - entries, 0)
        dead = None if oldest_Y is None else (oldest_Y - first).clamp(0, end - first)
        found = min(n, end - first)
        if found:
            best = search(q_YSXD[:, s], k_YPD[:, first:end], dead, found)
            top[:, s, :, :found], place[:, s, :, :found] = best[0], best[1] + first
    rows = torch.arange(len(place), device=place.device) * k_YPD.shape[1]
    return top, place.add_(rows.view(-1, 1, 1, 1))


@nearest.register_fake
def _nearest_like(q_YSXD, k_YPD, oldest_Y, ends, entries, n, index):
    shape = (*q_YSXD.shape[:3], n)
    return q_YSXD.new_empty(shape), q_YSXD.new_empty(shape, dtype=torch.long)


def _save_nearest(ctx, inputs, output):
    ctx.save_for_backward(inputs[1], output[1])


def _backward_of_nearest(ctx, dtop, _):
    k_YPD, place = ctx.saved_tensors
    return weighted_rows(dtop, place, k_YPD), *(None,) * 6


nearest.register_autograd(_backward_of_nearest, setup_context=_save_nearest)


def weighted_rows(weights_YSXn: Tensor, place_YSXn: Tensor, x_YPD: Tensor) -> Tensor:
    """Sum over n of weights times the rows ``place`` of x (Y P, D): (Y, S, X, D); the rows are not copied."""
    rows, bags = x_YPD.flatten(0, 1), max(1, WEIGHTS // place_YSXn.shape[-1])
    parts = zip(*(x.flatten(0, 2).split(bags) for x in (weights_YSXn, place_YSXn)), strict=True)
    sums = [F.embedding_bag(place, rows, per_sample_weights=w, mode="sum") for w, place in parts]
    return torch.cat(sums).view(*place_YSXn.shape[:3], -1)


def by_torch(q_YXD: Tensor, k_YCD: Tensor, dead_Y: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
    """The n largest inner products with the keys after each row's ``dead`` first, and where: (Y, X, n).

    In any order; a row with fewer live keys has scores of -inf for the rest.
    """
    entries, parts = k_YCD.shape[1], []
    for q in q_YXD.split(max(1, SCORES // (k_YCD.shape[0] * entries)), 1):
        scores = q @ k_YCD.mT
        if dead_Y is not None:
            dead = torch.arange(entries, device=k_YCD.device) < dead_Y[:, None]
            scores.masked_fill_(dead[:, None], -torch.inf)
        parts.append(largest(scores, n))
    top, place = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    return top, place


def largest(scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """``topk`` in any order, in two rounds where entries are many: (..., C) -> (..., n).

    Of C/F columns with F scores each, the n with the largest maxima hold the n largest scores: one outside
    would have n larger ones. CUDA's ``topk`` reads a long row five times (four digits of a radix select, and
    to collect), a maximum reads it once; both rounds then search less than a quarter of it.
    """
    fold = math.gcd(scores.shape[-1], FOLD)
    folded = scores.unflatten(-1, (fold, -1))
    size = folded.shape[-1]
    if fold == 1 or size < 8 * n:
        top, place = scores.topk(n, sorted=False)
        return top, place
    columns = folded.amax(-2).topk(n, sorted=False).indices
    among = folded.gather(-1, columns.unsqueeze(-2).expand(*columns.shape[:-1], fold, -1)).flatten(-2)
    top, at = among.topk(n, sorted=False)
    return top, at // n * size + columns.gather(-1, at % n)


def by_faiss(q_YXD: Tensor, k_YCD: Tensor, dead_Y: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
    """As `by_torch`, by one flat index a row and KV head."""
    import faiss

    tops, places = [], []
    dead = [0] * len(k_YCD) if dead_Y is None else dead_Y.tolist()
    for q_XD, k_CD, first in zip(q_YXD, k_YCD, dead, strict=True):
        index = faiss.IndexFlatIP(k_CD.shape[-1])
        index.add(k_CD[first:].contiguous().numpy())
        top, place = map(torch.from_numpy, index.search(q_XD.contiguous().numpy(), n))
        tops.append(top.masked_fill(place < 0, -torch.inf))
        places.append(torch.where(place < 0, 0, place + first))
    return torch.stack(tops), torch.stack(places)
