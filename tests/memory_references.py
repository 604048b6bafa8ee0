"""Memories in float64 with random parameters, and what the slow reference makes of what they are given."""

import torch

from infini_bench.memory import build_memory, reference, reference_retrieval
from infini_bench.schema import MemoryConfig

B, H, G, D, N = 2, 4, 2, 6, 5


def rope_table(span, size=D, theta=10000.0, dtype=torch.float64):
    angle = torch.arange(span)[:, None] * theta ** (-torch.arange(size // 2, dtype=dtype) / (size // 2))
    angle = torch.cat([angle, angle], -1)[None]
    return angle.cos(), angle.sin()


def qkv(tokens, heads=H, groups=G):
    shapes = [(B, tokens, heads, D), (B, tokens, groups, D), (B, tokens, groups, D)]
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


def make(segment=6, **kwargs):
    mem = build_memory(MemoryConfig(segment=segment, **kwargs), H, G, D).double()
    for parameter in mem.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64)
    return mem


def compressive(mem, q, k, v):
    """Outputs, M and z of the reference, with the batch in front."""
    rows = zip(q, k, v, strict=True)
    params = dict(mem.named_parameters())
    found = [reference.compressive(*row, mem.cfg, params, slow_row(mem, mem.cfg.local, *row)) for row in rows]
    return [torch.stack(x) for x in zip(*found, strict=True)]


def slow(mem, q, k, v):
    return torch.stack([slow_row(mem, mem.cfg.kind, *row) for row in zip(q, k, v, strict=True)])


def slow_row(mem, kind, q, k, v):
    cfg, n = mem.cfg, mem.segment
    if kind == "compressive":
        local = slow_row(mem, cfg.local, q, k, v)
        return reference.compressive(q, k, v, cfg, dict(mem.named_parameters()), local)[0]
    if kind == "knn":
        settings = (mem.memory_gate, mem.memory_scale, n, cfg.entries, cfg.neighbours)
        return reference.knn(q, k, v, *settings)
    if kind == "retrieval":
        return reference_retrieval.retrieval(q, k, v, n, cfg.neighbours)
    if kind == "compressed":
        conv = getattr(mem, "memory_conv", None)
        return reference.compressed(q, k, v, n, mem.slots, cfg.rate, cfg.compression, conv)[0]
    if kind == "sink":
        return reference.sink(q, k, v, n, cfg.sinks, cfg.window)
    if kind == "sparse":
        return reference.sparse(q, k, v, n, cfg.stride)
    return (
        reference.kernel(q, k, v, n) if kind == "kernel" else reference.window(q, k, v, n, kind, cfg.window)
    )


def feed(mem, q, k, v, sizes):
    """Outputs of the calls, the last state, and the sum of what they leave in ``auxiliary``."""
    state, outs, loss = None, [], 0.0
    for a, b, c in zip(*(x.split(sizes, 1) for x in (q, k, v)), strict=True):
        out, state = mem(a, b, c, rope_table(mem.span), state)
        outs.append(out)
        loss = loss + (0.0 if mem.auxiliary is None else mem.auxiliary)
    return torch.cat(outs, 1), state, loss


def compare(mem, tokens, tolerance, sizes=None):
    """Outputs and gradients of a call, and outputs of ``sizes``, against the reference."""
    q, k, v = qkv(tokens)
    fast, expected = mem(q, k, v, rope_table(mem.span))[0], slow(mem, q, k, v)
    assert (fast - expected).abs().max() < tolerance
    assert sizes is None or (feed(mem, q, k, v, sizes)[0] - expected).abs().max() < tolerance
    weight = torch.randn_like(fast)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), [q, k, v]) for x in (fast, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 20 * tolerance
