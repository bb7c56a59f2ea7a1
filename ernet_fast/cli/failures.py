"""Errors as a user sees them: one or two lines and an exit code."""

from __future__ import annotations

_WIDTH = 400
FAILED, WRONG_INPUT = 1, 2
_INPUT_ERRORS = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)


def exit_code(error: BaseException) -> int:
    """2 for wrong usage or input, 1 for everything that went wrong while running."""
    return WRONG_INPUT if isinstance(error, _INPUT_ERRORS) else FAILED


def describe(error: BaseException) -> str:
    """At most two lines. An error that is likely a mistake of the library says so and how to see more."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.strerror}: {error.filename}"
    else:
        text = str(error).strip() or type(error).__name__
    head, *rest = [line.strip() for line in text.splitlines() if line.strip()]
    if not isinstance(error, (*_INPUT_ERRORS, OSError, ImportError, RuntimeError, ArithmeticError)):
        return f"{type(error).__name__}: {_cut(head)}\n  This looks like a fault of ernet_fast; --debug shows where."
    return f"{head}\n  {_cut(' '.join(rest))}" if rest else head


def _cut(text: str) -> str:
    return text if len(text) <= _WIDTH else text[: _WIDTH - 4] + " ..."
