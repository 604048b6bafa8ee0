"""The one decoder of every memory: Hugging Face's Llama, whose attention layers carry the memory's state.

Registered with the Auto classes, so that ``from_pretrained`` and ``generate`` work once ``infini_bench`` is
imported (`infini_bench.registry`).

Shapes: B batch, T tokens, V vocabulary, L layers, H heads, G KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from infini_bench import outside
from infini_bench.cache import MemoryCache
from infini_bench.errors import UserError
from infini_bench.layer import MemoryDecoderLayer, rms_norm
from infini_bench.memory import Memory, build_tokens
from infini_bench.memory.base import Rope, State
from infini_bench.memory.tokens import TokenMemory, ZeroLinear
from infini_bench.recurrent import AssociativeLayer, SegmentRun
from infini_bench.registry import MODEL_TYPE
from infini_bench.schema import MemoryConfig

IMPLEMENTATION = "infini_bench"
LOSS_CHUNK = 8192  # tokens whose logits exist at once in ``losses``
CPU_TOKENS = 2048  # of all rows, that a CPU reads at once: more leave its caches, and take time and memory


def padding_only(*_: Any, q_length: int, attention_mask: Tensor | None = None, **__: Any) -> Tensor | None:
    """The mask that a memory layer wants: (B, T) bool where padding is, else None. Never (T, T)."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask[:, -q_length:].bool()


def nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target: (T, V), (T,) -> (T,) float32.

    Compiled, it makes no float32 copies of the logits, which a large vocabulary moves for longer than it
    multiplies.
    """
    return F.cross_entropy(logits.float(), targets, reduction="none")


def no_kernel(*_: Any, **__: Any) -> Any:
    raise RuntimeError("memory layers compute their own attention")


# An implementation name of our own: Llama then builds no T x T mask, and padding still arrives.
AttentionMaskInterface.register(IMPLEMENTATION, padding_only)
AttentionInterface.register(IMPLEMENTATION, no_kernel)


class MemoryLlamaConfig(LlamaConfig):
    """LlamaConfig plus ``memory``, the fields of ``MemoryConfig``.

    qkv_bias: queries, keys and values have biases, the output has none (Qwen2). memory_code: `digest` of a
    memory in a file of the user's; unset, of the file as it is now. Raises UserError if it is another's.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        memory: dict[str, Any] | None = None,
        qkv_bias: bool = False,
        memory_code: str | None = None,
        **kwargs: Any,
    ):
        self.memory = asdict(MemoryConfig(**(memory or {})))
        self.qkv_bias = qkv_bias
        kind = self.memory["kind"]
        outside.check_same(kind, memory_code)
        self.memory_code = memory_code or (outside.digest(kind) if outside.is_outside(kind) else None)
        super().__init__(**{**kwargs, "attn_implementation": IMPLEMENTATION})


class SegmentRotary(nn.Module):
    """Rotary table of positions 0 .. span-1, whatever ``position_ids`` say: memories count for themselves.

    span None: of all positions up to the largest asked for. No parameters; any ``rope_type`` works, and none
    ever sees a length above the span.
    """

    def __init__(self, inner: nn.Module, span: int | None):
        super().__init__()
        self.inner, self.span = inner, span

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        span = self.span if self.span is not None else int(position_ids.max()) + 1
        return self.inner(x, torch.arange(span, device=x.device)[None])


class MemoryLlamaPreTrained(LlamaPreTrainedModel):
    """What both classes share; a separate base because inner models dispatch their own ``_init_weights``."""

    config_class = MemoryLlamaConfig
    config: MemoryLlamaConfig
    _keep_in_fp32_modules_strict = ["memory"]  # noqa: RUF012 (transformers reads a list)
    _is_stateful = True  # states cannot be cropped, so assisted decoding is refused
    _can_compile_fullgraph = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Memory | ZeroLinear):
            module.reset_parameters()


class MemoryLlamaModel(MemoryLlamaPreTrained, LlamaModel):
    """LlamaModel with memory layers, or with one memory (``recurrence``) that runs it by segments."""

    def __init__(self, config: MemoryLlamaConfig):
        config._attn_implementation = IMPLEMENTATION
        super().__init__(config)
        memory, depth = MemoryConfig(**config.memory), config.num_hidden_layers
        kind = AssociativeLayer if memory.kind == "armt" else MemoryDecoderLayer
        layers = [kind(config, index) for index in range(depth)]
        self.layers = nn.ModuleList(layers)
        self.norm = rms_norm(config)
        spans = [layer.self_attn.memory.span for layer in layers]
        longest = None if None in spans else max(span for span in spans if span is not None)
        self.rotary_emb = SegmentRotary(self.rotary_emb, longest)  # type: ignore[assignment]
        self.recurrence = build_tokens(memory, config.hidden_size, depth)
        self.post_init()

    def forward(self, *args: Any, past_key_values: MemoryCache | None = None, **kwargs: Any):
        """As LlamaModel.forward; ``use_cache`` without a cache starts an empty MemoryCache.

        Raises ValueError for ids that are not (B, T) with T at least 1, or a state of another batch size.
        """
        ids = args[0] if args else kwargs.get("input_ids")
        fed = kwargs.get("inputs_embeds") if ids is None else ids
        if ids is not None and ids.dim() != 2:
            raise ValueError(f"token ids have the shape (batch, tokens), not {tuple(ids.shape)}")
        if ids is not None and ids.shape[1] == 0:
            raise ValueError("a call needs at least one token; begin an empty prompt with one of your own")
        rows = None if past_key_values is None else past_key_values.batch
        if fed is not None and rows not in (None, len(fed)):
            raise ValueError(f"the state is of {rows} rows, the tokens are of {len(fed)}: feed as many")
        wanted = kwargs.get("use_cache")
        if past_key_values is None and (self.config.use_cache if wanted is None else wanted):
            past_key_values = MemoryCache.empty(len(self.layers))
        if self.recurrence is not None:
            return self.by_segments(self.recurrence, past_key_values, *args, **kwargs)
        return super().forward(*args, past_key_values=past_key_values, **kwargs)

    def by_segments(
        self,
        memory: TokenMemory,
        cache: MemoryCache | None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *_: Any,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The forward pass under ``recurrence``; positions are the segment's own, whatever is given.

        Raises UserError for what a run in rounds cannot give: each layer's outputs, and checkpointed layers.
        """
        wanted = [name for name in ("output_hidden_states", "output_attentions") if kwargs.get(name)]
        if wanted or (self.gradient_checkpointing and self.training):
            what = wanted[0] if wanted else "gradient_checkpointing; use trainer.checkpoint_segments"
            raise UserError(f"A model that runs segment by segment has no {what}.")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask = padding_only(q_length=x.shape[1], attention_mask=attention_mask)
        state = MemoryCache.empty(len(self.layers)) if cache is None else cache
        out = SegmentRun(self, memory, state)(x, mask)
        return BaseModelOutputWithPast(last_hidden_state=out, past_key_values=cache)

    def round(
        self,
        x_BKD: Tensor,
        rope: Rope,
        beside: State,
        writes: int,
        mask_BK: Tensor | None = None,
        cache: MemoryCache | None = None,
    ) -> tuple[Tensor, State]:
        """All layers over one round of a `SegmentRun`: last hidden states (B, K, dim), and what they wrote.

        beside, writes: see `TokenMemory`; mask_BK: bool, False = no token, None = all are.
        """
        assert self.recurrence is not None
        mask = padding_only(q_length=x_BKD.shape[1], attention_mask=mask_BK)
        x_BKD, written = self.recurrence.run(self.layers, x_BKD, beside, writes, mask, rope, cache)
        return self.norm(x_BKD), written

    def whole(self, x_BKD: Tensor, rope: Rope, beside: State, writes: int) -> tuple[Tensor, State]:
        """``round`` of a whole segment in training, with a name of its own to be compiled by: a function of
        tensors alone."""
        return self.round(x_BKD, rope, beside, writes)


class MemoryLlamaForCausalLM(MemoryLlamaPreTrained, LlamaForCausalLM):
    """LlamaForCausalLM with memory layers, and the calls that training and streaming use."""

    def __init__(self, config: MemoryLlamaConfig):
        config._attn_implementation = IMPLEMENTATION
        super().__init__(config)
        self.model = MemoryLlamaModel(config)
        self.nats = nats
        self.post_init()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ):
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            if generation_config.cache_implementation is not None:
                raise ValueError("cache_implementation cannot be chosen: the memory's state is the cache")
            model_kwargs["past_key_values"] = MemoryCache.empty(len(self.model.layers))

    def compile_layers(self) -> None:
        """torch.compile the layers' ``body``, once for all of them, and the loss; in place.

        Of a model that runs segment by segment all layers of a whole one are a graph besides: what a call of
        each costs in Python would be paid in every segment. Shapes stay static: a number of segments compiles
        in seconds, a scan of dynamic length in minutes.
        Raises UserError for a model whose segments all differ in length.
        """
        if self.config.memory["kind"] == "autocompressor":
            raise UserError(
                "trainer.compile=true cannot be: an AutoCompressor's segments grow with each one."
            )
        torch._dynamo.config.recompile_limit = 64
        body = torch.compile(MemoryDecoderLayer.body, dynamic=False)
        for layer in self.model.layers:
            layer.body = MethodType(body, layer)
        whole = torch.compile(MemoryLlamaModel.whole, dynamic=False)
        self.model.whole = MethodType(whole, self.model)
        self.nats = torch.compile(nats)
        self.compile_steps()

    def compile_steps(self) -> None:
        """torch.compile the layers' ``inside``, once for all of them, for `decoding`; in place."""
        inside = torch.compile(MemoryDecoderLayer.inside, dynamic=False)
        for layer in self.model.layers:
            layer.inside = MethodType(inside, layer)

    @property
    def memories(self) -> list[Any]:
        """The ``Memory`` of every layer, or the one ``TokenMemory`` of the whole model."""
        if self.segmentwise:
            return [self.model.recurrence]
        return [layer.self_attn.memory for layer in self.model.layers]

    @property
    def segmentwise(self) -> bool:
        """Whether segments run one after the other, as each needs the last one's result."""
        return self.model.recurrence is not None

    @property
    def steady(self) -> bool:
        """Whether a step of one token inside a segment can have shapes that never change (`decoding`)."""
        return not self.segmentwise and all(memory.steady for memory in self.memories)

    @property
    def segment(self) -> int:
        """N, tokens."""
        return self.memories[0].segment

    @property
    def has_memory(self) -> bool:
        """Whether anything crosses a segment boundary that could be switched off."""
        return any(memory.has_memory for memory in self.memories)

    def state_floats(self, batch: int = 1) -> int:
        """Floats that cross a segment boundary, all layers (Table 1, with H replaced by G).

        Of ``full``, ``retrieval`` and ``autocompressor``, whose states grow: floats that each segment adds.
        """
        return batch * sum(memory.state_floats() for memory in self.memories)

    def gates(self) -> Tensor | None:
        """sigmoid(beta) of every gated layer's heads, (layers, H) on the CPU; None without gates.

        With ``gate_input`` it is the gate of a query of zeros.
        """
        gates = [memory.memory_gate for memory in self.memories if hasattr(memory, "memory_gate")]
        if not gates:
            return None
        values = torch.stack(gates).detach().float()
        return torch.sigmoid(values.full_tensor() if hasattr(values, "full_tensor") else values).cpu()

    @contextmanager
    def memory_off(self) -> Iterator[None]:
        """Inside, nothing from before a token's own segment is used: the control of every evaluation.

        A model that runs segment by segment obeys from the next segment's start on.
        """
        memories = [m for m in self.modules() if isinstance(m, Memory | TokenMemory)]  # local paths too
        for memory in memories:
            memory.enabled = False
        try:
            yield
        finally:
            for memory in memories:
                memory.enabled = True

    def take_auxiliary(self) -> Tensor:
        """What memories add to the training loss for the last call: float32, summed over layers and tokens.

        0 without such memories and outside training mode. It is handed out once, so that no graph is kept.
        """
        total = torch.zeros((), device=self.device)
        for memory in self.memories:
            if memory.auxiliary is not None:
                total, memory.auxiliary = total + memory.auxiliary, None
        return total

    def hidden(
        self, ids: Tensor, state: MemoryCache | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, MemoryCache]:
        """Last hidden states (B, T, dim) and the state after; the given state is left as it was.

        mask: (B, T) bool, False = padding, at the left; None = no padding. Without gradients a CPU goes
        through a long call in ``pieces``.
        """
        cache = MemoryCache.empty(len(self.model.layers)) if state is None else state.copy()
        if mask is not None:  # Hugging Face's covers what was read before, too
            mask = F.pad(mask, (cache.get_seq_length(), 0), value=True)
        looped = ids.device.type == "cpu" and mask is None and not torch.is_grad_enabled()
        found = [
            self.model(input_ids=part, attention_mask=mask, past_key_values=cache, use_cache=True)[0]
            for part in (self.pieces(ids, cache) if looped else [ids])
        ]
        return found[0] if len(found) == 1 else torch.cat(found, 1), cache

    def pieces(self, ids: Tensor, cache: MemoryCache) -> Sequence[Tensor]:
        """``ids`` (B, T) cut at segment borders, in about ``CPU_TOKENS`` each.

        Whole where there are no segments: by ``full`` attention, whose first call alone needs no mask, or
        where the model goes through them by itself.
        """
        if self.segmentwise or any(memory.span is None for memory in self.memories):
            return [ids]
        size = max(CPU_TOKENS // len(ids) // self.segment, 1) * self.segment
        first = size - cache.get_seq_length() % self.segment
        return ids.tensor_split(tuple(range(first, ids.shape[1], size)), 1)

    def step(
        self,
        ids: Tensor,
        state: MemoryCache | None = None,
        keep: str = "all",
        mask: Tensor | None = None,
    ) -> tuple[Tensor | None, MemoryCache]:
        """Feed tokens (B, T). keep ``all``: float32 logits (B, T, V); ``last``: (B, 1, V); ``none``: None.

        mask: as in `hidden`.
        """
        hidden, cache = self.hidden(ids, state, mask)
        if keep == "none":
            return None, cache
        return self.lm_head(hidden if keep == "all" else hidden[:, -1:]).float(), cache

    def losses(
        self, ids: Tensor, targets: Tensor, state: MemoryCache | None = None, wanted: Tensor | None = None
    ) -> tuple[Tensor, MemoryCache]:
        """Negative log-likelihood of ``targets`` in nats, (B, T) float32, and the state after ``ids``.

        wanted: bool (B, T), whose losses are asked for; the others are 0, and cost nothing. None = all.
        Logits exist for ``LOSS_CHUNK`` tokens at a time, also in the backward pass.
        """
        hidden, cache = self.hidden(ids, state)
        if wanted is None:
            rows = torch.arange(targets.numel(), device=targets.device)
        else:
            rows = wanted.flatten().nonzero()[:, 0]  # a GPU is waited for, once
        flat, goals = hidden.flatten(0, 1).index_select(0, rows), targets.flatten().index_select(0, rows)
        recompute = torch.is_grad_enabled() and len(goals) > LOSS_CHUNK
        parts = []
        for h, goal in zip(flat.split(LOSS_CHUNK), goals.split(LOSS_CHUNK), strict=True):
            call = (self.nll, h, goal)
            parts.append(checkpoint(*call, use_reentrant=False) if recompute else self.nll(h, goal))
        losses = torch.zeros(targets.numel(), device=targets.device)
        return losses.index_copy(0, rows, torch.cat(parts)).view(targets.shape), cache

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood of each target: (T, dim), (T,) -> (T,) float32."""
        return self.nats(self.lm_head(hidden), targets)


AutoConfig.register(MODEL_TYPE, MemoryLlamaConfig, exist_ok=True)  # in the place of the stand-in
AutoModel.register(MemoryLlamaConfig, MemoryLlamaModel)
AutoModelForCausalLM.register(MemoryLlamaConfig, MemoryLlamaForCausalLM)
