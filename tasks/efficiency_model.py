"""`Efficiency` of whole models: the forward pass over a document, a training step, decoding, against length.

* ``forward``: a document is read in calls of ``task.chunk`` tokens with the state carried, and the logits of
  its last token are computed; warm-up: the first two calls.
* ``train``: loss and gradients of all its tokens in one call (in calls of ``trainer.checkpoint_segments``
  segments, recomputed, if that is set), and the optimizer's update; float32 weights, under autocast.
* ``decode``: ``task.decode`` steps of one token after the document was read; tokens of a call: 1; warm-up:
  the steps up to the one from which a GPU launches each as one graph (`decoding`). After whole segments, as
  round lengths are, no step completes one: the step in ``memory.segment`` that writes is not timed.

With ``task.against`` the same model with ``local`` attention only, or ``full`` attention, takes turns with it
in the same run, by the kernel of torch's attention that torch picks, named in ``extra["attention"]``; with
``task.vs`` installed peers do (`efficiency_peers`). ``trainer.compile`` is heeded. On a CPU the model goes
through a call in pieces of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from infini_bench.decoding import WARM, decoding
from infini_bench.models import build_model
from infini_bench.progress import Handle
from infini_bench.timing import Ladder, Times, Work, attempt

from .base import Row, aligned

REFERENCES = {"local": "block", "full": "full"}  # task.against -> memory.kind
Found = dict[str, dict[int, Times | str]]  # mode -> length -> times, or why there are none
Calls = tuple[Callable[[], None], Callable[[], None]]  # what is timed, and its warm-up


def measure(task: Any, model: Any, bar: Handle) -> list[Row]:
    own = Subject(task, model)
    rows = own.rows(own.climb(bar))
    for name in task.task.against:
        kind = REFERENCES[name]
        if kind != task.cfg.memory.kind:
            memory = replace(task.cfg.memory, kind=kind)
            other = build_model(task.cfg.decoder, memory, task.cfg.data.vocab_size).to(task.device)
            modes = [mode for mode in own.modes if mode != "decode" and (name, mode) != ("full", "train")]
            rival = Subject(task, other)
            extra = {"attention": rival.kernels()}
            for mode, tokens, pair in in_turns(own, rival, modes):
                found = pair if name == "local" or isinstance(pair, str) else pair[::-1]
                rows += task.ratio(f"ratio_to_{name}_{mode}", found, length=tokens, extra=extra)
    if task.task.vs:
        from .efficiency_peers import measure_peers

        rows += measure_peers(own)
    return rows


def in_turns(own: Subject, other: Subject, modes: list[str]) -> Iterator[tuple[str, int, list[Times] | str]]:
    """(mode, length, times of the first and of the second, or why there are none)."""
    for mode in modes:
        ladder = Ladder(own.task.watch)
        own.prepare(mode)
        other.prepare(mode)
        for tokens in own.task.lengths:
            pairs = [own.calls(mode, tokens), other.calls(mode, tokens)]
            yield mode, tokens, ladder.climb(tokens, *(p[0] for p in pairs), warm=[p[1] for p in pairs])


class Kernels(TorchDispatchMode):
    """Inside, which of torch's attention kernels run: ``flash``, ``efficient``, ``cudnn``."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = re.fullmatch(r"aten::_scaled_dot_product_(\w+?)_attention(_for_cpu)?", func.name())
        self.names |= {found[1]} if found else set()
        return func(*args, **(kwargs or {}))


class Subject:
    """One model on the device, and what is asked of it. every: logits of all tokens, not only the last."""

    def __init__(self, task: Any, model: Any, every: bool = False):
        self.task, self.model, self.every = task, model, every
        self.modes: list[str] = task.task.modes
        self.state: Any = None  # after the last document that was read
        self.carried: dict[int, int] = {}  # length -> bytes of it
        self.compiled = False
        self.step: Callable[[int], None] | None = None

    def climb(self, bar: Handle | None = None) -> Found:
        """Times at all lengths; training first, whose optimizer is gone before the rest."""
        found: Found = {mode: {} for mode in self.modes}
        for mode in ("train", "forward"):
            if mode in found or (mode == "forward" and "decode" in found):
                self.prepare(mode)
                ladder = Ladder(self.task.watch)
                for tokens in self.task.lengths:
                    call, warm = self.calls(mode, tokens)
                    times = ladder.climb(tokens, call, warm=[warm])
                    found.setdefault(mode, {})[tokens] = times if isinstance(times, str) else times[0]
                    if mode == "forward":
                        self.after(tokens, times, found)
                        if bar is not None:
                            bar.advance(1)
        return {mode: found[mode] for mode in self.modes}

    def after(self, tokens: int, times: list[Times] | str, found: Found) -> None:
        """What a document leaves: the state, from which decoding goes on."""
        if not isinstance(times, str):
            self.carried[tokens] = self.state.bytes()
        if "decode" in found:
            found["decode"][tokens] = times if isinstance(times, str) else self.decode()
        self.state = None

    def prepare(self, mode: str) -> None:
        """Training has float32 weights, under autocast; else they are as low as projections are."""
        if self.task.cfg.trainer.compile and not self.compiled:
            torch.compiler.reset()
            self.model.compile_layers()
            self.compiled = True
        self.step = self.state = None
        self.model.zero_grad(set_to_none=True)
        self.model.take_auxiliary()  # of a step that ran out of memory: it holds the step's graph
        lower(self.model, torch.float32 if mode == "train" else self.task.dtype)
        self.model.train(mode == "train")
        if mode == "train":
            self.step = self.training()

    def calls(self, mode: str, tokens: int) -> Calls:
        if mode == "train":
            step = self.step
            assert step is not None
            return (lambda: step(tokens),) * 2
        parts = self.parts(tokens)
        return lambda: self.read(parts), lambda: self.read(parts[:2])

    def parts(self, tokens: int) -> list[int]:
        """Tokens of each call that reads a document."""
        task = self.task.task
        return sizes(tokens, aligned(task.chunk, self.task.cfg.memory.segment, task.batch))

    @torch.no_grad()
    def read(self, parts: list[int]) -> None:
        """A document in calls of so many tokens."""
        self.state = None
        for number, size in enumerate(parts):
            keep = "all" if self.every else "last" if number == len(parts) - 1 else "none"
            self.state = self.model.step(self.ids(size), self.state, keep=keep)[1]

    def kernels(self) -> str:
        """By which of its kernels torch computes attention where a document begins; ``math``: by none."""
        self.prepare("forward")
        with torch.compiler.set_stance("force_eager"), Kernels() as seen:
            self.read(self.parts(self.task.lengths[0])[:2])
        self.state = None
        return " and ".join(sorted(seen.names)) or "math"

    def decode(self) -> Times | str:
        """Steps of one token from the state on, which goes on with them; first those before a graph's."""
        token, steps = self.ids(1), decoding(self.model, self.state)
        watch = replace(self.task.watch, repeats=self.task.task.decode)

        def step() -> None:
            steps.step(token)

        found = attempt(lambda: watch.measure(step, warm=[step] * (WARM + 1)))
        return found if isinstance(found, str) else found[0]

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

    def rows(self, found: Found) -> list[Row]:
        rows: list[Row] = []
        for mode, by_length in found.items():
            for tokens, times in by_length.items():
                each = 1 if mode == "decode" else tokens
                work = self.work(mode, tokens)
                rows += self.task.timed(mode, times, each, work, length=tokens)
        carried = self.carried.items()
        return rows + [self.task.row("state_bytes", n, length=tokens) for tokens, n in carried]

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
        calls = len(self.parts(tokens)) if mode == "forward" else 1
        moved = size * (calls * inner + head.numel())
        if mode == "decode":
            moved += self.carried.get(tokens, 0)
        return Work(3 * flops, 3.0 * moved) if mode == "train" else Work(flops, moved)

    def attention(self, mode: str, tokens: int) -> Iterator[float]:
        """Operations of one row and layer: what is seen of the segment or document, and the memory."""
        memory, body = self.task.cfg.memory, self.task.cfg.decoder
        size = body.head_dim or body.dim // body.heads
        new, span = (1 if mode == "decode" else tokens), min(tokens, memory.segment)
        span = tokens if memory.kind == "full" else span
        seen = span if mode != "decode" else (2 * tokens if memory.kind == "full" else 0)
        yield 2.0 * new * seen * body.heads * size
        if memory.kind == "retrieval":  # scores of all older keys
            yield (2.0 if mode == "decode" else 1.0) * new * tokens * body.heads * size
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
