"""`Efficiency` of one attention layer's memory, given projections: (B, T) tokens, H heads of D, G KV heads.

The floor is local attention alone: one causal call of torch's scaled_dot_product_attention over all segments,
with the fastest backend of the machine at that shape, named in ``extra["backend"]``; so is full attention.
Queries and keys of the local part are position-embedded beforehand, for the floor and for the memory alike:
what is compared is the memory. Forms (``condition``): ``eager``; ``compiled``, the same through
torch.compile; ``triton``, the fused kernels. ``train`` is forward and backward, for the gradients of all
projections and gates. With ``task.vs`` the nearest operator of flash-linear-attention is one more row, named
as it is, and takes turns with every form (`efficiency_fla`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from infini_bench.errors import UserError
from infini_bench.memory import CompressiveMemory, Memory, build_memory
from infini_bench.memory.base import attend
from infini_bench.progress import Handle
from infini_bench.timing import Times, Work, attempt

from . import efficiency_fla as fla
from .base import Row
from .footprint import head_size

BACKENDS = {  # the names that rows have
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
SCANNED = 64  # segments: the delta rules are a Python loop over them, and a longer one compiles for minutes
Layer = Callable[..., Tensor]
Found = dict[str, tuple[Times | str, str]]  # mode -> times, or why there are none; the backend


class Embedded(Memory):
    """Local attention of queries and keys that have their positions already, as those of the floor."""

    pair: tuple[Tensor, Tensor]  # (B, S, N, H, D), (B, S, N, G, D)

    def start(self, k_BTGD: Tensor) -> dict[str, Any]:
        return {}

    def state_floats(self) -> int:
        return 0

    def segments(self, blocks: Any, carry: Any, rope: Any) -> tuple[Tensor, dict[str, Any]]:
        return attend(*self.pair, blocks.v_BSKGD, None, True), {}


def build_layer(cfg: Any, backend: str = "eager") -> CompressiveMemory:
    """Raises UserError for a model without a compressive memory beside plain local attention."""
    body = cfg.decoder
    sizes = body.heads, body.kv_heads or body.heads, head_size(cfg)
    memory = build_memory(replace(cfg.memory, backend=backend), *sizes)
    if not isinstance(memory, CompressiveMemory) or cfg.memory.local != "block":
        raise UserError(
            f"profile --level operator times compressive memories beside local=block; model={cfg.model} has "
            "none; use --level model."
        )
    memory.path = Embedded(cfg.memory, *sizes)
    return memory


def measure(task: Any, model: CompressiveMemory, bar: Handle) -> list[Row]:
    """All rows; ``model`` tells the sizes, and every form is a layer of its own."""
    rows: list[Row] = []
    for tokens in task.lengths:
        if tokens % model.segment:
            whole = f"{tokens} tokens are no multiple of memory.segment={model.segment}"
            raise UserError(f"--level operator times whole segments; {whole}.")
        rows += Shape(task, model, tokens).rows()
        bar.advance(1)
    return rows


class Shape:
    """One length: its tensors, the references, the forms."""

    def __init__(self, task: Any, model: CompressiveMemory, tokens: int):
        self.task, self.cfg, self.tokens, self.segment = task, task.cfg, tokens, model.segment
        self.memory = model
        heads, groups = model.heads, model.kv_heads

        def draw(count: int) -> Tensor:
            size = (task.task.batch, tokens, count, model.head_dim)
            return torch.randn(size, device=task.device).to(task.dtype).requires_grad_()

        self.q, self.k, self.v, self.far_q, self.far_k = map(draw, (heads, groups, groups, heads, groups))
        self.grad = torch.randn_like(self.q)
        batch, size = task.task.batch, model.head_dim
        attention = 2 * batch * tokens * heads * size  # times the keys that a query sees: half of them, twice
        once = 2 * batch * tokens * model.width * size
        writes = groups if model.cfg.update == "linear" else 2 * groups
        moved = batch * tokens * size * self.q.element_size()
        forward, both = moved * (2 * heads + 2 * groups), moved * (5 * heads + 6 * groups)
        flops = {"local": attention * model.segment, "full": attention * tokens}
        flops["memory"] = once * (heads + writes)
        flops["own"] = flops["local"] + flops["memory"]
        self.work = {
            name: {"forward": Work(n, forward), "train": Work(3 * n, both)} for name, n in flops.items()
        }

    def rows(self) -> list[Row]:
        cuda = self.task.device.type == "cuda"
        names = [*BACKENDS] if cuda else ["flash", "math"]
        local = self.fastest("local", self.local, names)
        # a score matrix of the whole length is nobody's full attention
        full = self.fastest("full", self.full, [n for n in names if n != "math"])
        rows = self.told("local", local, "local") + self.told("full", full, "full")
        nearest = self.nearest() if self.task.task.vs else None
        rows += self.told(nearest[0].name, nearest[2], "memory") if nearest else []
        for form in self.task.task.forms:
            pairs = self.form(form, local, self.local, (self.q, self.k, self.v))
            found: Found = {}
            for mode, pair in pairs.items():
                found[mode] = pair if isinstance(pair, str) else pair[0], local[mode][1]
            rows += self.told(form, found, "own")
            columns = {"length": self.tokens, "condition": form}
            for mode, pair in pairs.items():
                rows += self.task.ratio(f"ratio_to_local_{mode}", pair, **columns)
            far = paired(full["forward"][0], found["forward"][0])
            rows += self.task.ratio("ratio_to_full_forward", far, **columns)
            if nearest:
                rows += self.beside(form, local, *nearest)
        return rows

    def nearest(self) -> tuple[fla.Operator, tuple[Tensor, ...], Found]:
        """flash-linear-attention's operator, what it is given, its times alone."""
        operator, given = fla.Operator(self.memory), fla.inputs(self.memory, self.q, self.k, self.v)
        found: Found = {}
        for mode in self.work["memory"]:
            call = self.call(mode, operator, given, "math")  # which is nothing to it
            times = survived(partial(self.task.watch.measure, call))
            found[mode] = times if isinstance(times, str) else times[0], fla.NAME
        return operator, given, found

    def beside(
        self, form: str, local: Found, operator: fla.Operator, given: tuple[Tensor, ...], alone: Found
    ) -> list[Row]:
        """Ratios of the operator's time to a form's, in turns."""
        rows: list[Row] = []
        runs = {mode: pair for mode, pair in local.items() if not isinstance(alone[mode][0], str)}
        pairs = {mode: times for mode, (times, _) in alone.items() if isinstance(times, str)}
        for mode, pair in (pairs | self.form(form, runs, operator, given)).items():
            metric = f"ratio_to_peer_{'inference' if mode == 'forward' else mode}"
            columns = {"length": self.tokens, "condition": form, "extra": {"peer": operator.name}}
            rows += self.task.ratio(metric, pair if isinstance(pair, str) else pair[::-1], **columns)
        return rows

    def told(self, form: str, found: Found, work: str) -> list[Row]:
        rows = []
        for what, (times, backend) in found.items():
            columns = {"length": self.tokens, "condition": form, "extra": {"backend": backend}}
            rows += self.task.timed(what, times, self.tokens, self.work[work][what], **columns)
        return rows

    # --- what is timed --------------------------------------------------------------------------------

    def fastest(self, what: str, layer: Layer, names: list[str]) -> Found:
        """forward, train -> (times, backend) of the quickest that can run; else the last one's reason."""
        best: Found = {}
        for mode, work in self.work[what].items():
            least = self.task.best.bound_ms(work) / 1e3
            if least > self.task.watch.seconds:
                best[mode] = f"it takes at least {least:.0f} s, more than {self.task.watch.seconds:g} s", ""
                continue
            found = [(self.tried(mode, layer, (self.q, self.k, self.v), name), name) for name in names]
            best[mode] = min(found, key=lambda pair: quickness(pair[0]))
        return best

    def tried(self, mode: str, layer: Layer, inputs: tuple[Tensor, ...], backend: str) -> Times | str:
        """Times, or the reason why a backend does not run at this shape."""
        try:
            return self.timed(mode, layer, inputs, backend)
        except RuntimeError as error:
            return f"{backend}: {str(error).splitlines()[0]}"

    def timed(self, mode: str, layer: Layer, inputs: tuple[Tensor, ...], backend: str) -> Times | str:
        call = self.call(mode, layer, inputs, backend)
        found = attempt(lambda: self.task.watch.measure(call))
        return found if isinstance(found, str) else found[0]

    def call(self, mode: str, layer: Layer, inputs: tuple[Tensor, ...], backend: str) -> Callable[[], None]:
        def forward() -> None:
            with torch.no_grad(), sdpa_kernel(BACKENDS[backend]):
                layer(*inputs)

        def both() -> None:
            with torch.enable_grad(), sdpa_kernel(BACKENDS[backend]):
                out = layer(*inputs)
                torch.autograd.grad(out, self.leaves(layer, inputs), self.grad)

        return forward if mode == "forward" else both

    @staticmethod
    def leaves(layer: Layer, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        memory = layer.args[0] if isinstance(layer, partial) else None
        return [*inputs, *(memory.parameters() if memory is not None and len(inputs) > 3 else [])]

    def form(
        self, form: str, local: Found, other: Layer, given: tuple[Tensor, ...]
    ) -> dict[str, list[Times] | str]:
        """The memory in one form, its local part through the floor's backends, and the other, in turns."""
        scanned = self.tokens // self.segment if self.cfg.memory.update != "linear" else 0
        if form == "compiled" and scanned > SCANNED:
            why = f"a scan of more than {SCANNED} segments compiles for minutes"
            return {"forward": why, "train": why}
        memory = build_layer(self.cfg, "triton" if form == "triton" else "eager").to(self.task.device)
        layer: Layer = partial(run, memory)
        if form == "compiled":
            torch.compiler.reset()
            layer = partial(torch.compile(run, dynamic=False), memory)
        found: dict[str, list[Times] | str] = {}
        for mode, (times, backend) in local.items():
            if isinstance(times, str):
                found[mode] = times
                continue
            own = self.call(mode, layer, (self.q, self.k, self.v, self.far_q, self.far_k), backend)
            beside = self.call(mode, other, given, backend)
            found[mode] = survived(partial(self.task.watch.measure, own, beside))
        return found

    def local(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(1, (-1, self.segment)) for x in (q, k, v))
        return attend(q, k, v, None, True).flatten(1, 2)

    def full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[2] != k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups).transpose(1, 2)


def survived(work: Callable[[], list[Times]]) -> list[Times] | str:
    """What ``work`` gives, or why it fails: what the other forms take is worth having all the same."""
    try:
        return attempt(work)
    except UserError as error:  # the kernels cannot run on this machine or at this shape
        return str(error)
    except Exception as error:  # a compiler's
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def quickness(found: Times | str) -> float:
    return math.inf if isinstance(found, str) else found.median


def paired(top: Times | str, bottom: Times | str) -> list[Times] | str:
    """Both, or why one is missing."""
    if isinstance(top, str) or isinstance(bottom, str):
        return top if isinstance(top, str) else str(bottom)
    return [top, bottom]


def run(memory: CompressiveMemory, *x: Tensor) -> Tensor:
    """Outputs (B, T, H, D) of a document: raw queries, keys and values, and embedded queries and keys."""
    q, k, v, far_q, far_k = x
    memory.path.pair = tuple(y.unflatten(1, (-1, memory.segment)) for y in (far_q, far_k))  # type: ignore
    return memory(q, k, v, (q, q))[0]  # a rotary table is not asked for
