"""The records of all epochs as CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from ernet_fast.console.atomic_file import write_text


def flatten(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by dots: ``{"val": {"auc": 1}}`` becomes ``{"val.auc": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def write_history(folder: Path, history: list[dict[str, Any]]) -> None:
    """Write `history.json` (nested) and `history.csv` (one line an epoch; an undefined figure is an empty field)."""
    write_text(folder / "history.json", json.dumps(history, indent=1, allow_nan=False) + "\n")
    rows = [flatten(record) for record in history]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "history.csv", text.getvalue())
