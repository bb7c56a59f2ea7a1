"""Pages that the system maps and clears anew during a call, because the C library had given their memory back.

glibc gives back blocks of 32 MiB or more as soon as they are freed, and the end of its heap when enough of it is free.
An operator that returns a new tensor then pays for every page of it again, at every call.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any, NamedTuple


class SystemWork(NamedTuple):
    """What the system did for one call."""

    page_faults: float
    milliseconds: float
    """Of processor time in the system, over all threads."""


def system_work(call: Callable[[], Any], repeats: int = 3) -> SystemWork:
    """The system's work for a call, averaged over `repeats` of them."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(repeats):
        call()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return SystemWork(
        (after.ru_minflt - before.ru_minflt) / repeats, 1e3 * (after.ru_stime - before.ru_stime) / repeats
    )
