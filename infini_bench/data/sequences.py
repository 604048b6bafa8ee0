"""Training sequences: windows of one document each, in an order that is a pure function of a cursor.

Letters: n rows asked for, N length of a sequence.
"""

from __future__ import annotations

import numpy as np

from infini_bench.data.store import TokenStore
from infini_bench.errors import UserError


class Sequences:
    """Windows of ``length`` + 1 tokens at stride ``length``: every token but a first one is a target once.

    The last window of a document is filled up with eos of weight 0. Sample ``cursor`` is window
    ``permutation[cursor % len]`` of epoch ``cursor // len``, and the permutation depends on (seed, epoch)
    only: the cursor is all there is to know to go on after an interruption.
    """

    def __init__(self, store: TokenStore, length: int, seed: int) -> None:
        """Raises ``UserError`` if no document has the two tokens that make one target."""
        if length < 1:
            raise UserError(f"a training sequence needs at least 1 token, not {length}.")
        self._store, self._length, self._seed = store, length, seed
        windows = (np.maximum(store.n_tokens, 1) - 2) // length + 1  # ceil((tokens - 1) / length)
        if not windows.sum():
            raise UserError("the documents are too short to train on: none has two tokens.")
        self._document = np.repeat(np.arange(len(store)), windows)
        first = np.cumsum(windows) - windows
        self._start = (np.arange(windows.sum()) - np.repeat(first, windows)) * length
        self._epoch: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Windows an epoch."""
        return len(self._document)

    def rows(self, cursor: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples ``cursor`` to ``cursor + n - 1``: tokens int64 (n, N+1) and weights float32 (n, N).

        Weight ``[i, t]`` is that of predicting token ``t + 1``: 1, or 0 for padding.
        """
        tokens = np.full((n, self._length + 1), self._store.eos_id, np.int64)
        weights = np.zeros((n, self._length), np.float32)
        for i in range(n):
            window = self._window(cursor + i)
            start = self._start[window]
            real = self._store.tokens(self._document[window])[start : start + self._length + 1]
            tokens[i, : len(real)] = real
            weights[i, : len(real) - 1] = 1
        return tokens, weights

    def _window(self, sample: int) -> int:
        epoch, place = divmod(sample, len(self))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, np.random.default_rng((self._seed, epoch)).permutation(len(self))
        return int(self._epoch[1][place])
