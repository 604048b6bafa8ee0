"""BART and LED under the protocol of the decoders: a book is fed in any pieces, its summary written token by token.

What a decoder reads as one stream, book, separator, summary, is here the encoder's input (the book) and the
decoder's (the summary): `losses` finds the border by the separator, `step` by being asked for logits. So tasks,
training loop, checkpoints and records are those of every other model.

* ``memory.kind=block``: the stock model; it sees the book's first ``memory.segment`` tokens, its window.
* ``memory.kind=retrieval``: Unlimiformer with ``memory.neighbours`` states a head; it sees the whole book in
  evaluation, and is trained as the stock model (see `infini_bench.unlimiformer`).

The input is ``<s> book </s>``; the decoder starts with its start token and ``<s>``, and ends with ``</s>``. Of
LED the first token has global attention.

Shapes: B batch, T tokens of a call, S encoder states, V vocabulary, L decoder layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSeq2SeqLM
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from infini_bench.cache import MemoryCache, MemoryLayer
from infini_bench.errors import UserError
from infini_bench.schema import MemoryConfig
from infini_bench.unlimiformer import FAMILIES, longest_input, unlimiformer

SETTINGS = "infini_bench"  # in config.json: what `Summarizer` takes beside the model
KINDS = ("block", "retrieval")
PARTS = (("self_k", "self_v"), ("cross_k", "cross_v"))


class Summarizer(nn.Module):
    """A BART or LED, with or without Unlimiformer. State: one layer a decoder layer; ``ids`` (B, T) while the
    book is read; then ``states`` (B, S, d) and each layer's keys and values."""

    segmentwise = False

    def __init__(self, model: Any, memory: MemoryConfig, separator: Sequence[int]):
        """Raises UserError for another architecture, and for a memory that it cannot have."""
        super().__init__()
        if not isinstance(model, FAMILIES):
            raise UserError(f"The only encoder-decoders here are BART and LED; this is {type(model).__name__}.")
        if memory.kind not in KINDS:
            raise UserError(
                f"An encoder-decoder takes model=local_block or model=retrieval, not memory.kind={memory.kind}."
            )
        if not 4 <= memory.segment <= longest_input(model.config):
            raise UserError(
                f"memory.segment is this model's window, from 4 to {longest_input(model.config)} tokens, "
                f"not {memory.segment}."
            )
        self.model, self.memory, self.separator = model, memory, [*map(int, separator)]
        self.has_memory, self.enabled, self.segment = memory.kind == "retrieval", True, memory.segment
        if self.has_memory:
            unlimiformer(model, memory.neighbours, memory.segment, memory.index)

    # What training and records ask -------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def longest_summary(self) -> int:
        """Positions of the decoder: its two first tokens, and a summary without its end."""
        own = getattr(self.config, "max_decoder_position_embeddings", None)
        return own or self.config.max_position_embeddings

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def state_floats(self, batch: int = 1) -> int:
        """Encoder states of a window; with retrieval each window adds as many."""
        return batch * self.segment * self.config.d_model

    def gates(self) -> None:
        """There are none."""

    def take_auxiliary(self) -> Tensor:
        """Nothing is added to the loss."""
        return torch.zeros((), device=self.device)

    def compile_layers(self) -> None:
        raise UserError("trainer.compile=true cannot be with an encoder-decoder; set it to false.")

    @contextmanager
    def memory_off(self) -> Iterator[None]:
        """Inside, a book is its last, unfinished window: the control of every evaluation."""
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    def save_pretrained(self, folder: Path) -> None:
        """A Hugging Face folder of the stock model, whose config also says what this class takes."""
        setattr(self.config, SETTINGS, {"memory": asdict(self.memory), "separator": self.separator})
        self.model.save_pretrained(folder)

    # Training ----------------------------------------------------------------------------------------------

    def losses(self, ids: Tensor, targets: Tensor, state: Any = None) -> tuple[Tensor, MemoryCache]:
        """Negative log-likelihood of the summaries' tokens and ends in nats, 0 elsewhere: (B, T) float32.

        ids: book, separator, summary; targets: the same one token on; after its end, both are padding. There
        is no state after them. Raises UserError for a call that is a part of a row.
        """
        tokens = torch.cat([ids, targets[:, -1:]], 1)
        begins = [self.border(row) for row in ids]
        books = [self.book(row[None, :begin])[0] for row, begin in zip(ids, begins, strict=True)]
        answers = [self.answer(row[begin:]) for row, begin in zip(tokens, begins, strict=True)]
        inputs = [torch.cat([self.start(1)[0], answer[:-1]]) for answer in answers]
        padding = self.config.eos_token_id
        mask = pad_sequence([torch.ones_like(book) for book in books], batch_first=True)
        logits = self.model(
            input_ids=pad_sequence(books, batch_first=True, padding_value=padding),
            attention_mask=mask,
            decoder_input_ids=pad_sequence(inputs, batch_first=True, padding_value=padding),
            use_cache=False,
            **self.marks(mask),
        ).logits[:, 1:]
        nll = torch.zeros(ids.shape, device=ids.device)
        for row, (begin, answer) in enumerate(zip(begins, answers, strict=True)):
            own = F.cross_entropy(logits[row, : len(answer)].float(), answer, reduction="none")
            nll[row, begin - 1 : begin - 1 + len(answer)] = own
        return nll, MemoryCache.empty(0)

    def border(self, ids_T: Tensor) -> int:
        """Tokens up to the end of the separator."""
        separator = torch.tensor(self.separator, device=ids_T.device)
        found = (ids_T.unfold(0, len(separator), 1) == separator).all(1).nonzero()
        if not len(found):
            raise UserError(
                "An encoder-decoder is trained on task=booksum, a row a call; set trainer.checkpoint_segments=null."
            )
        return int(found[0]) + len(separator)

    def answer(self, ids_T: Tensor) -> Tensor:
        """A summary up to its end, the first ``</s>``."""
        ends = (ids_T == self.config.eos_token_id).nonzero()
        found = ids_T[: int(ends[0]) + 1] if len(ends) else ids_T
        if len(found) >= self.longest_summary:
            raise UserError(
                f"The decoder has {self.longest_summary} positions; set task.train_summary_tokens to at most "
                f"{self.longest_summary - 2}."
            )
        return found

    def start(self, batch: int) -> Tensor:
        """The decoder's first two tokens: (B, 2)."""
        begin = [self.config.decoder_start_token_id, self.config.bos_token_id]
        return torch.tensor([begin], device=self.device).expand(batch, -1)

    def marks(self, mask_BT: Tensor) -> dict[str, Tensor]:
        """LED's global attention, on the first token."""
        if not hasattr(self.config, "attention_window"):
            return {}
        return {"global_attention_mask": F.one_hot(torch.zeros_like(mask_BT[:, 0]), mask_BT.shape[1])}

    def book(self, ids_BT: Tensor) -> Tensor:
        """The encoder's input for a book and its separator, or the part of this that is its end."""
        begin = 0 if self.enabled else (ids_BT.shape[1] - 1) // self.segment * self.segment
        lengths = range(min(len(self.separator), ids_BT.shape[1]), -1, -1)
        tails = [torch.tensor(self.separator[len(self.separator) - n :], device=ids_BT.device) for n in lengths]
        cut = next(len(x) for x in tails if bool((ids_BT[:, ids_BT.shape[1] - len(x) :] == x).all()))
        text = ids_BT[:, begin : ids_BT.shape[1] - cut]
        if self.training or not self.has_memory:
            text = text[:, : self.segment - 2]
        ends = [ids_BT.new_full((len(ids_BT), 1), n) for n in (self.config.bos_token_id, self.config.eos_token_id)]
        return torch.cat([ends[0], text, ends[1]], 1)

    # Reading and writing -----------------------------------------------------------------------------------

    def step(
        self, ids: Tensor, state: MemoryCache | None = None, keep: str = "all"
    ) -> tuple[Tensor | None, MemoryCache]:
        """Feed tokens (B, T). Those of a book give no logits, so it is read with keep ``none``.

        The first call with keep ``last`` ends it: the book is encoded, and the logits (B, 1, V) are those of
        the summary's first token. Later calls feed the summary: ``all`` (B, T, V), ``last`` or ``none``.
        """
        if state is not None and "states" in (state.layers[0].state or {}):
            return self.write(ids, state, keep)
        before = None if state is None else state.layers[0].state
        read = ids if before is None else torch.cat([before["ids"], ids], 1)
        if keep == "none":
            layers = self.config.decoder_layers
            first = MemoryLayer({"ids": read, "seen": read.shape[1]})
            return None, MemoryCache([first, *MemoryCache.empty(layers - 1).layers])
        if keep == "all":
            raise ValueError("an encoder-decoder has no logits inside a book: ask with keep='last'")
        book = self.book(read)
        mask = torch.ones_like(book)
        states = self.model.get_encoder()(book, attention_mask=mask, **self.marks(mask))[0]
        begun = MemoryCache.empty(self.config.decoder_layers)
        begun.layers[0].state = {"states": states, "seen": 0}
        return self.write(self.start(len(ids)), begun, "last")

    def write(self, ids: Tensor, state: MemoryCache, keep: str) -> tuple[Tensor | None, MemoryCache]:
        """The decoder over tokens (B, T) of a summary."""
        held = [layer.state or {} for layer in state.layers]
        seen, states = held[0]["seen"] + ids.shape[1], held[0]["states"]
        if seen > self.longest_summary:
            raise UserError(
                f"The decoder has {self.longest_summary} positions; set task.max_new_tokens to at most "
                f"{self.longest_summary - 1}."
            )
        caches = [DynamicCache(), DynamicCache()]
        for cache, (k, v) in zip(caches, PARTS, strict=True):
            for number, layer in enumerate(held):
                if k in layer:
                    cache.update(layer[k], layer[v], number)
        past = EncoderDecoderCache(*caches)
        out = self.model(
            encoder_outputs=BaseModelOutput(states), decoder_input_ids=ids, past_key_values=past, use_cache=True
        )
        after: list[dict[str, Any]] = [{"states": states, "seen": seen}, *({} for _ in held[1:])]
        for cache, (k, v) in zip(caches, PARTS, strict=True):
            for layer, own in zip(cache.layers, after, strict=False):  # with retrieval there is no cross-cache
                own |= {k: layer.keys, v: layer.values}
        logits = {"all": out.logits, "last": out.logits[:, -1:], "none": None}[keep]
        return None if logits is None else logits.float(), MemoryCache([MemoryLayer(own) for own in after])


def read_weights(name: str, memory: MemoryConfig, separator: Sequence[int]) -> Summarizer:
    """The `Summarizer` of a hub id or folder, float32, on the CPU; transformers' errors are the caller's."""
    model = AutoModelForSeq2SeqLM.from_pretrained(name, dtype=torch.float32, trust_remote_code=False)
    return Summarizer(model, memory, separator)
