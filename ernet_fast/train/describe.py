"""What a run says about itself, on a terminal and in the files of its history."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ernet_fast.console.atomic_file import write_csv, write_json
from ernet_fast.console.tables import format_figure
from ernet_fast.data import Sample
from ernet_fast.train.config import TrainConfig
from ernet_fast.train.data_sets import RunData
from ernet_fast.train.run_folder import HISTORY


def describe_run(
    config: TrainConfig, data: RunData, network: nn.Module, device: torch.device, steps: int, epoch: int
) -> list[str]:
    """Lines about what is going to be trained on what; `steps` of an epoch, `epoch` the last one that is complete."""
    val = f"validation {_count(data.val.samples)}" if len(data.val) else "no validation"
    test = {row.patient for row in data.splits.rows if row.fold is None}
    on = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        on = torch.cuda.get_device_name(device)
    stains = "stains as they are" if data.stain is None else f"stains of {data.stain.source}"
    parameters = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    lines = [
        f"data    {config.data}: training {_count(data.train.samples)}, {val}; {len(test)} test patients",
        f"images  {config.image_size}x{config.image_size} pixels, {stains}; classes {', '.join(data.classes)}",
        f"model   {config.model}, {parameters:.2f} million parameters",
        f"on      {on}, {config.precision}; {config.epochs} epochs of {steps} steps of {config.batch_size} images",
    ]
    if config.protocol is not None:
        changed = [f"{name} {own!r} instead of {theirs!r}" for name, (theirs, own) in config.departures().items()]
        lines.insert(0, f"plan    protocol {config.protocol}{', but ' if changed else ''}{', '.join(changed)}")
    return [*lines, f"resumed after epoch {epoch}"] if epoch else lines


def _count(samples: Iterable[Sample]) -> str:
    samples = list(samples)
    return f"{len(samples)} images of {len({sample.patient for sample in samples})} patients"


def describe_epoch(record: dict[str, Any], epochs: int, improved: bool) -> str:
    """One line about an epoch."""
    val = record["val"]
    parts = [f"epoch {record['epoch']}/{epochs}", f"train loss {record['train_loss']:.4f}"]
    if record["val_loss"] is not None:
        parts.append(f"val loss {record['val_loss']:.4f}")
        parts.append(f"accuracy {format_figure(val['accuracy'])}")
        parts.append(f"AUC {'undefined' if val['auc'] is None else format_figure(val['auc'])}")
    best = "  (best)" if improved and record["val_loss"] is not None else ""
    parts.append(f"{record['train_seconds']:.1f} s, {record['data_wait']:.0%} waiting for data{best}")
    return "  ".join(parts)


def flatten(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by dots: ``{"val": {"auc": 1}}`` becomes ``{"val.auc": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def write_history(folder: Path, history: list[dict[str, Any]]) -> None:
    """Write `history.json` (nested) and `history.csv` (one line an epoch; an undefined figure is an empty field)."""
    write_json(folder / HISTORY, history)
    rows = [flatten(record) for record in history]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    write_csv(folder / "history.csv", [columns, *([row.get(column) for column in columns] for row in rows)])
