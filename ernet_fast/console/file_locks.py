"""`fcntl`; where a system has none (Windows), locks fail as on a file system without them."""

from __future__ import annotations

import errno
import sys
from typing import Any

try:
    import fcntl as _fcntl

    fcntl: Any = _fcntl
except ImportError:

    class _NoLocks:
        LOCK_SH, LOCK_EX, LOCK_NB = 1, 2, 4

        def flock(self, *_: object) -> None:
            raise OSError(errno.ENOLCK, f"there are no POSIX file locks on {sys.platform}")

        lockf = flock

    fcntl = _NoLocks()
