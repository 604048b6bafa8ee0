"""`Efficiency` of whole models: the forward pass over a document, a training step, decoding, against length.

* ``forward``: a document is read in calls of ``task.chunk`` tokens with the state carried, and the logits of
  its last token are computed; warm-up: the first two calls.
* ``train``: loss and gradients of all its tokens in one call (in calls of ``trainer.checkpoint_segments``
  segments, recomputed, if that is set), and the optimizer's update; float32 weights, under autocast.
* ``decode``: ``task.decode`` steps of one token after the document was read; tokens of a call: 1.

With ``task.against`` the same model with ``local`` attention only, or ``full`` attention, is timed in the same
run; with ``task.vs`` installed peers (`efficiency_peers`). ``trainer.compile`` compiles the model's layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from infini_bench.models import build_model
from infini_bench.progress import Handle
from infini_bench.timing import Ladder, Times, Work

from .base import Row, aligned

REFERENCES = {"local": "block", "full": "full"}  # task.against -> memory.kind
Found = dict[str, dict[int, Times | str]]  # mode -> length -> times, or why there are none


def measure(task: Any, model: Any, bar: Handle) -> list[Row]:
    own = Subject(task, model)
    found = own.climb(bar)
    rows = own.rows(found)
    model.to("cpu")  # so that the peak memory of what follows is its own
    for name in task.task.against:
        kind = REFERENCES[name]
        if kind != task.cfg.memory.kind:
            rows += against(task, name, replace(task.cfg.memory, kind=kind), found)
    if task.task.vs:
        from .efficiency_peers import measure_peers

        rows += measure_peers(task, model, found)
    return rows


def against(task: Any, name: str, memory: Any, found: Found) -> list[Row]:
    """Ratios to the same body with another memory: this over local, full over this."""
    other = build_model(task.cfg.decoder, memory, task.cfg.data.vocab_size).to(task.device)
    modes = [mode for mode in found if mode != "decode" and (name, mode) != ("full", "train")]
    theirs = Subject(task, other, modes).climb()
    rows = []
    for mode in modes:
        for tokens in task.lengths:
            pair = found[mode][tokens], theirs[mode][tokens]
            top, bottom = pair if name == "local" else pair[::-1]
            rows += task.ratio(f"ratio_to_{name}_{mode}", top, bottom, length=tokens)
    return rows


@dataclass
class Subject:
    """One model on the device, and what is asked of it."""

    task: Any
    model: Any
    modes: list[str] = field(default_factory=list)
    every: bool = False  # logits of all tokens, not of the last alone

    def __post_init__(self) -> None:
        self.modes = self.modes or self.task.task.modes
        self.state: dict[int, int] = {}  # length -> bytes carried at its end
        self.compiled = False

    def climb(self, bar: Handle | None = None) -> Found:
        """Times at all lengths: training first, in float32, then the rest with the weights lowered."""
        found: Found = {mode: {} for mode in self.modes}
        if "train" in found:
            self.model.train()
            self.compile()
            ladder, step = Ladder(self.task.watch), self.training()
            for tokens in self.task.lengths:
                found["train"][tokens] = ladder.climb(tokens, lambda n=tokens: step(n))  # type: ignore[misc]
            self.model.zero_grad(set_to_none=True)
            del step
        self.model.eval()
        lower(self.model, self.task.dtype)
        self.compile()
        if set(found) & {"forward", "decode"}:
            ladder = Ladder(self.task.watch)
            for tokens in self.task.lengths:
                self.inference(tokens, ladder, found)
                if bar is not None:
                    bar.advance(1)
        return found

    def compile(self) -> None:
        if self.task.cfg.trainer.compile and not self.compiled:
            torch.compiler.reset()
            self.model.compile_layers()
            self.compiled = True

    def inference(self, tokens: int, ladder: Ladder, found: Found) -> None:
        """forward and decode at one length."""
        held: list[Any] = []
        calls = sizes(tokens, aligned(self.task.task.chunk, self.model.segment, self.task.task.batch))

        def read(parts: list[int]) -> None:
            held[:] = [None]
            for number, size in enumerate(parts):
                keep = "all" if self.every else "last" if number == len(parts) - 1 else "none"
                held[:] = [self.model.step(self.ids(size), held[0], keep=keep)[1]]

        with torch.no_grad():
            times = ladder.climb(tokens, lambda: read(calls), lambda: read(calls[:2]))
            if "forward" in found:
                found["forward"][tokens] = times
            if not isinstance(times, str):
                self.state[tokens] = held[0].bytes()
            if "decode" in found:
                found["decode"][tokens] = times if isinstance(times, str) else self.decode(held)

    def decode(self, held: list[Any]) -> Times:
        """Steps of one token from the state in ``held`` on, which goes on with them."""
        token = self.ids(1)

        def step() -> None:
            held[:] = [self.model.step(token, held[0], keep="last")[1]]

        return replace(self.task.watch, repeats=self.task.task.decode).measure(step)

    def training(self) -> Callable[[int], None]:
        """One update on a document of so many tokens."""
        from infini_bench.train.loss import SequenceLoss
        from infini_bench.train.optim import build_optimizer

        loss = SequenceLoss(self.model, self.task.cfg.trainer.checkpoint_segments)
        optimizer = build_optimizer(self.model, self.task.cfg.trainer)

        def step(tokens: int) -> None:
            ids = self.ids(tokens + 1)
            weights = torch.full((len(ids), tokens), 1 / ids[:, 1:].numel(), device=ids.device)
            with torch.enable_grad(), self.autocast():
                value = loss(ids, weights, weights)[0]
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def autocast(self) -> Any:
        low = self.task.dtype != torch.float32
        return torch.autocast(self.task.device.type, self.task.dtype) if low else nullcontext()

    def ids(self, tokens: int) -> Tensor:
        """Random tokens (B, T), drawn where they are needed."""
        size = (self.task.task.batch, tokens)
        return torch.randint(self.task.cfg.data.vocab_size, size, device=self.task.device)

    # --- rows -----------------------------------------------------------------------------------------

    def rows(self, found: Found, **columns: Any) -> list[Row]:
        rows = []
        for mode, by_length in found.items():
            for tokens, times in by_length.items():
                each = 1 if mode == "decode" else tokens
                work = self.work(mode, tokens)
                rows += self.task.timed(mode, times, each, work, length=tokens, **columns)
        carried = self.state.items()
        return rows + [self.task.row("state_bytes", n, length=tokens, **columns) for tokens, n in carried]

    def work(self, mode: str, tokens: int) -> Work:
        """What a call must compute at least; bytes: every weight once a call, and the carried state."""
        cfg, batch = self.task.cfg, self.task.task.batch
        head = self.model.lm_head.weight
        inner = sum(p.numel() for n, p in self.model.named_parameters() if p.dim() == 2 and "embed" not in n)
        inner -= 0 if cfg.decoder.tie_embeddings else head.numel()
        new, asked = (1, 1) if mode == "decode" else (tokens, tokens if mode == "train" else 1)
        flops = 2.0 * batch * (new * inner + asked * head.numel())
        flops += batch * cfg.decoder.layers * sum(self.attention(mode, tokens))
        size = 4 if mode == "train" else self.task.dtype.itemsize
        calls = 1 if mode != "forward" else len(sizes(tokens, aligned(self.task.task.chunk, self.model.segment)))
        moved = size * (calls * inner + head.numel())
        if mode == "decode":
            moved += self.state.get(tokens, 0)
        return Work(3 * flops, 3.0 * moved) if mode == "train" else Work(flops, moved)

    def attention(self, mode: str, tokens: int) -> Iterator[float]:
        """Operations of one row and layer: what is seen of the segment or document, and the memory."""
        memory, body = self.task.cfg.memory, self.task.cfg.decoder
        size = body.head_dim or body.dim // body.heads
        new, span = (1 if mode == "decode" else tokens), min(tokens, memory.segment)
        span = tokens if memory.kind == "full" else span
        seen = span if mode != "decode" else (2 * tokens if memory.kind == "full" else 0)
        yield 2.0 * new * seen * body.heads * size
        if memory.kind == "compressive":
            groups = body.kv_heads or body.heads
            writes = 0 if mode == "decode" else groups * (1 if memory.update == "linear" else 2)
            yield 2.0 * new * size * size * (body.heads + writes)


def sizes(tokens: int, chunk: int) -> list[int]:
    """Tokens of each call."""
    whole, rest = divmod(tokens, chunk)
    return [*chain([chunk] * whole, [rest] * bool(rest))]


def lower(model: Any, dtype: torch.dtype) -> None:
    """Weights as `from_pretrained(dtype=...)` leaves them: those of a memory stay float32."""
    for name, parameter in model.named_parameters():
        if ".memory." not in name:
            parameter.data = parameter.data.to(dtype)
