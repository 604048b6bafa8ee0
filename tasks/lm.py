"""Language modelling over whole documents (Table 2).

Protocol, version 1. Each document of ``task.split`` is read once, in order, with the state carried from its
first token to its last (or to ``max_tokens``). A document of T tokens has T - 1 targets: its first token is
read but not predicted, and counts neither as a token nor with its bytes. Words are those of the whole text.

* ``token_ppl``, ``word_ppl``: exp(total nats / total targets), exp(total nats / total words).
* ``bits_per_byte``, ``bits_per_token``: total nats / ln 2 / total UTF-8 bytes, or targets.
* ``bits_per_byte_memory_off``: the same model with nothing from before the segment.
* ``bits_per_byte_other_memory``: every segment of the document starts from the state that the next document
  of the split, cyclically, has at the same token position; if that one is shorter, from its state at its last
  whole segment. Left out when the split has one document only.
  Both controls are left out for models without a memory that could be switched off.
* ``unigram_bits_per_token``: counts of the train split plus one, the same targets.
* ``loss`` by position: nats per target at positions 2^k ... 2^(k+1) - 1, from 0; ``position`` holds 2^k.
* ``tokens_per_s``: tokens read and scored a second, as trained, one document after the other in calls of
  ``chunk`` tokens; of one run on the machine as busy as it was, so no benchmark.

``joined`` reads the split's documents end to end as one stream of ``max_tokens`` tokens (all, if that is not
set): the state goes on from document to document, positions count from the stream's start, and each
document's first token stays unscored. There is no other stream whose memory could be had.

``memory`` changes settings of the trained memory for the evaluation alone: how many entries a store holds, or
a window in the place of full attention. Weights stay what they are.

Intervals: percentile bootstrap over documents. ``extra`` of the bits_per_byte rows keeps the sums of every
document, so that differences between models can be paired.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch

from infini_bench import data
from infini_bench.errors import UserError
from infini_bench.metrics.perplexity import bits_per, interval, mean_nats, perplexity
from infini_bench.progress import NullProgress
from infini_bench.stream import stream_losses

from .base import Batch, Row, Task, aligned, evaluating, has_controls, mean_over_rows
from .exchange import other_memory_losses

CONTROLS = ("memory_off", "other_memory")


Losses = dict[str | None, list[np.ndarray]]  # (T - 1,) of every document, by condition; None = as trained


@dataclass
class Text:
    """One evaluated document: ids (T,), and the words and bytes that its targets spell.

    start: position of its first token, not 0 in a joined stream.
    """

    id: str
    ids: np.ndarray
    words: int
    bytes: int
    start: int = 0


class LM(Task):
    name = "lm"
    version = "1"
    score = ("token_ppl", "bits_per_byte")

    def __init__(self, cfg, tokenizer=None):
        super().__init__(cfg, tokenizer)
        self.store = cache(self._store)
        self.sequences = cache(self._sequences)

    @cached_property
    def fingerprint(self) -> str:
        return data.fingerprint([*self.documents("train"), *self.documents(self.task.split)])

    def batch(self, cursor: int, rows: int, segments: int | None = None, split: str = "train") -> Batch:
        """`Sequences` of ``task.sequence`` tokens, each from one document; ``segments`` crops them."""
        tokens, weights = self.sequences(split).rows(cursor, rows)
        if segments is not None:
            length = segments * self.cfg.memory.segment
            if length > self.task.sequence:
                raise UserError(
                    f"Set task.sequence to at least {length}: the curriculum asks for {segments} segments of "
                    f"{self.cfg.memory.segment} tokens."
                )
            tokens, weights = tokens[:, : length + 1], weights[:, :length]
        return Batch(torch.from_numpy(tokens), mean_over_rows(torch.from_numpy(weights)))

    def evaluate(self, model, progress=None) -> list[Row]:
        texts = self.texts()
        losses, seconds = self._losses(model, texts, progress or NullProgress())
        read = sum(map(len, losses[None]))
        columns = {"split": self.task.split, "length": self.task.max_tokens, "protocol": self._protocol}
        speed = self.row("tokens_per_s", read / seconds, n=len(texts), extra={"seconds": seconds}, **columns)
        return [*self._summary(texts, losses), speed, *self._by_position(texts, losses)]

    @property
    def _protocol(self) -> str | None:
        return "joined" if self.task.joined else None

    def texts(self) -> list[Text]:
        """The evaluated documents within ``max_documents`` and ``max_tokens`` that have any target.

        Raises UserError if there is none, or if a joined stream comes out shorter than asked for.
        """
        store, limit = self.store(self.task.split), self.task.max_tokens
        texts: list[Text] = []
        start = 0
        for i in range(len(store))[: self.task.max_documents]:
            left = None if limit is None else limit - start
            if left is not None and left < 2:
                break
            text = self._text(i, left)
            if text is not None:
                text.start = start
                texts.append(text)
                start += len(text.ids) if self.task.joined else 0
        if not texts:
            raise UserError(f'Add text to split "{self.task.split}": no document has two tokens.')
        if self.task.joined and limit is not None and start < limit - 1:
            raise UserError(
                f'Split "{self.task.split}" joined has {start} tokens, not task.max_tokens={limit}; '
                "ask for fewer, or give more documents."
            )
        return texts

    def _text(self, i: int, limit: int | None) -> Text | None:
        """Document ``i`` to its token ``limit``; None if nothing is left to predict."""
        store = self.store(self.task.split)
        ids, words, size = store.tokens(i), int(store.n_words[i]), int(store.n_bytes[i])
        if limit is not None and len(ids) > limit:
            ids = ids[:limit]
            text = self.tokenizer.decode(ids)
            words, size = len(text.split()), len(text.encode())
        if len(ids) < 2:
            return None
        return Text(store.ids[i], ids, words, size - len(self.tokenizer.decode(ids[:1]).encode()))

    def _losses(self, model, texts: list[Text], progress) -> tuple[Losses, float]:
        """The losses, and the seconds that those of the model as trained took."""
        chunk = aligned(self.task.chunk, model.segment)
        controls = [c for c in CONTROLS if has_controls(self.cfg, model)]
        if self.task.joined or len(texts) == 1:
            controls = controls[:1]
        total = sum(len(text.ids) - 1 for text in texts) * (1 + len(controls))
        losses: Losses = {}

        def whole() -> list[np.ndarray]:
            ids = [np.concatenate([t.ids for t in texts])] if self.task.joined else [t.ids for t in texts]
            read = [stream_losses(model, each[None], chunk, progress=bar)[0][0] for each in ids]
            return [read[0][t.start : t.start + len(t.ids) - 1] for t in texts] if self.task.joined else read

        with evaluating(model), progress.task("lm", total) as bar:
            began = time.perf_counter()
            losses[None] = whole()
            seconds = time.perf_counter() - began
            if "memory_off" in controls:
                with model.memory_off():
                    losses["memory_off"] = whole()
            if "other_memory" in controls:
                ids = [text.ids for text in texts]
                losses["other_memory"] = other_memory_losses(model, ids, self.task.batch, bar)
        return losses, seconds

    def _summary(self, texts: list[Text], losses: Losses) -> list[Row]:
        words, sizes = [t.words for t in texts], [t.bytes for t in texts]
        tokens = [len(t.ids) - 1 for t in texts]
        limits = {"max_documents": self.task.max_documents, "max_tokens": self.task.max_tokens}
        rows = []

        def add(metric, measure, nats, units, extra):
            bounds = interval(measure, nats, units, seed=self.cfg.seed)
            columns = {
                "split": self.task.split,
                "length": self.task.max_tokens,
                "protocol": self._protocol,
            }
            rows.append(self.row(metric, measure(nats, units), bounds, n=len(texts), extra=extra, **columns))

        for condition, by_document in losses.items():
            nats = [float(loss.sum(dtype=np.float64)) for loss in by_document]
            sums = {"documents": [t.id for t in texts], "nats": nats, "tokens": tokens}
            sums |= {"words": words, "bytes": sizes}
            if condition is None:
                add("token_ppl", perplexity, nats, tokens, limits)
                add("word_ppl", perplexity, nats, words, limits)
                add("bits_per_token", bits_per, nats, tokens, limits)
            metric = "bits_per_byte" if condition is None else f"bits_per_byte_{condition}"
            add(metric, bits_per, nats, sizes, {**limits, **sums})
        add("unigram_bits_per_token", bits_per, self._unigram_nats(texts), tokens, limits)
        return rows

    def _by_position(self, texts: list[Text], losses: Losses) -> list[Row]:
        rows = []
        last = max(text.start + len(text.ids) - 1 for text in texts)
        for condition, by_document in losses.items():
            for low in (2**k for k in range(last.bit_length())):
                spans = [(max(low - t.start - 1, 0), max(2 * low - t.start - 1, 0)) for t in texts]
                bins = [loss[a:b] for loss, (a, b) in zip(by_document, spans, strict=True) if len(loss[a:b])]
                nats, counts = [float(b.sum(dtype=np.float64)) for b in bins], [len(b) for b in bins]
                bounds = interval(mean_nats, nats, counts, seed=self.cfg.seed)
                columns = {"split": self.task.split, "condition": condition, "protocol": self._protocol}
                extra: Row = {"first": low, "last": 2 * low - 1, "tokens": sum(counts)}
                if condition is None:
                    extra |= {"nats": nats, "counts": counts}  # of each document that is so long
                value = mean_nats(nats, counts)
                columns |= {"position": str(low), "n": len(bins), "extra": extra}
                rows.append(self.row("loss", value, bounds, **columns))
        return rows

    def _unigram_nats(self, texts: list[Text]) -> list[float]:
        """Loss of each document's targets under the train split's token counts plus one."""
        vocab, store = self.tokenizer.vocab_size, self.store("train")
        counts = np.ones(vocab)
        for i in range(len(store)):
            counts += np.bincount(store.tokens(i), minlength=vocab)
        nats = -np.log(counts / counts.sum())
        return [float(nats[text.ids[1:]].sum()) for text in texts]

    def _store(self, split: str) -> data.TokenStore:
        return data.token_store(self.cfg.data, self.documents(split), self.tokenizer)

    def _sequences(self, split: str) -> data.Sequences:
        return data.Sequences(self.store(split), self.task.sequence, self.cfg.seed)
