"""The parent's side of gpu_worker.py: gives it cases, one after the other, and outlives whatever happens to it."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_case import Ceilings, GpuCase
from record import Row, without_figures

PATIENCE = 30.0  # the least that a case without a limit is given
START_SECONDS = 40.0  # for Python and torch to be ready


class Deadline:
    """The end of the time that was given, on a clock that counts seconds."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.end = clock() + seconds

    def left(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.end - self.clock())

    def part(self, seconds: float) -> Deadline:
        """That of a step: so many seconds from now, and not beyond this one."""
        return Deadline(min(seconds, self.left()), self.clock)


@dataclass(frozen=True)
class Task:
    module: str
    case: GpuCase

    def without(self, status: str, detail: str) -> Row:
        return without_figures(self.module, self.case.name, status, detail[:400], **self.case.known)


class Worker:
    """A process that runs cases. It starts at once; its first answer says that it is ready."""

    def __init__(self, folder: Path, log: Path) -> None:
        from gpu_worker import serve  # imports torch

        context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, folder, log), daemon=True)
        self.process.start()
        theirs.close()

    def answer(self, limit: float, request: Any = None) -> Any:
        """What it sends, to a request if there is one; None if it died or took too long."""
        try:
            if request is not None:
                self.pipe.send(request)
            return self.pipe.recv() if self.pipe.poll(limit) else None
        except (EOFError, OSError):
            return None

    def exit_code(self) -> int | None:
        """None if it still runs."""
        self.process.join(timeout=1)
        return self.process.exitcode

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Runner:
    """Runs cases in a worker; a crash, a hang or a broken device costs one case and a new worker.

    After a hang later cases of the same kernel are left out.
    """

    def __init__(self, folder: Path, log: Path, deadline: Deadline, patience: float = PATIENCE) -> None:
        self.folder, self.log, self.deadline, self.patience = folder, log, deadline, patience
        self.worker: Worker | None = None
        self.next: Worker | None = None  # gets ready while the other one works
        self.hung: dict[str, str] = {}

    def run(self, task: Task, ceilings: Ceilings, alone: bool = False) -> list[Row]:
        """The rows of one case, or one row that says why there are none; `alone`: in a process of its own."""
        case = task.case
        if case.kernel in self.hung:
            return [task.without("skipped", f"{case.kernel} hung in {self.hung[case.kernel]}")]
        if self.deadline.left() < min(case.seconds, case.limit or case.seconds):
            return [task.without("no time left", f"needs about {case.seconds:.0f} s")]
        if self.worker is None:
            self.worker, self.next = self.next or self._new(), None
            patience = min(START_SECONDS, self.deadline.left())
            if self.worker.answer(patience) is not True:
                return [task.without("FAIL", f"no worker started; {self._end(patience)}")]
        if alone:
            self.next = self._new()
        limit = min(case.limit or max(self.patience, 5 * case.seconds), self.deadline.left())
        answer = self.worker.answer(limit, (task.module, case.name, ceilings))
        if answer is None:
            if case.kernel and self.worker.exit_code() is None:
                self.hung[case.kernel] = case.name
            return [task.without("FAIL", self._end(limit))]
        if answer.sticky or alone:
            self._close_worker()
        return [task.without("FAIL", answer.error)] if answer.error else answer.rows

    def close(self) -> None:
        self._close_worker()
        if self.next is not None:
            self.next.close()
            self.next = None

    def _new(self) -> Worker:
        return Worker(self.folder, self.log)

    def _close_worker(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None

    def _end(self, limit: float) -> str:
        """Why there was no answer; the worker is gone afterwards."""
        assert self.worker is not None
        code = self.worker.exit_code()
        self._close_worker()
        why = f"stopped after {limit:.0f} s"
        if code is not None:
            why = f"the process ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"
        return f"{why}: {last_lines(self.log)}"


def last_lines(log: Path, count: int = 3) -> str:
    """The end of a log, on one line, behind the last error that pytest explains in it."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    errors = [line.removeprefix("E").strip()[:200] for line in lines[:-count] if line.startswith("E  ")]
    end = " | ".join(line.strip() for line in lines[-count:])[-300:]
    return f"{errors[-1]} | {end}" if errors else end
