"""Infini-attention's compressive memory (arXiv 2404.07143 v2, Eq. 7-10): Linear and Linear+Delta.

Per KV head, segment s, features sigma, with raw (pre-position) queries and keys:
    read     A_mem = sigma(Q) M_{s-1} / (sigma(Q) z_{s-1})                                          (Eq. 7)
    Linear   M_s = M_{s-1} + sigma(K)^T V                z_s = z_{s-1} + sum_t sigma(K_t)           (Eq. 8)
    Delta    M_s = M_{s-1} + sigma(K)^T (V - sigma(K) M_{s-1} / (sigma(K) z_{s-1})),  z_s as above  (Eq. 9)
    gate     A = g A_mem + (1 - g) A_dot,  g = sigmoid(beta), one beta a head                       (Eq. 10)
Beyond the paper, ``delta_corrected`` lets z grow only by what is new about a key: gamma_t sigma(K_t), where
gamma_t = clip(1 - z_{s-1} sigma(K_t) / |sigma(K_t)|^2, 0, 1) is not differentiated (ARMT, arXiv 2407.04841).
Plain Delta writes less for a known pair but lets z grow all the same: repeated, it reads back halved.
What the paper leaves open is decided here: the first segment has no memory, so its output is A_dot itself and
Eq. 9 reads 0 there; under GQA there is one memory a KV head, read by all its query heads.

M and z of a layer depend on that layer's keys and values only, so all segments of a call run at once: Linear
is a prefix sum; Delta is the affine recurrence M_s = (I - A_s) M_{s-1} + U_s, whose U_s = sigma(K)^T V and
A_s = sigma(K)^T (sigma(K) / (sigma(K) z_{s-1})) need no earlier M. Gradients flow through all segments, or
through ``gradient_depth`` of them. All memory arithmetic is float32, outside autocast.

Shapes: B batch, S segments, N segment length, Q queries, H heads, G KV heads, R = H / G, D head size,
F features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from infini_bench.memory.base import Memory, Rope, State
from infini_bench.memory.blocks import Blocks, Count, select
from infini_bench.memory.features import FEATURES
from infini_bench.memory.kernels.backend import choose
from infini_bench.schema import MemoryConfig

EPS = 1e-6  # floor of the normaliser, where hardly any written key shares a feature with the query


class CompressiveMemory(Memory):
    """Linear (Eq. 8) or Linear+Delta (Eq. 9) memory with the paper's gate (Eq. 10).

    State: M (B, G, D, D) and z (B, G, D), float32: dk (dv + 1) G floats a layer (Table 1, last row).
    ``memory_gate``: beta, (H,) float32.
    """

    def __init__(self, cfg: MemoryConfig, heads: int, kv_heads: int, head_dim: int):
        super().__init__(cfg, heads, kv_heads, head_dim)
        self.sigma = FEATURES[cfg.features]
        self.memory_gate = nn.Parameter(self.gate_start())

    def reset_parameters(self) -> None:
        self.memory_gate.copy_(self.gate_start())

    def gate_start(self) -> Tensor:
        """beta before training: ``gate_start``, plus or minus the split for every second head."""
        sign = torch.arange(self.heads) % 2 * 2.0 - 1.0
        return self.cfg.gate_start + self.cfg.gate_split * sign

    def state_floats(self) -> int:
        return self.head_dim * (self.head_dim + 1) * self.kv_heads

    def start(self, k_BTGD: Tensor) -> State:
        batch, _, groups, size = k_BTGD.shape
        M = torch.zeros(batch, groups, size, size, dtype=torch.float32, device=k_BTGD.device)
        return {"M": M, "z": M[..., 0].clone()}

    def segments(self, b: Blocks, carry: State, rope: Rope) -> tuple[Tensor, State]:
        dot = self.local(b, rope)
        if choose(self.cfg, b):
            return self.fused(b, dot, carry)
        with torch.autocast(b.q_BSQHD.device.type, enabled=False):
            prefixes = self.write(b, carry)
            if (isinstance(b.done, int) and b.done == 0 and b.q_BSQHD.shape[1] == 1) or not self.enabled:
                return dot, self.carried(prefixes, b.full)
            read = self.read(b.q_BSQHD.float(), prefixes)
            gate = torch.sigmoid(self.memory_gate.float())[:, None]
            mixed = gate * read + (1 - gate) * dot.float()
            known = (b.ages() > 0)[..., None, None, None]
            out = torch.where(known, mixed, dot.float()).to(dot.dtype)
        return out, self.carried(prefixes, b.full)

    def fused(self, b: Blocks, dot: Tensor, carry: State) -> tuple[Tensor, State]:
        """``segments`` through the Triton kernels."""
        from infini_bench.memory.kernels import ops  # imports triton

        assert isinstance(b.full, int) and isinstance(b.done, int)
        how = self.cfg.update, self.cfg.features
        M, z = ops.write(b.k_BSKGD, b.v_BSKGD, carry["M"], carry["z"], b.full, *how)
        if self.enabled and b.done + b.q_BSQHD.shape[1] > 1:
            gate = torch.sigmoid(self.memory_gate.float())
            dot = ops.read(b.q_BSQHD, dot, gate, M, z, b.done, self.cfg.features)
        return dot, self.carried({"M": M, "z": z}, b.full)

    @staticmethod
    def carried(prefixes: dict[str, Tensor], full: Count) -> State:
        """M and z after the last completed segment, cloned so that they do not keep the prefixes alive."""
        return {name: select(x, full).clone() for name, x in prefixes.items()}

    def read(self, q_BSQHD: Tensor, prefixes: dict[str, Tensor]) -> Tensor:
        """A_mem of every segment from the memory before it (Eq. 7): (B, S, Q, H, D) float32."""
        n_seg = q_BSQHD.shape[1]
        q = self.sigma(q_BSQHD).unflatten(3, (self.kv_heads, -1))  # (B, S, Q, G, R, F)
        top = torch.einsum("bsqgrf,bsgfd->bsqgrd", q, prefixes["M"][:, :n_seg])
        norm = torch.einsum("bsqgrf,bsgf->bsqgr", q, prefixes["z"][:, :n_seg])
        return (top / norm.clamp_min(EPS)[..., None]).flatten(3, 4)

    def write(self, b: Blocks, carry: State) -> dict[str, Tensor]:
        """M and z before each segment and after the last one: (B, S+1, G, ...) float32.

        Only segments that some row completes are written. Where rows differ, what a shorter row's unfinished
        segment adds lies behind the boundary selected for it.
        """
        written = b.full if isinstance(b.full, int) else b.k_BSKGD.shape[1]
        k = self.sigma(b.k_BSKGD[:, :written].float())
        v = b.v_BSKGD[:, :written].float()
        first_M, first_z = carry["M"], carry["z"]
        z = self.norms(first_z, k, b.done)
        add = torch.einsum("bsngf,bsngd->bsgfd", k, v)
        if self.cfg.update == "linear":
            return {"M": self.sums(first_M, add, b.done), "z": z}
        take = self.overlap(k, z[:, :-1])
        M = self.scan(first_M, written, lambda s, M: add[:, s] - take[:, s] @ M, b.done)
        return {"M": M, "z": z}

    def norms(self, z: Tensor, k_BSNGF: Tensor, done: Count) -> Tensor:
        """z before each segment and after the last, (B, S+1, G, F): Eq. 8, or corrected for known keys."""
        if self.cfg.update != "delta_corrected":
            return self.sums(z, k_BSNGF.sum(2), done)

        def grow(s: int, z: Tensor) -> Tensor:
            k = k_BSNGF[:, s]
            known = torch.einsum("bngf,bgf->bng", k, z) / k.square().sum(-1).clamp_min(EPS)
            return torch.einsum("bng,bngf->bgf", (1 - known).clamp(0, 1).detach(), k)

        return self.scan(z, k_BSNGF.shape[1], grow, done)

    def overlap(self, k_BSNGF: Tensor, z_BSGF: Tensor) -> Tensor:
        """A_s of the affine form, what the segment's keys take back of the old memory: (B, S, G, F, F)."""
        norm = torch.einsum("bsngf,bsgf->bsng", k_BSNGF, z_BSGF)
        scale = torch.where(norm > EPS, norm, 1.0).reciprocal() * (norm > EPS)
        return torch.einsum("bsngf,bsnge->bsgfe", k_BSNGF, k_BSNGF * scale[..., None])

    def sums(self, x: Tensor, add_BS: Tensor, done: Count) -> Tensor:
        """x_s = x_{s-1} + add_s: before each segment and after the last one, (B, S+1, ...)."""
        if self.cfg.gradient_depth is None:
            return torch.cat([x[:, None], add_BS], 1).cumsum(1)
        return self.scan(x, add_BS.shape[1], lambda s, _: add_BS[:, s], done)

    def scan(self, x: Tensor, segments: int, grow: Callable[[int, Tensor], Tensor], done: Count) -> Tensor:
        """x_s = x_{s-1} + grow(s, x_{s-1}), likewise; gradients stop where ``gradient_depth`` says."""
        depth, chain = self.cfg.gradient_depth, []
        if depth is not None and not isinstance(done, int) and torch.is_grad_enabled():
            raise ValueError(
                "gradient_depth counts segments of the document: train without padding or row resets"
            )
        for s in range(segments + 1):
            if depth is not None and isinstance(done, int) and (done + s) % depth == 0:
                x = x.detach()
            chain.append(x)
            if s < segments:
                x = x + grow(s, x)
        return torch.stack(chain, 1)
