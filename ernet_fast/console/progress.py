"""Progress on a terminal as bars (with rich), elsewhere as plain lines; always on stderr, so that stdout stays data."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

INTERVAL = 10.0
"""Seconds between two lines where there is no bar."""


class Task(NamedTuple):
    """A piece of work of known length; ``advance(count=1, note="")`` says that `count` more units are done."""

    advance: Callable[..., None]


class Reporter:
    """Says what is going on: only warnings if `quiet`, nothing if `mute` (all processes of a run but the first).

    `bars`: draw progress bars; default: if stderr is a terminal and rich is installed.
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
        return nullcontext(self._lines(title, total)) if self._rich is None else _bar(self._rich, title, total)

    def _lines(self, title: str, total: int) -> Task:
        """A line every ten seconds; a task that is done before that stays silent."""
        done, begun = 0, time.monotonic()
        after = begun + INTERVAL

        def advance(count: int = 1, note: str = "") -> None:
            nonlocal done, after
            done += count
            now = time.monotonic()
            if now >= after:
                self.line(f"{title}: {done}/{total}, {pace(done, total, now - begun)} {note}".rstrip())
                after = now + INTERVAL

        return Task(advance)


def pace(done: int, total: int, seconds: float) -> str:
    """Units a second so far, and how long the others will take at that rate."""
    rate = done / max(seconds, 1e-9)
    left = round((total - done) / max(rate, 1e-9))
    hours, minutes = left // 3600, left // 60 % 60
    shown = f"{hours} h {minutes:02} min" if hours else f"{minutes} min {left % 60:02} s" if minutes else f"{left} s"
    return f"{rate:.3g}/s, {shown} left"


@contextmanager
def _bar(rich_progress: Any, title: str, total: int) -> Iterator[Task]:
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[rate]}"),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[note]}"),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(title, total=total, note="", rate="")

        def advance(count: int = 1, note: str = "") -> None:
            speed = progress.tasks[0].speed  # of the last half minute
            progress.update(bar, advance=count, note=note, rate=f"{speed:.3g}/s" if speed else "")

        yield Task(advance)
