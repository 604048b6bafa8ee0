"""Books of a few letters, and a model that writes what it remembers of them."""

import json
from contextlib import contextmanager
from pathlib import Path

import torch

from infini_bench.schema import BooksumConfig, DataConfig, MemoryConfig, RunConfig
from infini_bench.summaries import read_summaries
from infini_bench.tasks import build_task
from infini_bench.tasks.booksum import SEPARATOR

SEGMENT = 64  # every prompt's last segment holds the end of its book and the whole separator
BOOKS = [
    ("a" * 150, ["the king died", "a king has died"]),
    ("b" * 200, ["they lived"]),
    ("c" * 210, ["nobody knows"]),
]


def booksum_task(folder, books=BOOKS, **settings):
    """The task on books and their summaries, the same in every split, all in ``folder``."""
    for split in ("train", "validation", "test"):
        lines = [
            {
                "id": f"{split}{i}",
                "text": text,
                "summaries": [{"source": "x", "text": s} for s in summaries],
            }
            for i, (text, summaries) in enumerate(books)
        ]
        (folder / "books").mkdir(exist_ok=True)
        (folder / "books" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = {"name": "mine", "source": "local", "path": str(folder / "books")}
    source["id_column"] = "id"
    source["summary_column"] = "summaries"
    data = DataConfig(tokenizer="bytes", cache_dir=str(folder / "cache"), **source)
    task = BooksumConfig(**{"greedy": True, "max_new_tokens": 40, "chunk": 40, **settings})
    cfg = RunConfig(data=data, memory=MemoryConfig(segment=SEGMENT), task=task)
    cfg.records = str(folder / "records")
    return build_task(cfg)


class Carried:
    """What each row has read."""

    def __init__(self, texts: list[bytes]):
        self.texts = texts

    def select_rows(self, index):
        return Carried([self.texts[i] for i in index])

    @classmethod
    def stack(cls, states):
        return cls([b"" if state is None else state.texts[0] for state in states])


class Writer(torch.nn.Module):
    """Writes the summary of the book whose first letter it remembers, and nothing if it remembers none."""

    device = torch.device("cpu")
    segment = SEGMENT
    has_memory = True

    def __init__(self, eos_id):
        super().__init__()
        self.summaries = {ord("a"): b"the king died", ord("b"): b"they lived", ord("c"): b"wrong words"}
        self.eos_id, self.prompts, self.off = eos_id, [], False

    @contextmanager
    def memory_off(self):
        self.off = True
        yield
        self.off = False

    def gates(self):
        return None

    def step(self, ids, state, keep, mask=None):
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        ids = ids.clamp(max=255)  # rows that ended are given their end again
        new = [bytes(row[here].tolist()) for row, here in zip(ids, mask, strict=True)]
        texts = [a + b for a, b in zip([b""] * len(new) if state is None else state.texts, new, strict=True)]
        if keep == "none":
            return None, Carried(texts)
        tokens = torch.tensor([[self.answer(text)] for text in texts])
        return torch.nn.functional.one_hot(tokens, 300).float(), Carried(texts)

    def answer(self, text):
        before, _, written = text.partition(SEPARATOR.encode())
        if not written:
            self.prompts.append(before)
        short = self.off or len(before) < SEGMENT
        summary = b"" if short else self.summaries[before[0]]
        return [*summary, self.eos_id][min(len(written), len(summary))]


def texts(task, row):
    """Book -> the summaries that a row of ``overall`` names, in the order of its samples."""
    found = {}
    for line in read_summaries(Path(task.cfg.records), row["extra"]["summaries"]):
        if (line["condition"], line["length"]) == (row["condition"], row["length"]):
            found.setdefault(line["book"], []).append(line["text"])
    return found


def value(rows, metric, condition="pairwise"):
    (row,) = [r for r in rows if r["metric"] == metric and r["condition"] == condition]
    return row
