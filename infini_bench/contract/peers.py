"""Two published packages as subjects; each is also an example of an adapter.

A package's faults are found through its own calls, used as its documentation says. What its constructor takes
is given with ``--arg``; defaults below are small, so that a check takes seconds.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infini_bench.contract.subject import Store, Subject

SMALL = {"num_tokens": 64, "dim": 32, "depth": 2, "heads": 2, "dim_head": 16}


class InfiniTransformerPytorch(Subject):
    """infini-transformer-pytorch: a whole segment returns memories, a part of one its keys and values.

    ignore_index: of labels that do not count, as its wrapper takes it; -1 is the package's own.
    """

    def __init__(self, segment: int = 16, ignore_index: int = -1, **settings: Any):
        super().__init__()
        from infini_transformer_pytorch import InfiniTransformer, InfiniTransformerWrapper

        settings = {**SMALL, **settings}
        self.model = InfiniTransformer(**settings)
        self.wrapper = InfiniTransformerWrapper(self.model, segment_length=segment, ignore_index=ignore_index)
        self.vocab, self.segment = settings["num_tokens"], segment

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        memories, cache, fill = state or (None, None, 0)
        outputs = []
        while x.shape[1]:
            size = 1 if fill else min(x.shape[1], self.segment)  # a segment begun is gone on with by tokens
            full = fill + size == self.segment
            y, cache, new = self.model(
                x[:, :size], past_memories=memories, cached_kv=cache, return_new_memories=full
            )
            memories, fill = (new, 0) if full else (memories, fill + size)
            outputs.append(y[:, -size:])
            x = x[:, size:]
        return torch.cat(outputs, 1), (memories, cache, fill)

    def detached(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        memories, cache, fill = state or (None, None, 0)
        assert x.shape[1] == self.segment and not fill
        y, cache, memories = self.model(
            x, past_memories=memories, return_new_memories=True, detach_memories=True
        )
        return y, (memories, cache, 0)

    def generate(self, prompt: Tensor, tokens: int) -> Tensor:
        with redirect_stderr(StringIO()):  # its progress bar
            return self.wrapper.generate(prompt=prompt, seq_len=prompt.shape[1] + tokens, temperature=0.0)

    def loss(self, ids: Tensor, kept: Tensor) -> Tensor:
        mark = self.wrapper.ignore_index  # labels are the inputs, so that it stands among the tokens, too
        return self.wrapper(ids.masked_fill(ids == mark, 0).masked_fill(~kept, mark))


class MemorizingTransformersPytorch(Subject):
    """memorizing-transformers-pytorch: a call is a segment; the state is its kNN memories, on disk."""

    differentiable = False
    call_is_segment = True
    start_token = 0

    def __init__(self, segment: int = 16, **settings: Any):
        super().__init__()
        from memorizing_transformers_pytorch import MemorizingTransformer

        local = {"memorizing_layers": 2, "max_knn_memories": 2048, "num_retrieved_memories": 4}
        settings = {**SMALL, **local, **settings}
        self.model = MemorizingTransformer(**settings)
        self.restarting = MemorizingTransformer(clear_memories_on_sos_token_id=self.start_token, **settings)
        self.restarting.load_state_dict(self.model.state_dict())
        self.vocab, self.segment, self.folders = settings["num_tokens"], segment, Folders()

    def memories(self, batch: int) -> Any:
        from memorizing_transformers_pytorch.knn_memory import KNNMemoryList

        create = KNNMemoryList.create_memories(
            batch_size=batch,
            num_memory_layers=self.model.num_memory_layers,
            memories_directory=self.folders.new(),
        )
        return create(**self.model.knn_mem_kwargs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        state = self.memories(len(x)) if state is None else state
        return self.model(x, knn_memories=state), state

    def floats(self, state: Any) -> int:
        return sum(memory.db.size for memory in state)

    def restart(self, x: Tensor, state: Any, rows: Tensor) -> Tensor:
        return self.restarting(x, knn_memories=state)

    def loss(self, ids: Tensor, kept: Tensor) -> Tensor:
        labels = ids[:, 1:].where(kept[:, 1:], self.model.pad_id)
        state, losses = self.memories(len(ids)), []
        for x, y in zip(ids[:, :-1].split(self.segment, 1), labels.split(self.segment, 1), strict=True):
            losses.append(self.model(x, knn_memories=state, labels=y))
        return torch.stack(losses).mean()

    def store(self, entries: int) -> Store:
        from memorizing_transformers_pytorch.knn_memory import KNNMemory

        size, path = 64, Path(self.folders.new()) / "memory"
        memory = KNNMemory(size, max_memories=entries, memmap_filename=str(path), multiprocessing=False)

        def write(keys: Tensor, values: Tensor) -> None:
            memory.add(torch.stack([keys, values], 1)[None])

        def read(queries: Tensor) -> Tensor:
            return memory.search(queries[None], 1)[0][0, :, 0, 1]

        return Store(size, write, read)


class Folders:
    """A new folder for every store, because two stores in one folder overwrite each other."""

    def __init__(self) -> None:
        self.root = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, self.root, ignore_errors=True)

    def new(self) -> str:
        return tempfile.mkdtemp(dir=self.root)

    def __deepcopy__(self, memo: Any) -> Folders:
        return self


PEERS: dict[str, type[Subject]] = {
    "infini-transformer-pytorch": InfiniTransformerPytorch,
    "memorizing-transformers-pytorch": MemorizingTransformersPytorch,
}
