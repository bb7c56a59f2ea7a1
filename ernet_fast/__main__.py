"""``python -m ernet_fast`` is the command ``ernet-fast``."""

from __future__ import annotations

import sys

from ernet_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
