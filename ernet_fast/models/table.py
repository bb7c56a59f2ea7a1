"""The table of the five networks: parameters and operations, beside the figures of the ERNet paper."""

from __future__ import annotations

import torch

from ernet_fast.models.depths import FAMILY, LAYERS
from ernet_fast.models.flops import count_flops
from ernet_fast.models.resnet import ERResNet

PAPER_FLOPS = {18: 3.4e9, 34: 6.2e9, 50: 7.8e9, 101: 9.2e9}
"""The FLOPs column of the ERNet paper (Chandana Mani & Kamalakannan, ELCVIA), Table 1."""


def architecture_table(num_classes: int = 1000, image_size: int = 224) -> str:
    """Markdown: parameters and floating-point operations (multiply-accumulates x 2) of one image, network by network.

    Args:
        num_classes: outputs of the classifiers.
        image_size: height and width of the image, pixels.
    """
    rows = [
        "| network | block | blocks a stage | parameters | of them ER weights | GFLOPs (2 x MAC) | of them ER sums "
        "| paper, GFLOPs |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for block in ("standard", "er133"):
        for depth, layers in LAYERS.items():
            with torch.device("meta"):
                model = ERResNet(FAMILY[depth], layers, num_classes, block=block)
            flops = count_flops(model, (1, 3, image_size, image_size))
            sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
            weights = sum(size for name, size in sizes.items() if ".shortcut." in name)
            paper = f"{PAPER_FLOPS[depth] / 1e9:.1f}" if block == "standard" and depth in PAPER_FLOPS else "–"
            rows.append(
                f"| `er_resnet{depth}` | {block} | {', '.join(map(str, layers))} | {sum(sizes.values()):,} "
                f"| {weights:,} | {flops.total / 1e9:.2f} | {flops.er_shortcut / 1e9:.3f} | {paper} |"
            )
    return "\n".join(rows)
