"""Which settings may change when a run is resumed."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from ernet_fast.train.config import TrainConfig

FREE = ("data", "out", "device", "num_workers", "cache")
"""Settings that do not change the result: where things lie, and what does the work."""


def check_same_run(saved: dict[str, Any], config: TrainConfig) -> None:
    """Raise ValueError if `config` would not continue the run that was saved, naming each difference."""
    now = config.to_dict()
    # settings that came after the version that saved the run had their default then
    saved = {item.name: item.default for item in fields(TrainConfig) if item.default is not MISSING} | saved
    changed = [name for name in now if name not in FREE and saved.get(name) != now[name]]
    if changed:
        listed = ", ".join(f"{name} was {saved.get(name)!r}, now {now[name]!r}" for name in changed)
        raise ValueError(
            f"the run in {config.out!r} was made with other settings: {listed}. Resume without them, or start a new "
            "--out."
        )
