"""Unlimiformer (arXiv 2305.01625) around the encoder-decoders of transformers: BART, and LED as PRIMERA is.

The input is encoded in chunks of the encoder's window that overlap by half; of each the middle half is kept,
of the first also its beginning and of the last also its end. Every cross-attention head then sees the ``k``
states with the largest scores. Since q . (W_k e + b_k) = (W_k^T q) . e + q . b_k, and the last term is the
same for all states e, one index of the states themselves serves all layers and heads; since weights sum to 1,
values are projected after they are averaged: sum_j p_j (W_v e_j + b_v) = W_v (sum_j p_j e_j) + b_v.

With k at least the number of states this is full cross-attention, exactly. Weights, names and ``generate()``
stay the model's own: only what ``forward`` does is another. In training mode everything is as it was: of the
paper's ways to train, the plain one is there (standard fine-tuning on inputs cut to the window, retrieval at
test time); its random-encoded, retrieval and alternating training are not.

The search is exact: by torch on any device, or by faiss's flat inner-product index on the CPU (in float32),
built once for a document. Of LED, a chunk's first token has global attention if the document's first has.

Shapes: B batch, T tokens of the input, w window, S encoder states, Q decoder tokens, H heads, D head size,
d width, K states that a head sees.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BartForConditionalGeneration, LEDForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.led.modeling_led import LEDDecoderAttention, LEDEncoder, LEDEncoderBaseModelOutput

from infini_bench.errors import UserError
from infini_bench.memory.knn import searcher

FAMILIES = (BartForConditionalGeneration, LEDForConditionalGeneration)
FLOATS = 2**27  # scores or gathered states that exist at once: 512 MiB in float32


def unlimiformer(model: Any, k: int, window: int | None = None, index: str = "auto", batch: int = 8) -> Any:
    """``model``, changed in place: encodes inputs of any length, and each head retrieves ``k`` states.

    window: tokens of a chunk, a multiple of 4; unset = the encoder's longest input. index: ``memory.index``.
    batch: chunks encoded side by side. Raises UserError for another architecture or window.
    """
    if not isinstance(model, FAMILIES):
        known = ", ".join(family.__name__ for family in FAMILIES)
        raise UserError(f"Unlimiformer is for {known}, not for {type(model).__name__}.")
    longest = longest_input(model.config)
    window = longest if window is None else window
    if window > longest or window % 4:
        raise UserError(f"A chunk is a multiple of 4 tokens, at most {longest}, not {window}.")
    shared = StateIndex(k, index)
    remade(model.get_encoder(), ChunkedEncoder, window=window, batch=batch)
    for layer in model.get_decoder().layers:
        remade(layer.encoder_attn, RetrievalAttention, index=shared)
    return model


def longest_input(config: Any) -> int:
    """Positions of a BART's or LED's encoder."""
    return getattr(config, "max_encoder_position_embeddings", None) or config.max_position_embeddings


def remade(module: nn.Module, mixin: type, **attributes: Any) -> None:
    """Puts ``mixin`` in front of the module's class: the same weights under the same names."""
    cls = type(module)
    module.__class__ = type(f"{mixin.__name__}Of{cls.__name__}", (mixin, cls), {})
    for name, value in attributes.items():
        setattr(module, name, value)


def chunks(tokens: int, window: int) -> list[tuple[int, int, int]]:
    """(begin, first, end) of each chunk: ``window`` tokens from ``begin``; kept are first ... end - 1."""
    if tokens <= window:
        return [(0, 0, tokens)]
    begins = [*range(0, tokens - window, window // 2), tokens - window]
    ends = [*(begin + 3 * window // 4 for begin in begins[:-1]), tokens]
    return [*zip(begins, [0, *ends[:-1]], ends, strict=True)]


class ChunkedEncoder:
    """An encoder of inputs of any length. Rows are encoded one by one, without their padding."""

    window: int
    batch: int
    training: bool

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """input_ids, attention_mask (B, T) -> states (B, T, d); zeros at padding. No single layer's outputs.

        In training mode, as the encoder always was.
        """
        if self.training:
            return super().forward(input_ids, attention_mask, **kwargs)  # type: ignore[misc]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        marks = kwargs.get("global_attention_mask") if isinstance(self, LEDEncoder) else None
        states: Any = None
        for row, real in enumerate(mask.bool()):
            found = self.encode(input_ids[row, real], None if marks is None else marks[row, real])
            if states is None:
                states = found.new_zeros(*input_ids.shape, found.shape[-1])
            states[row, real] = found
        if kwargs.get("return_dict") is False:
            return (states,)
        return (LEDEncoderBaseModelOutput if isinstance(self, LEDEncoder) else BaseModelOutput)(states)

    def encode(self, ids_T: Tensor, marks_T: Tensor | None) -> Tensor:
        """States (T, d) of one row; marks: 1 where LED's attention is global."""
        plan = chunks(len(ids_T), self.window)
        parts: list[Tensor] = []
        for first in range(0, len(plan), self.batch):
            some = plan[first : first + self.batch]
            places = [slice(begin, begin + self.window) for begin, _, _ in some]
            more = {}
            if marks_T is not None:
                marks = torch.stack([marks_T[place] for place in places])
                marks[:, 0] = marks_T[0]
                more["global_attention_mask"] = marks
            ids = torch.stack([ids_T[place] for place in places])
            out = super().forward(ids, torch.ones_like(ids), return_dict=True, **more)  # type: ignore[misc]
            for chunk, (begin, start, end) in zip(out.last_hidden_state, some, strict=True):
                parts.append(chunk[start - begin : end - begin])
        return torch.cat(parts)


class RetrievalAttention:
    """A cross-attention whose heads see the best K states each; projections are the module's own."""

    index: StateIndex
    training: bool

    def forward(
        self: Any,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple:
        """(B, Q, d) and states (B, S, d) -> (B, Q, d), and what the layer expects beside it.

        attention_mask: (B, 1, Q, S), bool or added to scores; only padding of the states is taken from it.
        In training mode, as the attention always was.
        """
        if self.training or key_value_states is None:
            given = (hidden_states, key_value_states, past_key_values, attention_mask)
            return super().forward(*given, **kwargs)  # type: ignore[misc]
        live = None
        if attention_mask is not None:
            mask = attention_mask[:, 0, 0]
            live = (mask if mask.dtype == torch.bool else mask >= 0).expand(key_value_states.shape[:2])
        heads = (self.num_heads, self.head_dim)
        q = self.q_proj(hidden_states).unflatten(-1, heads) * self.scaling
        w_k, w_v = (p.weight.unflatten(0, heads) for p in (self.k_proj, self.v_proj))
        read = self.index.read(torch.einsum("bqhe,hed->bhqd", q, w_k), key_value_states, live)
        out = torch.einsum("bhqd,hed->bqhe", read, w_v).flatten(2)
        if self.v_proj.bias is not None:
            out = out + self.v_proj.bias
        out = self.out_proj(out)
        return (out, None, past_key_values) if isinstance(self, LEDDecoderAttention) else (out, None)


class StateIndex:
    """Attention of queries over the best ``k`` of a document's encoder states; one for the whole decoder."""

    def __init__(self, k: int, index: str) -> None:
        self.k, self.index = k, index
        self.built: tuple[Any, list] = (lambda: None, [])  # the states that it was built from, an index a row

    def read(self, query_BHQd: Tensor, states_BSd: Tensor, live_BS: Tensor | None) -> Tensor:
        """softmax over the scores of the best k states, times these: (B, H, Q, d)."""
        batch, heads, _, width = query_BHQd.shape
        if self.k >= states_BSd.shape[1]:
            return self.read_all(query_BHQd, states_BSd, live_BS)
        step = max(1, FLOATS // (batch * heads * max(states_BSd.shape[1], self.k * width)))
        rows = torch.arange(batch, device=states_BSd.device)[:, None]
        reads = []
        for query in query_BHQd.split(step, 2):
            place = self.search(query, states_BSd, live_BS)
            picked = states_BSd[rows, place.clamp_min(0).flatten(1)].unflatten(1, place.shape[1:])
            scores = torch.einsum("bhqd,bhqkd->bhqk", query, picked).masked_fill(place < 0, -torch.inf)
            reads.append(torch.einsum("bhqk,bhqkd->bhqd", scores.softmax(-1), picked))
        return torch.cat(reads, 2)

    def read_all(self, query_BHQd: Tensor, states_BSd: Tensor, live_BS: Tensor | None) -> Tensor:
        """`read` where k covers all states."""
        scores = torch.einsum("bhqd,bsd->bhqs", query_BHQd, states_BSd)
        if live_BS is not None:
            scores = scores.masked_fill(~live_BS[:, None, None], -torch.inf)
        return torch.einsum("bhqs,bsd->bhqd", scores.softmax(-1), states_BSd)

    @torch.no_grad()
    def search(self, query_BHQd: Tensor, states_BSd: Tensor, live_BS: Tensor | None) -> Tensor:
        """Places of the best k live states, -1 where fewer are live: (B, H, Q, K) int64."""
        if searcher(self.index, states_BSd.device.type) == "faiss":
            return self.by_faiss(query_BHQd, states_BSd, live_BS)
        scores = torch.einsum("bhqd,bsd->bhqs", query_BHQd, states_BSd)
        if live_BS is not None:
            scores = scores.masked_fill(~live_BS[:, None, None], -torch.inf)
        top, place = scores.topk(self.k, sorted=False)
        return place.masked_fill(top == -torch.inf, -1)

    def by_faiss(self, query_BHQd: Tensor, states_BSd: Tensor, live_BS: Tensor | None) -> Tensor:
        """`search` in one flat index a row, of its live states; kept while the states are the same."""
        if self.built[0]() is not states_BSd:
            self.built = weakref.ref(states_BSd), self.build(states_BSd, live_BS)
        found = []
        for query, (index, names) in zip(query_BHQd, self.built[1], strict=True):
            flat = query.detach().flatten(0, 1).float().contiguous().numpy()
            place = torch.from_numpy(index.search(flat, self.k)[1])
            found.append(torch.where(place < 0, place, names[place.clamp_min(0)]))
        return torch.stack(found).view(*query_BHQd.shape[:3], self.k)

    @staticmethod
    def build(states_BSd: Tensor, live_BS: Tensor | None) -> list[tuple[Any, Tensor]]:
        """Of each row the index and the place of each of its entries."""
        import faiss

        built = []
        for row, states in enumerate(states_BSd):
            names = torch.arange(len(states)) if live_BS is None else live_BS[row].nonzero()[:, 0]
            index = faiss.IndexFlatIP(states.shape[1])
            index.add(states[names].detach().float().contiguous().numpy())
            built.append((index, names))
        return built
