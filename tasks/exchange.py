"""The control "another document's memory", for many documents side by side.

Letters: n documents, N segment length, R rows of a call, T tokens of a document.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from infini_bench.progress import Handle
from infini_bench.stream import State, feed, stream_losses

Segment = tuple[int, int]  # document, number of its segment


class Exchange:
    """Losses of every document, each of its segments from the state of the next document, cyclically.

    Donors are read in lockstep, up to ``rows`` at a time, and each segment of their recipients is scored from
    the state that its donor has there. Where a donor has no further whole segment, all that is left of its
    recipient starts from the donor's last state, so that those segments are rows of a batch, too. Padding
    behind a document's end fills calls up; what is causal does not see it.
    """

    def __init__(self, model, documents: list[np.ndarray], rows: int, progress: Handle | None) -> None:
        self.model, self.documents, self.rows, self.progress = model, documents, rows, progress
        self.segment = model.segment
        self.losses = [np.empty(len(ids) - 1, np.float32) for ids in documents]

    def run(self) -> list[np.ndarray]:
        # donors with about as far to go share a group, so that few rows run alone
        order = sorted(range(len(self.documents)), key=self.shared, reverse=True)
        for first in range(0, len(order), self.rows):
            self.lockstep(order[first : first + self.rows])
        return self.losses

    def recipient(self, donor: int) -> int:
        return (donor - 1) % len(self.documents)

    def segments(self, document: int) -> int:
        """Segments in which the document has a target."""
        return -(-len(self.losses[document]) // self.segment)

    def shared(self, donor: int) -> int:
        """Whole segments of the donor that its recipient can be scored behind."""
        return min(len(self.documents[donor]) // self.segment, self.segments(self.recipient(donor)) - 1)

    def lockstep(self, donors: list[int]) -> None:
        """Donors in order of ``shared``, the largest first: those that are through are at the end."""
        state = None
        for number in range(self.shared(donors[0]) + 1):
            self.score([(self.recipient(d), number) for d in donors], state)
            going = [d for d in donors if self.shared(d) > number]
            for place, donor in enumerate(donors[len(going) :], len(going)):
                self.finish(donor, number, rows_of(state, [place]))
            if len(going) < len(donors):
                donors, state = going, rows_of(state, range(len(going)))
            if donors:
                span = slice(number * self.segment, (number + 1) * self.segment)
                state = feed(self.model, [np.stack([self.documents[d][span] for d in donors])], state)

    def finish(self, donor: int, number: int, state: State) -> None:
        """What its recipient has behind segment ``number``, from the donor's last state."""
        document = self.recipient(donor)
        rest = [(document, n) for n in range(number + 1, self.segments(document))]
        for first in range(0, len(rest), self.rows):
            part = rest[first : first + self.rows]
            self.score(part, rows_of(state, [0] * len(part)))

    def score(self, rows: list[Segment], state: State) -> None:
        """Losses of one segment a row, from the state of the same row."""
        pieces = [self.documents[d][n * self.segment :][: self.segment + 1] for d, n in rows]
        ids = np.zeros((len(rows), max(map(len, pieces))), pieces[0].dtype)
        for target, piece in zip(ids, pieces, strict=True):
            target[: len(piece)] = piece
        losses, _ = stream_losses(self.model, ids, self.segment, state)
        for (d, n), loss, piece in zip(rows, losses, pieces, strict=True):
            self.losses[d][n * self.segment :][: len(piece) - 1] = loss[: len(piece) - 1]
            if self.progress is not None:
                self.progress.advance(len(piece) - 1)


def rows_of(state: State, index: Iterable[int]) -> State:
    """The state's rows ``index``, which may repeat; of a document's start, still that."""
    return None if state is None else state.select_rows(torch.tensor([*index], dtype=torch.long))


def other_memory_losses(
    model, documents: list[np.ndarray], rows: int, progress: Handle | None = None
) -> list[np.ndarray]:
    """Losses (T - 1,) float32 of documents (T,), see `Exchange`. rows: documents or segments a call."""
    return Exchange(model, documents, rows, progress).run()
