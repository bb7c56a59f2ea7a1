"""Signals by which a scheduler asks a run to end: SIGTERM, and SLURM's SIGUSR1."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = tuple(signal.Signals[name] for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))  # Windows has one


class TrainingStoppedError(RuntimeError):
    """A signal stopped the run; a checkpoint was written, and the run can be resumed from that very step."""


class StopSignals:
    """While entered, the first of `SIGNALS` is noted in `received`, its name, instead of ending the process.

    A second signal does what it did before. Without effect outside the main thread, where Python delivers no signals.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
