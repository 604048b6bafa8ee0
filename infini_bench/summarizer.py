"""BART and LED under the protocol of the decoders: a book is fed in any pieces, its summary token by token.

What a decoder reads as one stream, book, separator, summary, is here the encoder's input (the book) and the
decoder's (the summary): `losses` finds the border by the separator, `step` by being asked for logits. So
tasks, training loop, checkpoints and records are those of every other model.

* ``memory.kind=block``: the stock model; it sees the book's first ``memory.segment`` tokens, its window.
* ``memory.kind=retrieval``: Unlimiformer with ``memory.neighbours`` states a head; it sees the whole book in
  evaluation, and is trained as the stock model (see `infini_bench.unlimiformer`).

The input is ``<s> book </s>``; the decoder starts with its start token and ``<s>``, and ends with ``</s>``.
Of LED the first token has global attention.

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
    """A BART or LED, with or without Unlimiformer.

    State, a `MemoryCache` with a layer for each of the decoder's: while books are read ``ids`` (B, T), of
    which each row's last ``length`` count; then ``states`` (B, S, d), ``live`` (B, S) bool, and each layer's
    keys and values.
    """

    segmentwise = False

    def __init__(self, model: Any, memory: MemoryConfig, separator: Sequence[int]):
        """Raises UserError for another architecture, and for a memory that it cannot have."""
        super().__init__()
        if not isinstance(model, FAMILIES):
            raise UserError(
                f"The only encoder-decoders here are BART and LED; this is {type(model).__name__}."
            )
        if memory.kind not in KINDS:
            raise UserError(
                "An encoder-decoder takes model=local_block or model=retrieval, not "
                f"memory.kind={memory.kind}."
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

    def save_pretrained(self, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """A Hugging Face folder of the stock model, whose config also says what this class takes.

        state_dict: parameters by their names here; unset = as they are.
        """
        setattr(self.config, SETTINGS, {"memory": asdict(self.memory), "separator": self.separator})
        given = {name.removeprefix("model."): x for name, x in (state_dict or {}).items()}
        self.model.save_pretrained(folder, state_dict={**self.model.state_dict(), **given})

    # Training ----------------------------------------------------------------------------------------------

    def losses(
        self, ids: Tensor, targets: Tensor, state: Any = None, wanted: Tensor | None = None
    ) -> tuple[Tensor, MemoryCache]:
        """Negative log-likelihood of the summaries' tokens and ends in nats, 0 elsewhere: (B, T) float32.

        ids: book, separator, summary; targets: the same one token on; after its end, both are padding.
        wanted: bool (B, T), whose losses are asked for; None = all that there are. There is no
        state after them. Raises UserError for a call that is a part of a row.
        """
        if state is not None:
            raise UserError(
                "An encoder-decoder takes a book's beginning and its summary in one call: set "
                "trainer.checkpoint_segments=null, and leave training on whole books to decoders."
            )
        tokens = torch.cat([ids, targets[:, -1:]], 1)
        begins = [self.border(row) for row in ids]
        books, mask = self.padded([row[:begin] for row, begin in zip(ids, begins, strict=True)])
        answers = [self.answer(row[begin:]) for row, begin in zip(tokens, begins, strict=True)]
        inputs = [torch.cat([self.start(1)[0], answer[:-1]]) for answer in answers]
        logits = self.model(
            input_ids=books,
            attention_mask=mask,
            decoder_input_ids=pad_sequence(inputs, batch_first=True, padding_value=self.config.pad_token_id),
            use_cache=False,
            **self.marks(mask),
        ).logits[:, 1:]
        nll = torch.zeros(ids.shape, device=ids.device)
        for row, (begin, answer) in enumerate(zip(begins, answers, strict=True)):
            own = F.cross_entropy(logits[row, : len(answer)].float(), answer, reduction="none")
            nll[row, begin - 1 : begin - 1 + len(answer)] = own
        return nll if wanted is None else nll.where(wanted, 0.0), MemoryCache.empty(0)

    def border(self, ids_T: Tensor) -> int:
        """Tokens up to the end of the separator."""
        separator = torch.tensor(self.separator, device=ids_T.device)
        found = (ids_T.unfold(0, len(separator), 1) == separator).all(1).nonzero()
        if not len(found):
            raise UserError(
                "A row has no summary: an encoder-decoder is trained on task=booksum, a row a call; set "
                "trainer.checkpoint_segments=null."
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

    def padded(self, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The encoder's input for rows (T,) of books with their separators, and its mask: (B, T) int64."""
        books = [self.book(row) for row in rows]
        mask = pad_sequence([torch.ones_like(book) for book in books], batch_first=True)
        return pad_sequence(books, batch_first=True, padding_value=self.config.pad_token_id), mask

    def book(self, ids_T: Tensor) -> Tensor:
        """The encoder's input for a book and its separator, or as much of this as there is."""
        most = min(len(self.separator), len(ids_T))
        separator = ids_T.new_tensor(self.separator)
        end = next(
            n
            for n in range(most, -1, -1)
            if torch.equal(ids_T[len(ids_T) - n :], separator[len(separator) - n :])
        )
        text = ids_T[: len(ids_T) - end]
        if not self.enabled:
            text = text[max(len(text) - 1, 0) // self.segment * self.segment :]
        if self.training or not self.has_memory:
            text = text[: self.segment - 2]
        first, last = (ids_T.new_tensor([n]) for n in (self.config.bos_token_id, self.config.eos_token_id))
        return torch.cat([first, text, last])

    # Reading and writing -----------------------------------------------------------------------------------

    def step(
        self, ids: Tensor, state: MemoryCache | None = None, keep: str = "all", mask: Tensor | None = None
    ) -> tuple[Tensor | None, MemoryCache]:
        """Feed tokens (B, T). Those of a book give no logits, so it is read with keep ``none``.

        The first call with keep ``last`` ends it: the book is encoded, and the logits (B, 1, V) are those of
        the summary's first token. Later calls feed the summary: ``all`` (B, T, V), ``last`` or ``none``.
        mask: (B, T) bool, False = padding at the left of a book's part; None = no padding.
        """
        held = {} if state is None else state.layers[0].state or {}
        if state is not None and "states" in held:
            return self.write(ids, state, keep)
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        rows = [row[own] for row, own in zip(ids, real, strict=True)]
        if held:
            ends = torch.as_tensor(held["length"]).expand(len(ids)).tolist()
            known = [row[len(row) - n :] for row, n in zip(held["ids"], ends, strict=True)]
            rows = [torch.cat(parts) for parts in zip(known, rows, strict=True)]
        begun = MemoryCache.empty(self.config.decoder_layers)
        if keep == "none":
            lengths = torch.tensor([len(row) for row in rows], device=ids.device)
            even = bool((lengths == lengths[0]).all())
            tokens = pad_sequence(rows, batch_first=True, padding_side="left")
            begun.layers[0].state = {
                "ids": tokens,
                "length": int(lengths[0]) if even else lengths,
                "seen": tokens.shape[1],
            }
            return None, begun
        if keep == "all":
            raise ValueError("an encoder-decoder has no logits inside a book: ask with keep='last'")
        books, live = self.padded(rows)
        states = self.model.get_encoder()(books, attention_mask=live, **self.marks(live))[0]
        begun.layers[0].state = {"states": states, "live": live.bool(), "seen": 0}
        return self.write(self.start(len(ids)), begun, "last")

    def write(self, ids: Tensor, state: MemoryCache, keep: str) -> tuple[Tensor | None, MemoryCache]:
        """The decoder over tokens (B, T) of a summary."""
        held = [layer.state or {} for layer in state.layers]
        seen, states, live = held[0]["seen"] + ids.shape[1], held[0]["states"], held[0]["live"]
        if seen > self.longest_summary:
            raise UserError(
                f"The decoder has {self.longest_summary} positions; set task.max_new_tokens to at most "
                f"{self.longest_summary - 1}."
            )
        caches = [DynamicCache(), DynamicCache()]
        for cache, (k, v) in zip(caches, PARTS, strict=True):
            for number, kept in enumerate(held):
                if k in kept:
                    cache.update(kept[k], kept[v], number)
        past = EncoderDecoderCache(*caches)
        out = self.model(
            encoder_outputs=BaseModelOutput(states),
            attention_mask=live.long(),
            decoder_input_ids=ids,
            past_key_values=past,
            use_cache=True,
        )
        begun = {"states": states, "live": live, "seen": seen}
        after: list[dict[str, Any]] = [begun, *({} for _ in held[1:])]
        for cache, (k, v) in zip(caches, PARTS, strict=True):
            stock: list[Any] = cache.layers  # none of the cross-attentions with retrieval
            for layer, own in zip(stock, after, strict=False):
                own |= {k: layer.keys, v: layer.values}
        logits = {"all": out.logits, "last": out.logits[:, -1:], "none": None}[keep]
        return None if logits is None else logits.float(), MemoryCache([MemoryLayer(own) for own in after])


def read_weights(name: str, memory: MemoryConfig, separator: Sequence[int]) -> Summarizer:
    """The `Summarizer` of a hub id or folder, float32, on the CPU; transformers' errors are the caller's."""
    model = AutoModelForSeq2SeqLM.from_pretrained(name, dtype=torch.float32, trust_remote_code=False)
    return Summarizer(model, memory, separator)
