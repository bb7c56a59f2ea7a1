"""Stdout and stderr that neither a reader who leaves nor an odd file name can stop; data on stdout as JSON."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from typing import Any


def print_json(value: Any) -> None:
    """One JSON document on stdout, where a command whose output is data prints nothing else."""
    print(json.dumps(value, indent=1, allow_nan=False))


class _Pipe:
    """A text stream; once its reader is gone (`| head`), what is written goes nowhere and the work goes on."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, if there is a reader."""
        self._if_read(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush, if there is a reader."""
        self._if_read(self._stream.flush)

    def _if_read(self, function: Any, *arguments: Any) -> None:
        try:
            function(*arguments)
        except BrokenPipeError:  # what is in the buffer, which Python flushes at its end, is to go nowhere too
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lenient_streams() -> Iterator[None]:
    """Within the block stdout and stderr survive their readers, and names that are not UTF-8 are printed escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    streams = [_Pipe(stream or io.StringIO()) for stream in (sys.stdout, sys.stderr)]  # None: closed by the caller
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        yield
        for stream in streams:
            stream.flush()
