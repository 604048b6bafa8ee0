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

Intervals: percentile bootstrap over documents. ``extra`` of the bits_per_byte rows keeps the sums of every
document, so that differences between models can be paired.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch

from infini_bench import data
from infini_bench.errors import UserError
from infini_bench.metrics.perplexity import bits_per, interval, mean_nats, perplexity
from infini_bench.progress import Handle, NullProgress
from infini_bench.stream import feed, stream_losses

from .base import Batch, Row, Task, aligned, evaluating, has_controls, mean_over_rows

CONTROLS = ("memory_off", "other_memory")


@dataclass
class Text:
    """One evaluated document: ids (T,), and the words and bytes that its targets spell."""

    id: str
    ids: np.ndarray
    words: int
    bytes: int


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
        losses = self._losses(model, texts, progress or NullProgress())
        return [*self._summary(texts, losses), *self._by_position(losses)]

    def texts(self) -> list[Text]:
        """The evaluated documents within ``max_documents`` and ``max_tokens`` that have any target."""
        store, limit = self.store(self.task.split), self.task.max_tokens
        texts = []
        for i in range(len(store))[: self.task.max_documents]:
            ids = store.tokens(i)
            words, size = int(store.n_words[i]), int(store.n_bytes[i])
            if limit is not None and len(ids) > limit:
                ids = ids[:limit]
                text = self.tokenizer.decode(ids)
                words, size = len(text.split()), len(text.encode())
            if len(ids) > 1:
                first = len(self.tokenizer.decode(ids[:1]).encode())
                texts.append(Text(store.ids[i], ids, words, size - first))
        if not texts:
            raise UserError(f'Add text to split "{self.task.split}": no document has two tokens.')
        return texts

    def _losses(self, model, texts: list[Text], progress) -> dict[str | None, list[np.ndarray]]:
        """Losses (T - 1,) of every document, by condition; None = as trained."""
        n, segment = len(texts), model.segment
        chunk = aligned(self.task.chunk, segment)
        controls = [c for c in CONTROLS if has_controls(self.cfg, model) and (c == "memory_off" or n > 1)]
        total = sum(len(text.ids) - 1 for text in texts) * (1 + len(controls))
        losses: dict[str | None, list[np.ndarray]] = {c: [] for c in (None, *controls)}
        with evaluating(model), progress.task("lm", total) as bar:
            for i, text in enumerate(texts):
                own = text.ids[None]
                losses[None].append(stream_losses(model, own, chunk, progress=bar)[0][0])
                if "memory_off" in controls:
                    with model.memory_off():
                        losses["memory_off"].append(stream_losses(model, own, chunk, progress=bar)[0][0])
                if "other_memory" in controls:
                    other = texts[(i + 1) % n].ids[None]
                    losses["other_memory"].append(other_memory_losses(model, own, other, segment, bar)[0])
        return losses

    def _summary(self, texts: list[Text], losses: dict[str | None, list[np.ndarray]]) -> list[Row]:
        words, sizes = [t.words for t in texts], [t.bytes for t in texts]
        tokens = [len(t.ids) - 1 for t in texts]
        limits = {"max_documents": self.task.max_documents, "max_tokens": self.task.max_tokens}
        rows = []

        def add(metric, measure, nats, units, extra):
            bounds = interval(measure, nats, units, seed=self.cfg.seed)
            columns = {"split": self.task.split, "length": self.task.max_tokens}
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

    def _by_position(self, losses: dict[str | None, list[np.ndarray]]) -> list[Row]:
        rows = []
        for condition, by_document in losses.items():
            longest = max(len(loss) for loss in by_document)
            for low in (2**k for k in range(longest.bit_length())):
                bins = [loss[low - 1 : 2 * low - 1] for loss in by_document if len(loss) >= low]
                nats, counts = [float(b.sum(dtype=np.float64)) for b in bins], [len(b) for b in bins]
                bounds = interval(mean_nats, nats, counts, seed=self.cfg.seed)
                columns = {"split": self.task.split, "condition": condition}
                extra = {"first": low, "last": 2 * low - 1, "tokens": sum(counts)}
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


def other_memory_losses(
    model, own: np.ndarray, other: np.ndarray, segment: int, progress: Handle | None = None
) -> np.ndarray:
    """Losses (1, T - 1) of ``own`` (1, T), each segment from the state of ``other`` at the same position.

    Segment by segment, since within a longer call the document's own segments would fill the memory.
    """
    state, losses = None, []
    whole = other.shape[1] // segment * segment
    for start in range(0, own.shape[1] - 1, segment):
        piece = own[:, start : start + segment + 1]
        losses.append(stream_losses(model, piece, segment, state, progress)[0])
        if start + segment <= whole:
            state = feed(model, [other[:, start : start + segment]], state)
    return np.concatenate(losses, axis=1)
