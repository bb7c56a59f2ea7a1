"""Commands whose output is data print it as JSON, and nothing else, on stdout."""

from __future__ import annotations

import json
from typing import Any


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=1, allow_nan=False))
