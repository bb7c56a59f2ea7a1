"""``ernet-fast augment``: see what the augmentation of a training does to an image."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from ernet_fast.cli.train import add_setting
from ernet_fast.data import read_image
from ernet_fast.train import PROTOCOLS, TrainConfig

_SETTINGS = (
    "protocol", "image_size", "resize", "flips", "quarter_turns", "rotation", "translation", "zoom", "crop",
    "stain_gain", "stain_shift", "seed",
)  # fmt: skip


def add_parser(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command; its options are those of `train` that are about augmentation."""
    parser = commands.add_parser(
        "augment",
        parents=parents,
        help="show what the augmentation of a training does to an image",
        description="Write a sheet of an image as `ernet-fast train` with these settings would change it: each kind of "
        "change by itself, and all together.",
    )
    parser.add_argument("image", metavar="IMAGE", help="an image file")
    parser.add_argument("--preview", metavar="FILE", required=True, help="PNG file to write")
    parser.add_argument("--columns", type=int, metavar="N", default=6, help="examples of each kind (default: 6)")
    group = parser.add_argument_group("augmentation")
    for item in fields(TrainConfig):
        if item.name in _SETTINGS:
            add_setting(group, item)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the sheet; returns the exit code."""
    if arguments.columns < 1:
        raise ValueError(f"--columns {arguments.columns}; expected a positive number.")
    from ernet_fast.train.preview import augmentation_sheet

    given = {name: getattr(arguments, name) for name in _SETTINGS if hasattr(arguments, name)}
    preset = PROTOCOLS.get(given.get("protocol", ""), {})
    config = TrainConfig.from_dict({"data": arguments.image, "out": arguments.preview} | preset | given)
    augmentation_sheet(read_image(arguments.image), config, arguments.preview, columns=arguments.columns)
    print(f"written to {arguments.preview}")
    return 0
