"""Memorizing Transformers' memory (arXiv 2203.08913): exact top-k attention over C stored keys and values.

In one chosen layer, on top of the Transformer-XL cache that all layers have. After every segment its raw
(pre-position) keys and values are appended, oldest first out; nothing is differentiated through the store,
so the layer learns to read, not to write. Queries and keys of the look-up are L2-normalised and scaled by a
learned positive factor a head, exp(memory_scale), 1 at the start. The look-up is mixed with the local
attention by one gate a head, g A_knn + (1 - g) A_local, g = 0.5 at the start unless ``gate_start`` differs.

The search is exact whoever does it (``memory.index``): torch on any device, by all scores at once, or faiss's
flat inner-product index on the CPU, which never holds them all. Both find the same entries, but for ties.

Shapes: B batch, S segments, N segment length, Q queries, C stored entries, P entries before and in a call,
H heads, G KV heads, R = H / G, D head size, E neighbours.
"""

from __future__ import annotations

import importlib.util
import logging

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


def searcher(index: str, device: str) -> str:
    """``torch`` or ``faiss``: who searches on this kind of device; told once in the log (if not compiled).

    Raises UserError where faiss is asked for and missing, or cannot reach the tensors.
    """
    if index == "faiss" and not FAISS:
        raise UserError("memory.index=faiss needs faiss: install faiss-cpu, or set memory.index=torch.")
    if index == "faiss" and device != "cpu":
        raise UserError(f"memory.index=faiss searches on the CPU, not on {device}; set memory.index=torch.")
    chosen = "faiss" if index != "torch" and FAISS and device == "cpu" else "torch"
    if chosen not in told and not torch.compiler.is_compiling():
        told.add(chosen)
        log.info("neighbours on %s are found by %s", device, chosen)
    return chosen


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
            reads = [self.look_up(b, s, k, v, carry) for s in range(b.q_BSQHD.shape[1])]
            read, known = (torch.stack(x, 1) for x in zip(*reads, strict=True))
            gate = torch.sigmoid(self.memory_gate.float())[:, None]
            mixed = gate * read + (1 - gate) * local.float()
            return torch.where(known[:, :, None, None, None], mixed, local.float()).to(local.dtype), state

    def look_up(
        self, b: Blocks, s: int, k_BPGD: Tensor, v_BPGD: Tensor, carry: State
    ) -> tuple[Tensor, Tensor]:
        """Top-k attention of segment ``s`` over what is stored before it (B, Q, H, D); rows with any."""
        end = carry["mem_k"].shape[1] + s * self.segment
        first = max(end - self.cfg.entries, 0)
        live = torch.as_tensor(carry["stored"], device=k_BPGD.device) + s * self.segment
        live = live.expand(k_BPGD.shape[0])
        q = F.normalize(b.q_BSQHD[:, s].float(), dim=-1).unflatten(2, (self.kv_heads, -1))
        if end == first:
            return torch.zeros_like(q).flatten(2, 3), live > 0
        keys = F.normalize(k_BPGD[:, first:end].float(), dim=-1)
        search = by_faiss if searcher(self.cfg.index, q.device.type) == "faiss" else by_torch
        top, place = search(q, keys, live.clamp(max=end - first), min(self.cfg.neighbours, end - first))
        scale = self.memory_scale.float().exp().view(1, self.kv_heads, -1, 1, 1)
        # rows without any live entry are replaced by the caller; finite scores keep their gradient finite too
        weights = torch.softmax(scale * top.clamp_min(-1e4), -1)
        values = v_BPGD[:, first:end].float().transpose(1, 2)
        index = place.flatten(2)[..., None].expand(-1, -1, -1, values.shape[-1])
        picked = values.gather(2, index).unflatten(2, place.shape[2:])
        return torch.einsum("bgrqe,bgrqed->bqgrd", weights, picked).flatten(2, 3), live > 0


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
    live = (torch.as_tensor(stored) + torch.as_tensor(full) * segment).clamp(max=most)
    end = before + full * segment
    if isinstance(end, int) and isinstance(stored, int):
        part = slice(max(end - most, 0), end)
        return {"mem_k": k_BPGD[:, part].clone(), "mem_v": v_BPGD[:, part].clone(), "stored": int(live)}
    ends = torch.as_tensor(end, device=k_BPGD.device).expand(k_BPGD.shape[0])
    size = min(int(ends.max()), most)
    index = (ends[:, None] - size + torch.arange(size, device=ends.device)).clamp_min(0)[..., None, None]
    index = index.expand(-1, -1, *k_BPGD.shape[2:])
    return {"mem_k": k_BPGD.gather(1, index), "mem_v": v_BPGD.gather(1, index), "stored": live}


def by_torch(q_BQGRD: Tensor, k_BCGD: Tensor, live_B: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest inner products among the last ``live`` keys of each row, and where: (B, G, R, Q, n).

    A row with fewer live keys has scores of -inf for the rest.
    """
    scores = torch.einsum("bqgrd,bcgd->bgrqc", q_BQGRD, k_BCGD)
    entries = k_BCGD.shape[1]
    dead = torch.arange(entries, device=k_BCGD.device) < (entries - live_B)[:, None]
    return scores.masked_fill(dead[:, None, None, None], -torch.inf).topk(n)


def by_faiss(q_BQGRD: Tensor, k_BCGD: Tensor, live_B: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """As `by_torch`, by one flat index a row and KV head; scores are computed again, for the gradient."""
    place = flat_search(q_BQGRD.detach(), k_BCGD.detach(), live_B, n)
    q, k = q_BQGRD.movedim(1, 3), k_BCGD.transpose(1, 2)  # (B, G, R, Q, D), (B, G, C, D)
    index = place.clamp_min(0).flatten(2)[..., None].expand(-1, -1, -1, k.shape[-1])
    picked = k.gather(2, index).unflatten(2, place.shape[2:])
    scores = torch.einsum("bgrqd,bgrqnd->bgrqn", q, picked)
    return scores.masked_fill(place < 0, -torch.inf), place.clamp_min(0)


@torch.compiler.disable
def flat_search(q_BQGRD: Tensor, k_BCGD: Tensor, live_B: Tensor, n: int) -> Tensor:
    """Places of the n best keys, -1 where fewer are live: (B, G, R, Q, n) int64."""
    import faiss

    q_BGRQD = q_BQGRD.movedim(1, 3)
    rows = []
    for q_GRQD, k_CGD, live in zip(q_BGRQD, k_BCGD, live_B.tolist(), strict=True):
        dead = len(k_CGD) - live
        for q_RQD, k_CD in zip(q_GRQD, k_CGD[dead:].movedim(1, 0), strict=True):
            index = faiss.IndexFlatIP(k_CD.shape[-1])
            index.add(k_CD.contiguous().numpy())
            found = torch.from_numpy(index.search(q_RQD.flatten(0, 1).contiguous().numpy(), n)[1])
            rows.append(torch.where(found < 0, found, found + dead))
    return torch.stack(rows).view(*q_BGRQD.shape[:-1], n)
