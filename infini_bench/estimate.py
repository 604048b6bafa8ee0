"""``infini-bench train --dry-run``: what a training would take, before any data, GPU or weight is touched.

Parameters and carried state are counted on the very model, without values. Memory and time are estimates, and
every assumption in them is printed. Bytes of activations and the share of the peak were fitted to recorded
trainings (compiled, bf16, 65,536 tokens a micro-batch, 12 layers of width 512): 21.0 GiB without a memory and
27.1 GiB with Infini's, 370,000 tokens a second. Wider models reach a larger share.

Letters: L layers, H heads, D head size, N segment, V vocabulary, P processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from infini_bench.decoder import LOSS_CHUNK
from infini_bench.errors import UserError
from infini_bench.models import ADDED, build_model
from infini_bench.schema import RunConfig
from infini_bench.units import counted

GIB = 2**30
FFN, WIDTH, MEMORY = 8, 18, 16  # bytes of activations a token and layer: a feed-forward unit, a width unit,
# and a width unit of a memory's arithmetic in float32
TFLOPS, UTILISATION = 989.0, 0.15  # bf16 peak of one H100 SXM, and the share of it that a training reaches
STATES = {
    "adamw": 8,
    "adafactor": 0,
}  # bytes of optimizer state a parameter; Adafactor's are tiny


@dataclass(frozen=True)
class Estimate:
    """Counts are exact, bytes and seconds are not. Per GPU, but for parameters, tokens and FLOPs."""

    parameters: int
    non_embedding: int
    added: int  # by the memory
    state_floats: int
    tokens_a_step: int
    tokens: int
    weights: float  # bytes: parameters, gradients, optimizer states
    activations: float
    states: float
    logits: float
    flops: float  # of the whole training
    seconds: float

    @property
    def memory(self) -> float:
        return self.weights + self.activations + self.states + self.logits


def estimate(cfg: RunConfig, processes: int = 1, tflops: float = TFLOPS) -> Estimate:
    """What the training of ``cfg`` takes on each of ``processes`` GPUs of ``tflops``. bf16, flash attention.

    Raises UserError for a pretrained model, whose sizes are its own, and for tasks without a length.
    """
    sequence = getattr(cfg.task, "sequence", None)
    if cfg.base.model is not None or sequence is None:
        raise UserError("--dry-run estimates language models from scratch: task=lm, without base.model.")
    d, t, n = cfg.decoder, cfg.trainer, cfg.memory.segment
    with torch.device("meta"):
        model = build_model(d, cfg.memory, cfg.data.vocab_size)
    named = {name: p.numel() for name, p in model.named_parameters()}
    total, embedding = sum(named.values()), model.model.embed_tokens.weight.numel()
    shares = processes if t.parallel == "fsdp" else 1
    call = t.batch * min(t.checkpoint_segments * n if t.checkpoint_segments else sequence, sequence)
    ffn, heads = d.ffn or 4 * d.dim, d.heads * (d.head_dim or d.dim // d.heads)
    layer = FFN * ffn + WIDTH * d.dim + (MEMORY * heads if model.has_memory else 0)
    calls = -(-t.batch * sequence // call) if t.checkpoint_segments else 0
    tokens_a_step = t.batch * t.accumulate * processes * sequence
    flops = tokens_a_step * t.steps * _flops(cfg, total - embedding, sequence)
    return Estimate(
        parameters=total,
        non_embedding=total - embedding,
        added=sum(size for name, size in named.items() if any(part in name for part in ADDED)),
        state_floats=model.state_floats(),
        tokens_a_step=tokens_a_step,
        tokens=tokens_a_step * t.steps,
        weights=total * (4 + 4 + STATES[t.optimizer]) / shares,
        activations=call * d.layers * layer,
        states=4 * t.batch * model.state_floats() * calls,
        logits=3 * 4 * min(LOSS_CHUNK, call) * cfg.data.vocab_size,
        flops=flops,
        seconds=flops / processes / (tflops * 1e12 * UTILISATION),
    )


def _flops(cfg: RunConfig, non_embedding: int, sequence: int) -> float:
    """FLOPs of training on one token: forward and backward, and forward again where it is recomputed."""
    d, n = cfg.decoder, cfg.memory.segment
    size = d.head_dim or d.dim // d.heads
    seen = sequence / 2 if cfg.memory.kind == "full" else n / 2  # keys that a token meets, on average
    attention = 4 * d.layers * d.heads * size * seen
    memory = 4 * d.layers * d.heads * size * size if cfg.memory.kind == "compressive" else 0
    forward = 2 * non_embedding + 2 * d.dim * cfg.data.vocab_size + attention + memory
    call = min((cfg.trainer.checkpoint_segments or sequence) * n, sequence)
    return forward * (4 - call / sequence)  # the last call is not recomputed


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 7200 else f"{seconds / 60:.0f} minutes"


def report(cfg: RunConfig, processes: int = 1, tflops: float = TFLOPS) -> str:
    """The estimate in words, with what it assumes."""
    e, t = estimate(cfg, processes, tflops), cfg.trainer
    rows = t.batch * t.accumulate * processes
    gpus = counted(processes, "GPU")
    parts = {"weights": e.weights, "activations": e.activations, "carried states": e.states}
    parts["logits"] = e.logits
    again = ", recomputed in the backward pass" if t.checkpoint_segments else ""
    kept = f"{t.checkpoint_segments} segment(s)" if t.checkpoint_segments else "the whole sequence"
    return "\n".join(
        [
            f"{cfg.model}, scale {cfg.scale}: {e.parameters:,} parameters, {e.non_embedding:,} without "
            f"embeddings, {e.added:,} of them the memory's; {e.state_floats:,} floats carried",
            f"a step: {t.batch} sequences x {t.accumulate} micro-batches x {gpus} = {rows} sequences of "
            f"{e.tokens_a_step // rows:,} = {e.tokens_a_step:,} tokens; {t.steps:,} steps: "
            f"{e.tokens / 1e9:.2f}G tokens",
            f"optimizer: {t.optimizer}, rate {t.lr:g}, {t.warmup} steps of warm-up, cosine to "
            f"{t.min_lr:g} of it",
            f"memory a GPU: about {e.memory / GIB:.1f} GiB ("
            + ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
            + ")",
            f"time: about {_time(e.seconds)} on {gpus}, {e.flops:.2e} FLOPs",
            f"assumed: {t.parallel} on {gpus} of {tflops:g} TFLOP/s, {100 * UTILISATION:.0f} % of them "
            f"reached; bf16 with float32 weights; activations of {kept}{again}, {FFN} bytes a feed-forward "
            f"unit, {WIDTH} a width unit and {MEMORY} more with a memory, a token and layer, as in recorded "
            "runs; neither loading nor communication nor evaluation counted",
        ]
    )
