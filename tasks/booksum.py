"""Book summaries (Table 4): a whole book is read, its summary written from the carried state.

Protocol, version 1. Prompt: the book's tokens (the first ``input_tokens``, if set), then `SEPARATOR`. The
state is carried from the first token to the last; then up to ``max_new_tokens`` are generated, ended by the
end-of-text token: greedily, or by nucleus sampling with ``temperature`` and ``top_p``, ``samples`` a book.

* ``rouge1``, ``rouge2``, ``rougeL``, ``rougeLsum``: F1 x 100 (metrics/rouge.py), mean over books.
* ``overall``: geometric mean of the books' mean R-1, R-2 and R-L. ``summary_tokens``: mean number generated.
* ``empty``: percent of generated summaries without a letter or digit; they score 0.

Conditions: ``pairwise`` = mean over a book's references, ``best`` = the best of them, kind by kind; the
controls are scored pairwise. ``memory_off``: nothing from before the segment is used. ``other_memory``: the
prompt's last segment follows on the state that the next book, cyclically, has at the start of its own last
segment. Both are left out for models without a memory that could be switched off, the second also if there is
only one book. A book's scores are means over its samples. Intervals: percentile bootstrap over books.

Training: book prefix, separator, one of the book's summaries (another each epoch), end-of-text token; the
loss is the mean over the summary and its end + ``lm_weight`` x the mean over the book and the separator.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, cached_property

import numpy as np
import torch

from infini_bench import data
from infini_bench.errors import UserError
from infini_bench.metrics import rouge
from infini_bench.metrics.intervals import bootstrap
from infini_bench.progress import NullProgress
from infini_bench.stream import chunked, feed, generate, prefill

from .base import Batch, Row, Task, aligned, evaluating, has_controls, mean_over_rows

SEPARATOR = "\n\nSummary of the text above:\n\n"

CONTROLS = ("memory_off", "other_memory")

Summaries = list[np.ndarray]  # token ids of one book's samples
Scores = list[list[np.ndarray]]  # by book and sample: (references, 4)
Kind = Callable[[np.ndarray], np.ndarray]  # (references, 4) -> (4,)


class Booksum(Task):
    name = "booksum"
    version = "1"
    score = ("overall", "rouge1", "rouge2", "rougeL", "rougeLsum")

    def __init__(self, cfg, tokenizer=None):
        super().__init__(cfg, tokenizer)
        self.store = cache(self._store)

    @cached_property
    def fingerprint(self) -> str:
        return data.fingerprint([*self.books("train"), *self.books(self.task.split)])

    @cached_property
    def separator(self) -> np.ndarray:
        return self.tokenizer.encode(SEPARATOR)

    def books(self, split: str) -> list[data.Document]:
        return self.documents(split, pairs=True)

    def _build_tokenizer(self):
        def texts():
            for book in self.books("train"):
                yield book.text
                yield from (summary.text for summary in book.summaries)

        return data.build_tokenizer(self.cfg.data, texts)

    def _store(self, split: str) -> data.TokenStore:
        return data.token_store(self.cfg.data, self.books(split), self.tokenizer)

    # Training ----------------------------------------------------------------------------------------------

    def batch(self, cursor: int, rows: int, segments: int | None = None, split: str = "train") -> Batch:
        """Books in a new order each epoch; ``segments`` of the book replace ``train_input_tokens``."""
        room = segments * self.cfg.memory.segment if segments else self.task.train_input_tokens
        examples = [self._example(number, room, split) for number in range(cursor, cursor + rows)]
        tokens, answer, rest = (torch.from_numpy(np.stack(part)) for part in zip(*examples, strict=True))
        weights = mean_over_rows(answer) + self.task.lm_weight * mean_over_rows(rest)
        return Batch(tokens, weights, answer)

    def _example(self, number: int, room: int, split: str) -> tuple[np.ndarray, ...]:
        """Tokens (T + 1,), and masks (T,) of the summary's targets and of all others; padded at the end."""
        books = self.books(split)
        epoch, place = divmod(number, len(books))
        rng = np.random.default_rng([self.cfg.seed, zlib.crc32(split.encode()), epoch])
        index = int(rng.permutation(len(books))[place])
        text = books[index].summaries[epoch % len(books[index].summaries)].text
        summary = self.tokenizer.encode(text)[: self.task.train_summary_tokens]
        prompt = np.concatenate([self.store(split).tokens(index)[:room], self.separator])
        length = room + len(self.separator) + self.task.train_summary_tokens + 1
        end = len(prompt) + len(summary) + 1
        tokens = np.full(length, self.tokenizer.eos_id, np.int64)
        tokens[: end - 1] = np.concatenate([prompt, summary])
        answer, rest = np.zeros((2, length - 1), np.float32)
        rest[: len(prompt) - 1] = 1
        answer[len(prompt) - 1 : end - 1] = 1
        return tokens, answer, rest

    # Evaluation --------------------------------------------------------------------------------------------

    def evaluate(self, model, progress=None) -> list[Row]:
        books = self.books(self.task.split)[: self.task.max_books]
        if not books:
            raise UserError(f'Add a book with a summary to split "{self.task.split}": it has none.')
        with evaluating(model):
            written = self._write(model, len(books), progress or NullProgress())
        references = [[summary.text for summary in book.summaries] for book in books]
        rows = []
        for control, summaries in written.items():
            texts = [[self.tokenizer.decode(ids) for ids in samples] for samples in summaries]
            scores = rouge.score_documents(texts, references)
            extra = {"books": [book.id for book in books], "summaries": texts}
            rows += self._rouge_rows(control or "pairwise", scores, rouge.pairwise, extra)
            if control is None:
                rows += self._rouge_rows("best", scores, rouge.best, {})
            rows += self._length_rows(control or "pairwise", texts, summaries)
        return rows

    def _write(self, model, n: int, progress) -> dict[str | None, list[Summaries]]:
        """Summaries of the first n books by condition; None = as trained. Three states exist at a time."""
        controls = [c for c in CONTROLS if has_controls(self.cfg, model) and (c == "memory_off" or n > 1)]
        written: dict[str | None, list[Summaries]] = {condition: [] for condition in (None, *controls)}
        prompts = [self._prompt(i) for i in range(n)]
        reading = progress.task("books", sum(map(len, prompts)))
        writing = progress.task("summaries", n * len(written))
        with reading, writing:
            first = own = self._read(model, prompts[0], reading)
            for i, prompt in enumerate(prompts):
                following = first if i + 1 == n else self._read(model, prompts[i + 1], reading)
                states = {None: own, "memory_off": None, "other_memory": following}
                for condition, summaries in written.items():
                    with model.memory_off() if condition == "memory_off" else nullcontext():
                        summaries.append(self._continue(model, prompt, states[condition], i))
                    writing.advance()
                own = following
        return written

    def _prompt(self, index: int) -> np.ndarray:
        book = self.store(self.task.split).tokens(index)[: self.task.input_tokens]
        return np.concatenate([book, self.separator])

    def _read(self, model, prompt: np.ndarray, bar):
        """The state at the start of the prompt's last segment; None if it has only one."""
        border = last_border(prompt, model.segment)
        size = aligned(self.task.chunk, model.segment)
        state = feed(model, chunked(prompt[None, :border], size), None, bar)
        bar.advance(len(prompt) - border)
        return state

    def _continue(self, model, prompt: np.ndarray, state, index: int) -> Summaries:
        """Token ids, without the end, of each sample that follows ``state`` and the prompt's last segment."""
        task, eos_id = self.task, self.tokenizer.eos_id
        logits, state = prefill(model, [prompt[None, last_border(prompt, model.segment) :]], state)
        copies = torch.zeros(1 if task.greedy else task.samples, dtype=torch.long, device=model.device)
        sampling = {"greedy": task.greedy, "temperature": task.temperature, "top_p": task.top_p}
        seed = int(np.random.default_rng([self.cfg.seed, index]).integers(2**63))
        sampling["generator"] = torch.Generator().manual_seed(seed)
        copied = logits[copies], state.select_rows(copies)
        ids = generate(model, *copied, task.max_new_tokens, eos_id=eos_id, **sampling)
        return [row[: int(np.argmax(row == eos_id))] if eos_id in row else row for row in ids]

    def _rouge_rows(self, condition: str, scores: Scores, kind: Kind, extra: dict) -> list[Row]:
        books_D4 = np.stack([np.mean([kind(sample) for sample in samples], axis=0) for samples in scores])
        measures = {name: (lambda rows, i=i: float(rows[:, i].mean())) for i, name in enumerate(rouge.KINDS)}
        rows = [self._row(metric, condition, books_D4, measure) for metric, measure in measures.items()]
        extra = {**extra, "rouge": books_D4.tolist()}
        return [*rows, self._row("overall", condition, books_D4, rouge.overall, extra)]

    def _length_rows(self, condition: str, texts: list[list[str]], summaries: list[Summaries]) -> list[Row]:
        lengths = [np.mean([len(ids) for ids in samples]) for samples in summaries]
        empty = [100 * np.mean([not rouge.has_words(text) for text in samples]) for samples in texts]
        per_book = {"summary_tokens": lengths, "empty": empty}
        return [self._row(metric, condition, np.array(rows), np.mean) for metric, rows in per_book.items()]

    def _row(self, metric: str, condition: str, rows: np.ndarray, measure, extra: dict | None = None) -> Row:
        """A metric row from the books' own numbers, one a row."""
        columns = {"split": self.task.split, "length": self.task.input_tokens, "condition": condition}
        columns |= {"protocol": "greedy" if self.task.greedy else "sampled", "n": len(rows)}
        bounds = bootstrap(rows, measure, seed=self.cfg.seed)
        return self.row(metric, float(measure(rows)), bounds, extra=extra or {}, **columns)


def last_border(prompt: np.ndarray, segment: int) -> int:
    """Where the segment of the prompt's last token starts."""
    return (len(prompt) - 1) // segment * segment
