"""Figures in the form of the ERNet paper's Tables 1 and 2, beside those of the paper that this library holds.

Chandana Mani & Kamalakannan, ELCVIA. Held are the parameters and FLOPs of Table 1. The accuracies of Table 2 are not:
they contradict the paper's own text at 40x and 400x, and are of images of patients that were trained on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ernet_fast.console.tables import format_figure, format_interval
from ernet_fast.models.flops import PAPER_FLOPS, count_flops
from ernet_fast.train.config import TrainConfig
from ernet_fast.train.network import build_network

PAPER_PARAMETERS = {18: 11.69e6, 34: 21.80e6, 50: 25.58e6, 101: 44.82e6}
"""The parameters column of Table 1, by depth; with 1000 classes."""
CLASSES, SIZE = 1000, 224
CONTRADICTIONS = (
    "Table 1's FLOPs do not follow from the paper's architecture: 9.2 G for 101 layers stand against 15.7 G (7.86 G "
    "multiply-accumulates); its parameters do.",
    "Table 2 and the text give different accuracies at 40x and at 400x; so none is repeated here.",
    "Equation 14, of F1, is misprinted; F1 here is the harmonic mean of precision and recall.",
    "The paper splits image by image: its test patients were trained on. Figures of other patients are lower.",
)
"""Where the paper contradicts itself, or its figures are of something else."""

TABLE_1_HEADER = ("network", "parameters", "paper", "GFLOPs (2 x MAC)", "paper")
TABLE_2 = (("accuracy", "accuracy"), ("precision", "precision"), ("recall", "recall"), ("f1", "F1"), ("auc", "AUC"))


def table_1(configs: Sequence[TrainConfig]) -> list[list[str]]:
    """Rows of the form of Table 1, under `TABLE_1_HEADER`: each network as it is trained but with 1000 classes, for one
    image of 224x224. A dash stands where the paper has no such network.
    """
    rows = []
    for config in configs:
        with torch.device("meta"):
            network = build_network(replace(config, weights=None), CLASSES)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        flops = count_flops(network, (1, 3, SIZE, SIZE)).total
        depth = _paper_depth(config)
        own = f"{parameters / 1e6:.2f} M", f"{flops / 1e9:.2f}"
        paper = "-", "-"
        if depth is not None:
            paper = f"{PAPER_PARAMETERS[depth] / 1e6:.2f} M", f"{PAPER_FLOPS[depth] / 1e9:.1f}"
        rows.append([config.model, own[0], paper[0], own[1], paper[1]])
    return rows


def _paper_depth(config: TrainConfig) -> int | None:
    match = re.fullmatch(r"er_resnet(\d+)", config.model)
    depth = int(match[1]) if match and (config.block, config.base_channels) == ("standard", 64) else None
    return depth if depth in PAPER_PARAMETERS else None


def table_2_header() -> list[str]:
    """Header of `table_2`."""
    return ["magnification", "images", "patients", *(title for _, title in TABLE_2)]


def table_2(figures: dict[str, Any]) -> list[list[str]]:
    """Rows of the form of Table 2, of `Evaluation.figures()`: each magnification, figures with their intervals."""
    rows = []
    for name, group in figures["by_magnification"].items():
        row = [name, str(group["images"]), str(figures["by_patient"]["by_magnification"][name]["patients"])]
        bounds = figures["intervals"]["by_magnification"][name] if figures["intervals"] else {}
        for key, _ in TABLE_2:
            interval = bounds.get(key)
            row.append(format_figure(group[key]) + ("" if interval is None else f" ({format_interval(interval)})"))
        rows.append(row)
    return rows
