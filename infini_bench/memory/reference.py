"""Slow float64 references: every memory as a loop over tokens, written from the equations and sharing no code
with the fast forms. Tests hold the fast forms to them in outputs, states and gradients.

Shapes: T tokens, H heads, G KV heads, D head size, N segment length. One batch row at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope(x_D: Tensor, position: int, theta: float = 10000.0) -> Tensor:
    """Rotary embedding of one vector at an absolute position, halves convention."""
    half = x_D.shape[0] // 2
    angle = position * theta ** (-torch.arange(half, dtype=x_D.dtype) / half)
    a, b = x_D[:half], x_D[half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])


def softmax_read(q_D: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over lists of vectors (Eq. 6, with sqrt(D))."""
    scores = torch.stack([q_D @ k for k in keys]) / q_D.shape[0] ** 0.5
    return torch.softmax(scores, 0) @ torch.stack(values)


def elu1(x: Tensor) -> Tensor:
    return torch.where(x >= 0, x + 1, torch.exp(torch.minimum(x, torch.zeros_like(x))))  # of slope 1 at 0


def relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.zeros_like(x))  # of slope 0 at 0; torch.maximum would have 1/2


def dpfp(x: Tensor) -> Tensor:
    signed = torch.cat([relu(x), relu(-x)])
    return torch.stack([signed[i] * signed[i - 1] for i in range(len(signed))])


SIGMA = {
    "elu1": elu1,
    "relu": relu,
    "relu2": lambda x: relu(x) ** 2,
    "exp": lambda x: torch.exp(torch.clamp(x - 4, max=16)),
    "dpfp": dpfp,
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "softmax": lambda x: torch.exp(x) / torch.exp(x).sum(),
}


class Compressed:
    """M and z of one KV head with all options of the compressive memory, one key at a time."""

    def __init__(self, cfg, size: int, like: Tensor, u: Tensor | None, decay: Tensor | None):
        self.cfg, self.u, self.decay = cfg, u, decay
        width = len(self.sigma(like.new_zeros(size)))
        self.M, self.z = like.new_zeros(width, size), like.new_zeros(width)

    def sigma(self, x_D: Tensor) -> Tensor:
        s = SIGMA[self.cfg.features](x_D)
        if self.cfg.normaliser in ("none", "norm"):
            s = s / torch.clamp((s @ s) ** 0.5, min=1e-6) if s.abs().sum() > 0 else s
        return s

    def norm(self, s: Tensor, z: Tensor) -> Tensor:
        if self.cfg.normaliser in ("none", "norm"):
            return s.new_ones(())
        if self.cfg.normaliser == "mean":
            return s.abs().sum() * z.abs().sum() / len(z)
        return s @ z if self.cfg.normaliser == "sum" else torch.clamp((s @ z).abs(), min=1)

    def read(self, q_D: Tensor) -> Tensor:
        s = self.sigma(q_D)
        norm = self.norm(s, self.z)
        read = (s @ self.M) / (norm if norm.abs() > 1e-6 else norm.new_tensor(1e-6))
        return read / ((read**2).mean() + 1e-6) ** 0.5 if self.cfg.normaliser == "norm" else read

    def write(self, k_ND: Tensor, v_ND: Tensor) -> None:
        """One segment (Eq. 8, 9): every key against the memory before the segment, or before the key."""
        if self.decay is not None:
            self.M, self.z = self.M * self.decay, self.z * self.decay
        M, z = self.M, self.z
        for k, v in zip(k_ND, v_ND, strict=True):
            s = self.sigma(k)
            old = self.M if self.cfg.update == "delta_token" else M
            strength = 1.0 if self.u is None else torch.sigmoid(self.u[:-1] @ k + self.u[-1])
            norm = self.norm(s, z)
            if self.cfg.update != "linear" and norm.abs() > 1e-6:
                v = v - (s @ old) / norm
            self.M = self.M + strength * torch.outer(s, v)
            new = s.new_ones(())
            if self.cfg.update == "delta_corrected":
                new = torch.clamp(1 - (z @ s) / torch.clamp(s @ s, min=1e-6), 0, 1).detach()
            self.z = self.z + strength * new * s


def compressive(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, cfg, params: dict, local_THD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 6-10 token by token: outputs (T, H, D), and M (G, F, D), z (G, F) after the last full segment.

    cfg: MemoryConfig. params: the memory's parameters by name, as CompressiveMemory documents them.
    local: A_dot (Eq. 6, or what ``memory.local`` puts in its place).
    """
    (tokens, heads, size), groups, n = q_THD.shape, k_TGD.shape[1], cfg.segment
    strengths = params.get("memory_write", [None] * groups)
    decays = [1 / (1 + (-x).exp()) for x in params.get("memory_decay", [])] or [None] * groups
    memory = [Compressed(cfg, size, q_THD, strengths[g], decays[g]) for g in range(groups)]
    out = []
    for t in range(tokens):
        begin = t // n * n
        row = []
        for h in range(heads):
            g = h * groups // heads
            dot = local_THD[t, h]
            beta = params["memory_gate"][h]
            if "memory_gate_input" in params:
                beta = beta + params["memory_gate_input"][h] @ q_THD[t, h]
            weight = torch.sigmoid(beta)
            row.append(dot if begin == 0 else weight * memory[g].read(q_THD[t, h]) + (1 - weight) * dot)
        out.append(torch.stack(row))
        if (t + 1) % n == 0:
            for g in range(groups):
                memory[g].write(k_TGD[begin : t + 1, g], v_TGD[begin : t + 1, g])
    return torch.stack(out), torch.stack([m.M for m in memory]), torch.stack([m.z for m in memory])


def window(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, n: int, kind: str, width: int | None = None
) -> Tensor:
    """Local attention token by token: ``block``, ``xl``, ``full``, ``sliding`` (``width`` tokens)."""
    tokens, heads, _ = q_THD.shape
    groups = k_TGD.shape[1]
    out = []
    for t in range(tokens):
        begin = t // n * n
        first = {
            "block": begin,
            "xl": max(begin - n, 0),
            "sliding": max(t + 1 - (width or 2 * n), 0),
            "full": 0,
        }[kind]
        row = []
        for h in range(heads):
            g = h * groups // heads
            k = [
                k_TGD[j, g].detach() if kind == "xl" and j < begin else k_TGD[j, g]
                for j in range(first, t + 1)
            ]
            v = [
                v_TGD[j, g].detach() if kind == "xl" and j < begin else v_TGD[j, g]
                for j in range(first, t + 1)
            ]
            keys = [rope(key, j) for j, key in zip(range(first, t + 1), k, strict=True)]
            row.append(softmax_read(rope(q_THD[t, h], t), keys, v))
        out.append(torch.stack(row))
    return torch.stack(out)


def knn(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    beta_H: Tensor,
    log_scale_H: Tensor,
    n: int,
    entries: int,
    neighbours: int,
) -> Tensor:
    """Memorizing Transformers: the ``neighbours`` best of the last ``entries`` keys of earlier segments."""
    tokens, heads, _ = q_THD.shape
    local = window(q_THD, k_TGD, v_TGD, n, "xl")
    out = []
    for t in range(tokens):
        begin = t // n * n
        row = []
        for h in range(heads):
            g = h * k_TGD.shape[1] // heads
            old = range(max(begin - entries, 0), begin)
            q = q_THD[t, h] / q_THD[t, h].norm()
            ranked = sorted(((q @ (k_TGD[j, g] / k_TGD[j, g].norm()).detach(), j) for j in old), reverse=True)
            if not ranked:
                row.append(local[t, h])
                continue
            best = ranked[:neighbours]
            weights = torch.softmax(log_scale_H[h].exp() * torch.stack([score for score, _ in best]), 0)
            read = weights @ torch.stack([v_TGD[j, g].detach() for _, j in best])
            gate = torch.sigmoid(beta_H[h])
            row.append(gate * read + (1 - gate) * local[t, h])
        out.append(torch.stack(row))
    return torch.stack(out)


def sparse(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, n: int, stride: int) -> Tensor:
    """Sparse Transformer's fixed pattern in each segment: the last ``stride`` keys, and each so-many-th."""
    out = []
    for t in range(q_THD.shape[0]):
        begin = t // n * n
        seen = [j for j in range(begin, t + 1) if t - j < stride or (j - begin + 1) % stride == 0]
        row = []
        for h in range(q_THD.shape[1]):
            g = h * k_TGD.shape[1] // q_THD.shape[1]
            keys = [rope(k_TGD[j, g], j) for j in seen]
            row.append(softmax_read(rope(q_THD[t, h], t), keys, [v_TGD[j, g] for j in seen]))
        out.append(torch.stack(row))
    return torch.stack(out)


def kernel(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, n: int) -> Tensor:
    """Linear attention inside each segment, features rotated in the numerator only (RoFormer, Eq. 19)."""
    out = []
    for t in range(q_THD.shape[0]):
        row = []
        for h in range(q_THD.shape[1]):
            g = h * k_TGD.shape[1] // q_THD.shape[1]
            q, seen = elu1(q_THD[t, h]), range(t // n * n, t + 1)
            top = torch.stack([(rope(q, t) @ rope(elu1(k_TGD[j, g]), j)) * v_TGD[j, g] for j in seen])
            norm = torch.stack([q @ elu1(k_TGD[j, g]) for j in seen])
            row.append(top.sum(0) / norm.sum())
        out.append(torch.stack(row))
    return torch.stack(out)


def sink(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, n: int, sinks: int, width: int | None = None) -> Tensor:
    """StreamingLLM: a cache of the first ``sinks`` and the last ``width`` tokens, at positions 0, 1, 2 ..."""
    width = width or 2 * n
    out = []
    for t in range(q_THD.shape[0]):
        seen = sorted({*range(min(sinks, t + 1)), *range(max(t + 1 - width, 0), t + 1)})
        row = []
        for h in range(q_THD.shape[1]):
            g = h * k_TGD.shape[1] // q_THD.shape[1]
            keys = [rope(k_TGD[j, g], place) for place, j in enumerate(seen)]
            row.append(softmax_read(rope(q_THD[t, h], len(seen) - 1), keys, [v_TGD[j, g] for j in seen]))
        out.append(torch.stack(row))
    return torch.stack(out)


def compressed(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    n: int,
    slots: int,
    rate: int,
    compression: str,
    conv: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compressive Transformer. conv: (2, rate, G, D, D), of keys and values.

    Outputs (T, H, D), the live slots' keys and values (slots, G, D) after the last full segment, and the
    reconstruction loss, summed over tokens.
    """
    tokens, heads, size = q_THD.shape
    groups = k_TGD.shape[1]

    def compress(x_TGD: Tensor, begin: int, which: int) -> list[Tensor]:
        """Slots of the segment that begins at ``begin``, each (G, D)."""
        made = []
        for first in range(begin, begin + n, rate):
            part = x_TGD[first : first + rate].detach()
            if compression == "conv" and conv is not None:
                row = [[part[i, g] @ conv[which, i, g] for i in range(rate)] for g in range(groups)]
                made.append(torch.stack([torch.stack(terms).sum(0) for terms in row]))
            else:
                made.append(part.mean(0) if compression == "mean" else part.max(0).values)
        return made

    def live(x_TGD: Tensor, border: int, which: int) -> list[Tensor]:
        """Slots at a border: all segments but the one before it, which is in the cache."""
        made = [slot for begin in range(0, border - n, n) for slot in compress(x_TGD, begin, which)]
        return [slot.detach() for slot in made[-slots:]]

    out, loss = [], q_THD.new_zeros(())
    for t in range(tokens):
        begin = t // n * n
        old = range(max(begin - n, 0), begin)
        slot_k, slot_v = live(k_TGD, begin, 0), live(v_TGD, begin, 1)
        new_k, new_v = (compress(x, begin - n, i) if begin else [] for i, x in enumerate((k_TGD, v_TGD)))
        row = []
        for h in range(heads):
            g = h * groups // heads
            raw = [x[g] for x in slot_k] + [k_TGD[j, g].detach() for j in old]
            raw += [k_TGD[j, g] for j in range(begin, t + 1)]
            values = [x[g] for x in slot_v] + [v_TGD[j, g].detach() for j in old]
            values += [v_TGD[j, g] for j in range(begin, t + 1)]
            keys = [rope(x, place) for place, x in enumerate(raw)]
            row.append(softmax_read(rope(q_THD[t, h], len(raw) - 1), keys, values))
            if begin:
                q, kept = q_THD[t, h].detach(), [x[j, g].detach() for x in (k_TGD, v_TGD) for j in old]
                exact = softmax_read(q, kept[:n], kept[n:])
                short = softmax_read(q, [x[g] for x in new_k], [x[g] for x in new_v])
                loss = loss + ((short - exact) ** 2).sum() / (heads * size)
        out.append(torch.stack(row))
    last = [live(x, tokens // n * n, i) for i, x in enumerate((k_TGD, v_TGD))]
    end_k, end_v = (torch.stack(x) if x else k_TGD[:0] for x in last)
    return torch.stack(out), end_k, end_v, loss
