"""Stdout and stderr that neither a reader who leaves nor an odd file name can stop."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class _Pipe:
    """A text stream; once its reader is gone (`| head`), what is written goes nowhere and the work goes on."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, if there is a reader."""
        try:
            self._stream.write(text)
        except BrokenPipeError:
            self._discard()
        return len(text)

    def flush(self) -> None:
        """Flush, if there is a reader."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._discard()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _discard(self) -> None:
        """Let what is in the buffer, which Python flushes at its end, go nowhere too."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


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
