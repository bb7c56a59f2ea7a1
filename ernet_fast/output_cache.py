"""The memory that the CPU operators, ER shortcuts and Macenko alike, keep: that of large freed outputs, for the next.

The first touch of fresh memory costs a page fault every 4 KiB, which takes longer than the pass that writes a map. At
most 2 GiB are kept, or what the environment variable `ERNET_KEEP_MB` says (0 keeps none); and kept and live outputs
together exceed the most that live outputs took by a quarter, or by a 32nd of that limit, at most. docs/memory.md says
what is kept and what is not.
"""

from __future__ import annotations

from dataclasses import dataclass

from ernet_fast import _backend


@dataclass(frozen=True)
class KeptMemory:
    """State of the kept memory of this process."""

    kept_bytes: int  # kept at this moment
    limit_bytes: int  # that may be kept
    reused: int  # outputs so far that used kept memory again
    fresh: int  # outputs so far for which the system was asked for memory


def kept_memory() -> KeptMemory:
    """What is kept now; all zero where the compiled operators are not there."""
    library = _backend.extension()
    return KeptMemory(0, 0, 0, 0) if library is None else KeptMemory(**library.map_buffers())


def set_kept_memory_limit(limit_bytes: int) -> None:
    """Keep at most `limit_bytes`; what exceeds them goes back to the system at once. 0 keeps none.

    Raises:
        ValueError: a negative number.
    """
    if limit_bytes < 0:
        raise ValueError(f"limit_bytes is {limit_bytes}; expected a number of bytes >= 0, 0 to keep none.")
    library = _backend.extension()
    if library is not None:
        library.set_map_buffer_limit(limit_bytes)


def release_kept_memory() -> None:
    """Give all kept memory back to the system, and forget how much was live; the limit stays."""
    limit = kept_memory().limit_bytes
    set_kept_memory_limit(0)
    set_kept_memory_limit(limit)
