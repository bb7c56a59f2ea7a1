"""The parent's side of gpu_worker.py: gives it cases, one after the other, and outlives whatever happens to it."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from gpu_case import Ceilings, GpuCase
from record import Row, without_figures

PATIENCE = 30.0  # the least that a case is given
START_SECONDS = 60.0  # for Python and torch to be ready


class Deadline:
    """The end of the time that was given."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.end - time.monotonic())

    def share(self, share: float, most: float) -> float:
        """Seconds for a step: a share of what is left, `most` at most."""
        return min(most, share * self.left())


@dataclass(frozen=True)
class Task:
    module: str
    case: GpuCase

    def without(self, status: str, detail: str) -> Row:
        return without_figures(self.module, self.case.name, status, detail[:400], **self.case.known)


class Runner:
    """Runs cases in a worker; a crash, a hang or a broken device costs one case and a new worker."""

    def __init__(self, folder: Path, log: Path, deadline: Deadline, patience: float = PATIENCE) -> None:
        self.folder, self.log, self.deadline, self.patience = folder, log, deadline, patience
        self.process: BaseProcess | None = None
        self.pipe: Connection

    def run(self, task: Task, ceilings: Ceilings) -> list[Row]:
        """The rows of one case, or one row that says why there are none."""
        seconds = task.case.seconds
        if self.deadline.left() < seconds:
            return [task.without("no time left", f"needs about {seconds:.0f} s")]
        if self.process is None and not self._start():
            return [task.without("FAIL", f"no worker started; {self._end_of(START_SECONDS)}")]
        limit = min(max(self.patience, 5 * seconds), self.deadline.left())
        answer = self._answer(limit, (task.module, task.case.name, ceilings))
        if answer is None:
            return [task.without("FAIL", self._end_of(limit))]
        if answer.sticky:
            self.close()
        return [task.without("FAIL", answer.error)] if answer.error else answer.rows

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None

    def _start(self) -> bool:
        """Start a worker; False if it did not get ready."""
        from gpu_worker import serve  # imports torch

        context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, self.folder, self.log), daemon=True)
        self.process.start()
        theirs.close()
        return self._answer(START_SECONDS) is True

    def _answer(self, limit: float, request: Any = None) -> Any:
        """What the worker sends, to a request if there is one; None if it died or took too long."""
        try:
            if request is not None:
                self.pipe.send(request)
            return self.pipe.recv() if self.pipe.poll(limit) else None
        except (EOFError, OSError):
            return None

    def _end_of(self, limit: float) -> str:
        """Why there was no answer; the worker is gone afterwards."""
        assert self.process is not None
        self.process.join(timeout=2)
        code = self.process.exitcode
        self.close()
        why = f"stopped after {limit:.0f} s"
        if code is not None:
            why = f"the process ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"
        return f"{why}: {last_lines(self.log)}"


def last_lines(log: Path, count: int = 3) -> str:
    """The end of a log, on one line."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return " | ".join(line.strip() for line in lines[-count:])[-300:]
