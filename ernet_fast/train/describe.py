"""What a run says about itself on a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ernet_fast.console.tables import format_figure
from ernet_fast.data import Sample
from ernet_fast.train.config import TrainConfig
from ernet_fast.train.data_sets import RunData


def describe_run(
    config: TrainConfig, data: RunData, network: nn.Module, device: torch.device, steps: int, epoch: int
) -> list[str]:
    """Lines about what is going to be trained on what; `steps` of an epoch, `epoch` the last one that is complete."""
    val = f"validation {_count(data.val.samples)}" if len(data.val) else "no validation"
    test = {row.patient for row in data.splits.rows if row.fold is None}
    stains = "stains as they are" if data.stain is None else f"stains of {data.stain.source}"
    parameters = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    lines = [
        f"data    {config.data}: training {_count(data.train.samples)}, {val}; {len(test)} test patients",
        f"images  {config.image_size}x{config.image_size} pixels, {stains}; classes {', '.join(data.classes)}",
        f"model   {config.model}, {parameters:.2f} million parameters",
        f"on      {_device_name(device)}, {config.precision}; {config.epochs} epochs of {steps} steps of "
        f"{config.batch_size} images",
    ]
    return [*lines, f"resumed after epoch {epoch}"] if epoch else lines


def _count(samples: Iterable[Sample]) -> str:
    samples = list(samples)
    return f"{len(samples)} images of {len({sample.patient for sample in samples})} patients"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def describe_epoch(record: dict[str, Any], epochs: int, improved: bool) -> str:
    """One line about an epoch."""
    val = record["val"]
    parts = [f"epoch {record['epoch']}/{epochs}", f"train loss {record['train_loss']:.4f}"]
    if record["val_loss"] is not None:
        parts.append(f"val loss {record['val_loss']:.4f}")
        parts.append(f"accuracy {format_figure(val['accuracy'])}")
        parts.append(f"AUC {'undefined' if val['auc'] is None else format_figure(val['auc'])}")
    parts.append(f"{record['train_seconds']:.1f} s{'  (best)' if improved and record['val_loss'] is not None else ''}")
    return "  ".join(parts)
