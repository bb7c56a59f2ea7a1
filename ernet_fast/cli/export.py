"""``ernet-fast export``: the network of a checkpoint as ONNX, torch.export or TorchScript."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ernet_fast.cli.streams import print_json
from ernet_fast.models.export import FORMATS
from ernet_fast.train.export import export_checkpoint


def add_parser(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "export",
        parents=parents,
        help="write a checkpoint's network for other runtimes",
        description="Write the network of a checkpoint of `ernet-fast train`, folded for inference, as a program of "
        "standard operators, and compare its logits with the network's on batches of one and three.",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="folder of a run (its best.pt), or a file best.pt or last.pt")
    add("--format", choices=tuple(FORMATS), required=True, help="onnx, pt2 (torch.export) or torchscript (a trace)")
    add("--out", metavar="FILE", help="default: beside the checkpoint, with the format's ending")
    add(
        "--with-preprocessing",
        action="store_true",
        help="take uint8 images, and resize, crop and scale them in the program as in training",
    )
    size = "size of these images; default: the training's"
    add("--input-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help=size)
    add("--json", action="store_true", help="print what was written as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Export; returns the exit code."""
    size = None if arguments.input_size is None else (arguments.input_size[0], arguments.input_size[1])
    exported = export_checkpoint(
        arguments.checkpoint,
        arguments.out,
        format=arguments.format,
        preprocessing=arguments.with_preprocessing,
        input_size=size,
    )
    if exported.stain_target is not None:
        print(
            "warning: stain normalisation is not part of the file: normalise images to the stains of the checkpoint "
            f"({exported.stain_target}) first",
            file=sys.stderr,
        )
    if arguments.json:
        print_json({**exported._asdict(), "file": str(exported.file), "checkpoint": str(exported.checkpoint)})
        return 0
    compared = "not run: onnxruntime is not installed"
    if exported.difference is not None:
        compared = f"logits within {exported.difference:.1e} of the network's, relative"
    print(f"{exported.file}: {exported.format}, epoch {exported.epoch}, {compared}")
    print(f"images {exported.input}; logits of {', '.join(exported.classes)}")
    return 0
