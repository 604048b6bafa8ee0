"""Infini-attention's compressive memory (arXiv 2404.07143 v2, Eq. 7-10): Linear, Linear+Delta, and variants.

Per KV head, segment s, features sigma, with raw (pre-position) queries and keys:
    read     A_mem = sigma(Q) M_{s-1} / (sigma(Q) z_{s-1})                                          (Eq. 7)
    Linear   M_s = M_{s-1} + sigma(K)^T V                z_s = z_{s-1} + sum_t sigma(K_t)           (Eq. 8)
    Delta    M_s = M_{s-1} + sigma(K)^T (V - sigma(K) M_{s-1} / (sigma(K) z_{s-1})),  z_s as above  (Eq. 9)
    gate     A = g A_mem + (1 - g) A_dot,  g = sigmoid(beta), one beta a head                       (Eq. 10)
What the paper leaves open is decided here: the first segment has no memory, so its output is A_dot itself and
Eq. 9 reads 0 there; under GQA there is one memory a KV head, read by all its query heads.

Beyond the paper:
    delta_corrected  z grows only by what is new about a key: gamma_t sigma(K_t), gamma_t =
                     clip(1 - z_{s-1} sigma(K_t) / |sigma(K_t)|^2, 0, 1), not differentiated (ARMT, arXiv
                     2407.04841). Plain Delta writes less for a known pair but lets z grow all the same:
                     repeated, it reads back halved.
    delta_token      DeltaNet's rule (arXiv 2406.06484) on unit-norm features, key by key also inside the
                     segment: M <- M + w_t k_t^T (v_t - k_t M). A pair repeated in a segment is written once.
    normaliser       what sigma(Q) M is divided by. sum: Eq. 7. mean: the overlap that an average key would
                     have, |sigma(q)|_1 |z|_1 / F. max: max(|sigma(q) z|, 1) (xLSTM, arXiv 2405.04517). none:
                     1, with unit-norm features and no z. norm: as none, then RMS norm over D (RetNet, arXiv
                     2307.08621). Delta subtracts what its own normaliser reads.
    decay            M and z are scaled by sigmoid(logit) of their KV head before a segment is written.
    write_gate       a key is written with strength w_t = sigmoid(u k_t + c), u and c of its KV head; else 1.
                     c starts at 2, strength 0.88, or where write_start and write_split say.
    write_cost       training adds write_cost w_t (mean over KV heads and tokens, summed over layers) to the
                     loss, so that keys that nobody asks for are best left out: they fill M all the same.
    write_floor      outside training w_t below it is 0. Many keys of the least strength fill M, too: what the
                     delta rules come to does not depend on w, only when. With floor_trained in training as
                     well, where a key below it then has no gradient, so that nothing is learned from writes
                     that are not made when the model is asked.
    gate_input       beta becomes beta + u q_t, u of its head.

M and z of a layer depend on that layer's keys and values only, so all segments of a call run at once: Linear
is a prefix sum; the delta rules are affine recurrences M_s = (I - A_s) M_{s-1} + U_s whose A_s and U_s need
no earlier M. Gradients flow through all segments, or inside blocks of ``gradient_depth`` of them. All memory
arithmetic is float32, outside autocast.

Shapes: B batch, S segments, N segment length, Q queries, H heads, G KV heads, R = H / G, D head size,
F features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infini_bench.memory.base import Memory, Rope, State
from infini_bench.memory.blocks import Blocks, Count, select
from infini_bench.memory.features import FEATURES, WIDTHS
from infini_bench.memory.kernels.backend import choose, unsupported
from infini_bench.memory.local import local_path
from infini_bench.schema import MemoryConfig

EPS = 1e-6  # floor of the normaliser, where hardly any written key shares a feature with the query
CHUNK = 64  # keys whose triangular system delta_token solves at once


class CompressiveMemory(Memory):
    """Linear (Eq. 8) or Linear+Delta (Eq. 9) memory with the paper's gate (Eq. 10), or a variant of them.

    State, float32: M (B, G, F, D) and, if the normaliser has one, z (B, G, F): dk (dv + 1) G floats a layer
    (Table 1, last row); and what the path ``memory.local`` keeps: nothing if it is ``block``, the paper's.
    Parameters, float32: ``memory_gate`` beta (H,); ``memory_gate_input`` (H, D); ``memory_write`` (G, D + 1),
    u and c; ``memory_decay`` (G,), the logit of lambda.
    """

    written: Tensor | None = None  # mean w_t of the last call for which `write_cost` was asked

    def __init__(self, cfg: MemoryConfig, heads: int, kv_heads: int, head_dim: int):
        super().__init__(cfg, heads, kv_heads, head_dim)
        self.normalised = cfg.normaliser not in ("none", "norm")
        self.sigma, self.unsupported = FEATURES[cfg.features], unsupported(cfg)
        self.path = local_path(cfg, heads, kv_heads, head_dim)  # A_dot, and what it keeps of earlier segments
        self.previous, self.steady = self.path.previous, self.path.steady
        if cfg.gradient_depth is None and self.path.settled is not None:
            self.settled = max(1, self.path.settled)
        self.width = WIDTHS.get(cfg.features, 1) * head_dim
        self.memory_gate = nn.Parameter(torch.empty(heads), requires_grad=cfg.gate_frozen is None)
        if cfg.gate_input:
            self.memory_gate_input = nn.Parameter(torch.empty(heads, head_dim))
        if cfg.write_gate:
            self.memory_write = nn.Parameter(torch.empty(kv_heads, head_dim + 1))
        if cfg.decay is not None:
            self.memory_decay = nn.Parameter(torch.empty(kv_heads))
        with torch.no_grad():
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gates at their start, nothing yet dependent on keys or queries."""
        sign = torch.arange(self.heads, device=self.memory_gate.device) % 2 * 2.0 - 1.0
        write = self.cfg.write_start + self.cfg.write_split * sign[: self.kv_heads]
        self.memory_gate.copy_(self.cfg.gate_start + self.cfg.gate_split * sign)
        if self.cfg.gate_frozen is not None:
            self.memory_gate.fill_(self.cfg.gate_frozen).logit_()  # 0 and 1 are infinite, and exact
        if self.cfg.gate_input:
            self.memory_gate_input.zero_()
        if self.cfg.write_gate:
            self.memory_write.zero_()[:, -1] = write
        if self.cfg.decay is not None:
            self.memory_decay.fill_(self.cfg.decay).logit_()

    def state_floats(self) -> int:
        return self.width * (self.head_dim + self.normalised) * self.kv_heads + self.path.state_floats()

    def start(self, k_BTGD: Tensor) -> State:
        batch, _, groups, size = k_BTGD.shape
        M = torch.zeros(batch, groups, self.width, size, dtype=torch.float32, device=k_BTGD.device)
        own = {"M": M, "z": M[..., 0].clone()} if self.normalised else {"M": M}
        return {**own, **self.path.start(k_BTGD)}

    def penalise(self, k_BTGD: Tensor, mask_BT: Tensor | None) -> None:
        self.auxiliary = None
        if self.cfg.write_cost and self.training and torch.is_grad_enabled():
            with torch.autocast(k_BTGD.device.type, enabled=False):
                w_BT = self.strength(k_BTGD.float()).mean((-2, -1))
            w_BT = w_BT if mask_BT is None else w_BT * mask_BT
            self.auxiliary, self.written = self.cfg.write_cost * w_BT.sum(), w_BT.detach().mean()

    def segments(self, b: Blocks, carry: State, rope: Rope) -> tuple[Tensor, State]:
        dot, past = self.path.segments(b, carry, rope)
        if b.tokens > 1:  # for one, launches cost more than what they compute
            self.form = form = choose(self.cfg, b, self.unsupported)
            if form == "triton":
                out, own = self.fused(b, dot, carry)
                return out, {**past, **own}
        with torch.autocast(b.q_BSQHD.device.type, enabled=False):
            prefixes = self.write(b, carry)
            if (isinstance(b.done, int) and b.done == 0 and b.q_BSQHD.shape[1] == 1) or not self.enabled:
                return dot, {**past, **self.carried(prefixes, b.full)}
            q = b.q_BSQHD.float()
            read, gate = self.read(q, prefixes), self.gate(q)
            if self.cfg.gate_input and not self.training:
                self.gate_values = gate  # of the last call, for whoever wants to see what opens it
            if not isinstance(b.done, int) or b.done == 0:  # a first segment has nothing to read
                gate = gate * (b.ages() > 0)[..., None, None, None]
            out = torch.lerp(dot.float(), read, gate).to(dot.dtype)
        return out, {**past, **self.carried(prefixes, b.full)}

    def fused(self, b: Blocks, dot: Tensor, carry: State) -> tuple[Tensor, State]:
        """``segments`` through the Triton kernels."""
        from infini_bench.memory.kernels import ops  # imports triton

        assert isinstance(b.full, int) and isinstance(b.done, int)
        how = self.cfg.update, self.cfg.features, self.memory_write.float() if self.cfg.write_gate else None
        z, k = carry["z"] if self.normalised else carry["M"][..., :0, 0], b.k_BSKGD
        if self.floored:
            k = k * (self.strength(k.float()) > 0)  # a key of zeros has no ReLU^2 feature: nothing is written
        M, z = ops.write(k, b.v_BSKGD, carry["M"], z, b.full, *how)
        if self.enabled and b.done + b.q_BSQHD.shape[1] > 1:
            gate = torch.sigmoid(self.memory_gate.float())
            dot = ops.read(b.q_BSQHD, dot, gate, M, z, b.done, self.cfg.features)
        return dot, self.carried({"M": M, "z": z} if self.normalised else {"M": M}, b.full)

    @staticmethod
    def carried(prefixes: dict[str, Tensor], full: Count) -> State:
        """M and z after the last completed segment, cloned so that they do not keep other prefixes alive."""
        return {name: select(x, full).clone() if x.shape[1] > 1 else x[:, 0] for name, x in prefixes.items()}

    # Read ----------------------------------------------------------------------------------------------

    def gate(self, q_BSQHD: Tensor) -> Tensor:
        """g of Eq. 10: (H, 1), or (B, S, Q, H, 1) with ``gate_input``."""
        beta = self.memory_gate.float()
        if self.cfg.gate_input:
            beta = beta + (q_BSQHD * self.memory_gate_input.float()).sum(-1)
        return torch.sigmoid(beta)[..., None]

    def features(self, x: Tensor) -> Tensor:
        """sigma(x): (..., D) -> (..., F), of unit norm where no z normalises."""
        return self.sigma(x) if self.normalised else F.normalize(self.sigma(x), dim=-1, eps=EPS)

    def read(self, q_BSQHD: Tensor, prefixes: dict[str, Tensor]) -> Tensor:
        """A_mem of every segment from the memory before it (Eq. 7): (B, S, Q, H, D) float32."""
        n_seg = q_BSQHD.shape[1]
        q = self.features(q_BSQHD).unflatten(3, (self.kv_heads, -1))  # (B, S, Q, G, R, F)
        top = torch.einsum("bsqgrf,bsgfd->bsqgrd", q, prefixes["M"][:, :n_seg])
        if self.normalised:
            norm = self.overlap(q, prefixes["z"][:, :n_seg])
            top = top / torch.where(norm < 0, norm.clamp_max(-EPS), norm.clamp_min(EPS))[..., None]
        elif self.cfg.normaliser == "norm":
            top = F.rms_norm(top, top.shape[-1:], eps=EPS)
        return top.flatten(3, 4)

    def overlap(self, x_BSNGRF: Tensor, z_BSGF: Tensor) -> Tensor:
        """What a read with features x is divided by, given z: (B, S, N, G, R)."""
        if self.cfg.normaliser == "mean":
            return x_BSNGRF.abs().sum(-1) * (z_BSGF.abs().mean(-1))[:, :, None, :, None]
        product = torch.einsum("bsngrf,bsgf->bsngr", x_BSNGRF, z_BSGF)
        return product if self.cfg.normaliser == "sum" else product.abs().clamp_min(1)

    # Write ---------------------------------------------------------------------------------------------

    def write(self, b: Blocks, carry: State) -> dict[str, Tensor]:
        """M and z before each segment and after the last one: (B, S+1, G, ...) float32.

        Only segments that some row completes are written. Where rows differ, what a shorter row's unfinished
        segment adds lies behind the boundary selected for it.
        """
        if isinstance(b.full, int) and not b.full:  # as in every step of decoding but one a segment
            own = (name for name in ("M", "z") if name in carry)
            return {name: self.scan(carry[name], (), lambda x: x, b.done) for name in own}
        written = b.full if isinstance(b.full, int) else b.k_BSKGD.shape[1]
        raw, v = (x[:, :written].float() for x in (b.k_BSKGD, b.v_BSKGD))
        k = self.features(raw)
        if self.cfg.update == "delta_token":
            take, add = self.one_by_one(k, v, self.strength(raw))
            return {"M": self.affine(carry["M"], take, add, b.done)}
        w = k * self.strength(raw) if self.cfg.write_gate else k
        add = torch.einsum("bsngf,bsngd->bsgfd", w, v)
        z = {"z": self.norms(carry["z"], k, w, b.done)} if self.normalised else {}
        if self.cfg.update == "linear":
            return {"M": self.sums(carry["M"], add, b.done), **z}
        norm = self.overlap(k[..., None, :], self.kept(z["z"][:, :-1], 1))
        scale = torch.where(norm.abs() > EPS, norm, 1.0).reciprocal() * (norm.abs() > EPS)
        take = torch.einsum("bsngf,bsnge->bsgfe", w, k * scale)
        return {"M": self.affine(carry["M"], take, add, b.done), **z}

    def strength(self, k: Tensor) -> Tensor:
        """w_t, how much of each raw key (..., G, D) is written: (..., G, 1), or 1."""
        if not self.cfg.write_gate:
            return k.new_ones(())
        u, c = self.memory_write.float().split([self.head_dim, 1], -1)
        w = torch.sigmoid((k * u).sum(-1, keepdim=True) + c)
        return w * (w >= self.cfg.write_floor) if self.floored else w

    @property
    def floored(self) -> bool:
        """Whether keys below ``write_floor`` are left out of this call."""
        return self.cfg.write_floor > 0 and (self.cfg.floor_trained or not self.training)

    def kept(self, x: Tensor, axes: int) -> Tensor:
        """What decay leaves of M or z at a boundary; ``axes`` of x stand behind G."""
        if self.cfg.decay is None:
            return x
        return x * torch.sigmoid(self.memory_decay.float()).view(-1, *[1] * axes)

    def one_by_one(self, k_BSNGF: Tensor, v_BSNGD: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
        """A_s (B, S, G, F, F) and U_s (B, S, G, F, D) of a whole segment written key by key.

        Inside a chunk C of the segment, the errors e_t = w_t (v_t - k_t M_{t-1}) solve the triangular system
        (I + tril(w K K^T, -1)) E = w (V - K M), the WY form of arXiv 2406.06484, section 3.2; the chunks'
        maps M -> (I - A_c) M + U_c follow one another.
        """
        size = k_BSNGF.shape[2]
        chunk = next(n for n in range(min(CHUNK, size), 0, -1) if size % n == 0)
        k, v = (x.unflatten(2, (-1, chunk)).movedim(2, 0).transpose(3, 4) for x in (k_BSNGF, v_BSNGD))
        w = strength.unflatten(2, (-1, chunk)).movedim(2, 0).transpose(3, 4) if strength.dim() else strength
        system = torch.tril(w * k @ k.mT, -1) + torch.eye(chunk, device=k.device)
        solved = torch.linalg.solve_triangular(
            system, w * torch.cat([k, v], -1), upper=False, unitriangular=True
        )
        # [P | U] of M -> P M + U, P from the identity: both change as M does but for what is added
        width = k.shape[-1]
        whole = F.pad(torch.eye(width, device=k.device), (0, v.shape[-1])).expand(*k.shape[1:4], -1, -1)
        for take_add in (k.mT @ solved).unbind(0):
            take, add = take_add.split([width, v.shape[-1]], -1)
            whole = whole - take @ whole + F.pad(add, (width, 0))
        kept, add = whole.split([width, v.shape[-1]], -1)
        return torch.eye(width, device=k.device) - kept, add

    def affine(self, M: Tensor, take_BSGFF: Tensor, add_BSGFD: Tensor, done: Count) -> Tensor:
        """M_s = (I - A_s) M_{s-1} + U_s, M_{s-1} decayed first: (B, S+1, G, F, D)."""

        def step(M: Tensor, take: Tensor, add: Tensor) -> Tensor:
            M = self.kept(M, 2)
            return M + add - take @ M

        return self.scan(M, (take_BSGFF, add_BSGFD), step, done)

    def norms(self, z: Tensor, k_BSNGF: Tensor, w_BSNGF: Tensor, done: Count) -> Tensor:
        """z before each segment and after the last, (B, S+1, G, F): Eq. 8, or corrected for known keys."""
        if self.cfg.update != "delta_corrected":
            return self.sums(z, w_BSNGF.sum(2), done)

        def step(z: Tensor, k: Tensor, w: Tensor) -> Tensor:
            z = self.kept(z, 1)
            known = torch.einsum("bngf,bgf->bng", k, z) / k.square().sum(-1).clamp_min(EPS)
            return z + torch.einsum("bng,bngf->bgf", (1 - known).clamp(0, 1).detach(), w)

        return self.scan(z, (k_BSNGF, w_BSNGF), step, done)

    def sums(self, x: Tensor, add_BS: Tensor, done: Count) -> Tensor:
        """x_s = x_{s-1} + add_s, x_{s-1} decayed first: before each segment and after the last one."""
        if self.cfg.gradient_depth is None and self.cfg.decay is None:
            return torch.cat([x[:, None], add_BS], 1).cumsum(1)
        return self.scan(x, (add_BS,), lambda x, add: self.kept(x, x.dim() - 2) + add, done)

    def scan(
        self, x: Tensor, parts_BS: tuple[Tensor, ...], step: Callable[..., Tensor], done: Count
    ) -> Tensor:
        """x_s = step(x_{s-1}, *parts_s), likewise; gradients stop where ``gradient_depth`` says."""
        depth, chain = self.cfg.gradient_depth, []
        if depth is not None and not isinstance(done, int) and torch.is_grad_enabled():
            raise ValueError(
                "gradient_depth counts segments of the document: train without padding or row resets"
            )
        # unbound at once: a select a segment would fill a gradient of all segments with zeros every time
        each = list(zip(*(part.unbind(1) for part in parts_BS), strict=True))
        for s in range(len(each) + 1):
            if depth is not None and isinstance(done, int) and (done + s) % depth == 0:
                x = x.detach()
            chain.append(x)
            if s < len(each):
                x = step(x, *each[s])
        return torch.stack(chain, 1) if each else x[:, None]
