"""Progress on a terminal as bars (with rich), elsewhere as plain lines; always on stderr, so that stdout stays data."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol


class Task(Protocol):
    """A piece of work of known length."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more units are done; `note` is shown beside the bar."""


class Reporter:
    """Says what is going on.

    Args:
        quiet: leave out everything but warnings.
        mute: leave out warnings too (for all processes of a run but the first).
        bars: draw progress bars; default: if stderr is a terminal and rich is installed.
    """

    def __init__(self, *, quiet: bool = False, mute: bool = False, bars: bool | None = None) -> None:
        self.quiet, self.mute = quiet or mute, mute
        self._rich: Any = None
        if not self.quiet and (sys.stderr.isatty() if bars is None else bars):
            try:
                import rich.progress
            except ImportError:  # bars are a convenience, not a need
                pass
            else:
                self._rich = rich.progress

    def line(self, text: str) -> None:
        """One line of information."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def warning(self, text: str) -> None:
        """One line that is shown even when quiet."""
        if not self.mute:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def task(self, title: str, total: int) -> AbstractContextManager[Task]:
        """A bar, or now and then a line, while `total` units are done."""
        if self._rich is not None:
            return _bar(self._rich, title, total)
        return nullcontext(_LineTask(self, title, total))


@contextmanager
def _bar(rich_progress: Any, title: str, total: int) -> Iterator[Task]:
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[note]}"),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _BarTask(progress, progress.add_task(title, total=total, note=""))


class _BarTask:
    def __init__(self, progress: Any, identity: Any) -> None:
        self._progress, self._identity = progress, identity

    def advance(self, count: int = 1, note: str = "") -> None:
        self._progress.update(self._identity, advance=count, note=note)


class _LineTask:
    """A line every ten seconds; a task that is done before that stays silent."""

    INTERVAL = 10.0

    def __init__(self, reporter: Reporter, title: str, total: int) -> None:
        self._reporter, self._title, self._total, self._done = reporter, title, total, 0
        self._next = time.monotonic() + self.INTERVAL

    def advance(self, count: int = 1, note: str = "") -> None:
        self._done += count
        if time.monotonic() >= self._next:
            self._reporter.line(f"{self._title}: {self._done}/{self._total} {note}".rstrip())
            self._next = time.monotonic() + self.INTERVAL
