"""The state of a whole model: a ``transformers`` Cache whose layers hold each memory's state.

Shapes: B batch. Every tensor of a state has B as its first axis; counts are ints while all rows agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from infini_bench.errors import UserError
from infini_bench.files import atomic_write
from infini_bench.memory.base import State

BUFFERED = (
    "k",
    "v",
    "fill",
    "done",
    "seen",
    "count",
    "valid",
    "stored",
)  # of the unfinished segment, and counters


class MemoryLayer(CacheLayerMixin):
    """One layer's state; None before the first token."""

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, state: State | None = None):
        super().__init__()
        self.state = state

    def map(self, fn: Any) -> MemoryLayer:
        """A new layer with ``fn`` applied to every tensor."""
        if self.state is None:
            return MemoryLayer()
        return MemoryLayer({name: fn(x) if isinstance(x, Tensor) else x for name, x in self.state.items()})

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise RuntimeError("a memory layer is filled by its attention module")

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        raise RuntimeError("a memory layer is filled by its attention module")

    def get_seq_length(self) -> int:
        """Columns fed so far, padding included."""
        seen = 0 if self.state is None else self.state["seen"]
        assert isinstance(seen, int)
        return seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20

    def reset(self) -> None:
        self.state = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state = self.map(lambda x: x[beam_idx.to(x.device)]).state

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state = self.map(lambda x: x.repeat_interleave(repeats, 0)).state

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def crop(self, *_: Any) -> None:
        raise RuntimeError("a memory's state cannot be cropped: what was compressed cannot be taken out")

    def reset_rows(self, mask_B: Tensor) -> None:
        """Clear the rows where ``mask_B`` is True, as at a document's start; the others go on."""
        if self.state is None:
            return
        batch = len(mask_B)
        for name, x in self.state.items():
            if name == "seen":
                continue
            if not isinstance(x, Tensor):
                x = torch.full((batch,), x, device=mask_B.device)
            keep = ~mask_B.to(x.device)
            self.state[name] = x * keep.view(-1, *[1] * (x.dim() - 1))
        if "past_k" in self.state and "k" not in self.state:  # full attention: hide the row's columns
            seen = self.get_seq_length()
            ones = torch.ones(batch, seen, dtype=torch.bool, device=mask_B.device)
            counts = torch.full((batch,), seen, device=mask_B.device)
            self.state.setdefault("valid", ones & ~mask_B[:, None])
            self.state.setdefault("count", counts * ~mask_B)


def stacked(states: list[State]) -> State:
    """The states of one layer as one batch. Where documents differ in length, counts become (B,) tensors.

    What grows with the document is padded: on the left, but an AutoCompressor's ``memory`` on the right.
    """
    sizes = [
        next(len(x) for x in state.values() if isinstance(x, Tensor) and x.dim() > 1) for state in states
    ]
    parts = {name: [state[name] for state in states] for name in states[0] if name not in ("valid", "count")}
    tensors = {name: xs for name, xs in parts.items() if isinstance(xs[0], Tensor) and xs[0].dim() > 1}
    widths = {name: [x.shape[1] for x in xs] for name, xs in tensors.items()}
    counts = {name: xs for name, xs in parts.items() if name not in (*tensors, "seen")}
    flat = [*counts.values(), *widths.values()]
    even = all(isinstance(x, int) and x == xs[0] for xs in flat for x in xs)
    out: State = {}
    for name, xs in tensors.items():
        most, right = max(widths[name]), name == "memory"
        pads = [
            (0, 0) * (x.dim() - 2) + ((0, most - x.shape[1]) if right else (most - x.shape[1], 0)) for x in xs
        ]
        out[name] = torch.cat([F.pad(x, pad) for x, pad in zip(xs, pads, strict=True)])
    device = next(iter(out.values())).device
    for name, xs in counts.items():
        each = [torch.as_tensor(x, device=device).expand(n) for x, n in zip(xs, sizes, strict=True)]
        out[name] = xs[0] if even else torch.cat(each)
    out["seen"] = max(parts["seen"])
    if not even and "past_k" in out and "k" not in out:  # full attention: each row's columns, at the right
        out["seen"] = most = max(widths["past_k"])
        live = [state.get("count", state["seen"]) for state in states]
        rows = zip(live, sizes, strict=True)
        out["count"] = torch.cat([torch.as_tensor(n, device=device).expand(size) for n, size in rows])
        out["valid"] = torch.arange(most, device=device) >= most - out["count"][:, None]
    return out


def spread(state: State | None, segment: int) -> State:
    """See `MemoryCache.spread`."""
    assert state is not None
    k, v = (F.pad(state[name], (0, 0, 0, 0, 0, segment - state[name].shape[1])) for name in ("k", "v"))
    zero = torch.zeros(len(k), dtype=torch.long, device=k.device)
    return {**state, "k": k, "v": v, "fill": zero + state["fill"], "done": zero + state["done"]}


class MemoryCache(Cache):
    """The state of a model between two calls. Pass it as ``past_key_values``, or to ``model.step``."""

    layers: list[MemoryLayer]  # type: ignore[assignment]

    def __init__(self, layers: list[MemoryLayer]):
        super().__init__(layers=list(layers))

    @classmethod
    def empty(cls, layers: int) -> MemoryCache:
        """The state at the start of a document."""
        return cls([MemoryLayer() for _ in range(layers)])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns fed so far. The last layer knows: of a model that runs segment by segment it is the
        model's own, behind layers that hold one segment's keys and values."""
        return self.layers[-1].get_seq_length() if self.layers else 0

    @property
    def batch(self) -> int | None:
        """Rows of the state; None while it holds no tensor, and so fits any batch."""
        return next(
            (len(x) for layer in self.layers for x in (layer.state or {}).values() if isinstance(x, Tensor)),
            None,
        )

    def copy(self) -> MemoryCache:
        """The same tensors in new layers: later calls replace states, they never write into them."""
        return MemoryCache([layer.map(lambda x: x) for layer in self.layers])

    def clone(self) -> MemoryCache:
        """The same state in tensors of its own."""
        return MemoryCache([layer.map(torch.clone) for layer in self.layers])

    def detach(self) -> MemoryCache:
        """The same state, without gradients."""
        return MemoryCache([layer.map(lambda x: x.detach()) for layer in self.layers])

    def select_rows(self, index: Tensor) -> MemoryCache:
        """The rows of ``index`` (int64), which may repeat."""
        return MemoryCache([layer.map(lambda x: x[index.to(x.device)]) for layer in self.layers])

    def write_rows(self, index: Tensor, other: MemoryCache) -> None:
        """Write the rows of ``other`` in the places ``index`` (int64), in place; counts of all rows stay."""
        for own, new in zip(self.layers, other.layers, strict=True):
            for name, x in (own.state or {}).items():
                if isinstance(x, Tensor):
                    x.index_copy_(0, index, (new.state or {})[name])

    @classmethod
    def stack(cls, states: Sequence[MemoryCache | None]) -> MemoryCache | None:
        """One batch of states of documents of any length, each at a segment's border; None = at the start.

        The given ones stay as they are. None if no document has begun.
        """
        known = next((state for state in states if state is not None), None)
        if known is None:
            return None
        blank = known.copy()
        first = next(x for x in known.tensors().values() if x.dim())
        blank.reset_rows(torch.ones(len(first), dtype=torch.bool, device=first.device))
        blank = blank.select_rows(torch.zeros(1, dtype=torch.long))
        rows = [blank if state is None else state for state in states]
        layers = zip(*([layer.state for layer in row.layers] for row in rows), strict=True)
        return cls([MemoryLayer(stacked(list(each)) if each[0] is not None else None) for each in layers])

    def spread(self, segment: int) -> MemoryCache:
        """The same state in the form that steps of one token keep: the unfinished segment with room for all
        its ``segment`` tokens, and how many are there as a (B,) tensor."""
        return MemoryCache([MemoryLayer(spread(layer.state, segment)) for layer in self.layers])

    def reset_rows(self, mask: Tensor) -> None:
        """Clear in place the rows where ``mask`` (B,) bool is True."""
        for layer in self.layers:
            layer.reset_rows(mask)

    def tensors(self) -> dict[str, Tensor]:
        """Flat, named ``<layer>.<name>``; counts become 0-dim int64 CPU tensors. Empty before a token."""
        return {
            f"{i}.{name}": x if isinstance(x, Tensor) else torch.tensor(x)
            for i, layer in enumerate(self.layers)
            for name, x in (layer.state or {}).items()
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], layers: int | None = None) -> MemoryCache:
        """The inverse of ``tensors``; ``layers`` only matters for an empty state."""
        count = 1 + max((int(name.split(".")[0]) for name in tensors), default=(layers or 0) - 1)
        cache = cls.empty(count)
        for name, x in tensors.items():
            index, key = name.split(".", 1)
            layer = cache.layers[int(index)]
            layer.state = {**(layer.state or {}), key: x if x.dim() else int(x)}
        return cache

    def floats(self) -> int:
        """Floats that cross a segment boundary, counted on live tensors (without the unfinished segment)."""
        states = [layer.state or {} for layer in self.layers]
        if states and "fill" in states[-1] and "k" not in states[-1]:  # the others hold an unfinished segment
            states = states[-1:]
        return sum(x.numel() for state in states for name, x in state.items() if name not in BUFFERED)

    def bytes(self) -> int:
        """Bytes of everything that the state holds, the unfinished segment included."""
        return sum(x.numel() * x.element_size() for x in self.tensors().values() if x.dim())

    def save(self, path: Path, about: dict[str, str] | None = None) -> None:
        """One safetensors file. about: what the file says of itself, see `about`."""
        atomic_write(path, save({name: x.detach().contiguous() for name, x in self.tensors().items()}, about))

    @staticmethod
    def about(path: Path) -> dict[str, str]:
        """What was said of a state when it was saved. Raises UserError as `load`."""
        with _reading(path), safe_open(path, "pt") as file:
            return file.metadata() or {}

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> MemoryCache:
        """The state of a file written by ``save``. Raises UserError when it is missing or damaged."""
        with _reading(path), safe_open(path, "pt", device=device) as file:
            names = file.keys()
            return cls.from_tensors({name: file.get_tensor(name) for name in names})


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"The memory state {path} cannot be read: {error}.") from error
