"""Progress with time left: bars on a terminal, at most one line a minute elsewhere, or nothing at all.

    with Progress() as progress, progress.task("reading", total=n) as bar:
        bar.advance(10)

Tasks may be opened inside tasks, and ``with progress`` inside ``with progress``: they share one display.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

LINE_EVERY = 60.0  # seconds between lines where there is no terminal


class Handle(Protocol):
    """One task's progress; a context manager that closes it."""

    def advance(self, n: int = 1) -> None: ...

    def close(self) -> None: ...

    def __enter__(self) -> Handle: ...

    def __exit__(self, *error) -> None: ...


class Progress:
    """Shows what runs and how long it will take. ``clock`` (seconds) is for tests."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic):
        self.console = console or Console(stderr=True)
        self.clock = clock
        self._depth = 0  # open ``with`` blocks and tasks
        self._bars: Bars | None = None
        self._last_line = clock()

    def task(self, description: str, total: int) -> Handle:
        """A new bar of ``total`` steps."""
        self.__enter__()
        if self._bars is None:
            return _Lines(self, description, total)
        return _Bar(self, self._bars, description, total)

    def __enter__(self) -> Progress:
        if self._depth == 0 and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            clocks = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            self._bars = Bars(*columns, *clocks, console=self.console, transient=True)
            self._bars.start()
        self._depth += 1
        return self

    def __exit__(self, *error) -> None:
        self._depth -= 1
        if self._depth == 0 and self._bars is not None:
            self._bars.stop()
            self._bars = None

    def line(self, text: Callable[[], str]) -> None:
        """Print a line unless one was printed less than a minute ago."""
        if self.clock() - self._last_line >= LINE_EVERY:
            self._last_line = self.clock()
            self.console.print(text(), markup=False, highlight=False)


class NullProgress:
    """The same, silent."""

    def task(self, description: str, total: int) -> Handle:
        return _Silent()

    def __enter__(self) -> NullProgress:
        return self

    def __exit__(self, *error) -> None: ...


class _Silent:
    def advance(self, n: int = 1) -> None: ...

    def close(self) -> None: ...

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error) -> None:
        self.close()


class _Bar(_Silent):
    def __init__(self, progress: Progress, bars: Bars, description: str, total: int):
        self.progress, self.bars, self.open = progress, bars, True
        self.id = bars.add_task(description, total=total)

    def advance(self, n: int = 1) -> None:
        self.bars.advance(self.id, n)

    def close(self) -> None:
        if self.open:
            self.open = False
            self.bars.remove_task(self.id)
            self.progress.__exit__()


class _Lines(_Silent):
    def __init__(self, progress: Progress, description: str, total: int):
        self.progress, self.description, self.total = progress, description, total
        self.started, self.done, self.open = progress.clock(), 0, True

    def advance(self, n: int = 1) -> None:
        self.done += n
        self.progress.line(self._text)

    def _text(self) -> str:
        seconds = (self.progress.clock() - self.started) * (self.total - self.done) / max(self.done, 1)
        left = f"{int(seconds) // 60}:{int(seconds) % 60:02d} left"
        return f"{self.description}: {self.done} of {self.total} ({self.done / self.total:.0%}), {left}"

    def close(self) -> None:
        if self.open:
            self.open = False
            self.progress.__exit__()
