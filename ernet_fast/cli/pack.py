"""``ernet-fast pack``: a data set in a few memory-mapped files, for training that does not wait for images."""

from __future__ import annotations

import argparse
from typing import Any

from ernet_fast.cli.failures import FAILED
from ernet_fast.cli.streams import print_json
from ernet_fast.console.progress import Reporter
from ernet_fast.data.listed import LAYOUTS
from ernet_fast.data.packed import PackedImages


def add_parser(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "pack",
        parents=parents,
        help="write a data set into a few memory-mapped files",
        description="Decode all images of a data set once and write them into memory-mapped files with checksums, for "
        "`ernet-fast train --packed FOLDER`, which gives what training on the image files gives.",
    )
    add = parser.add_argument
    add("--data", metavar="FOLDER", help="images, as for `ernet-fast train`")
    add("--out", metavar="FOLDER", required=True, help="folder for the packed images")
    add("--layout", choices=LAYOUTS, default="auto", help="what --data is (default: auto)")
    add("--image-size", type=int, metavar="N", help="resize for runs of this image size (default: keep the size)")
    add("--resize", choices=("shorter", "squeeze"), default="shorter", help="how (default: shorter)")
    add(
        "--stain",
        choices=("macenko", "reinhard"),
        default="macenko",
        help="how, with --stain-target (default: macenko)",
    )
    add("--stain-target", metavar="FILE", help="normalise to the stains of this image (default: do not normalise)")
    add("--stain-fit", choices=("image", "slide"), default="image", help="as for training (default: image)")
    add("--on-error", choices=("raise", "skip"), default="raise", help="unusable image: stop, or leave it out")
    add("--num-workers", type=int, metavar="N", default=0, help="processes that read images (default: 0)")
    add("--verify", action="store_true", help="compare the files of --out with their checksums, and write nothing")
    add("--json", action="store_true", help="print what was done as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Pack or verify; returns the exit code."""
    if arguments.verify:
        packed = PackedImages(arguments.out)
    else:
        if arguments.data is None:
            raise ValueError("--data is missing: the folder or list of images.")
        from ernet_fast.train.pack import pack_images

        names = ("layout", "image_size", "resize", "stain", "stain_target", "stain_fit", "on_error", "num_workers")
        options = {name: getattr(arguments, name) for name in names}
        packed = pack_images(arguments.data, arguments.out, reporter=Reporter(quiet=arguments.quiet), **options)
    damaged = packed.damaged() if arguments.verify else []
    size = sum(size for _, size, _ in packed.shards)
    if arguments.json:
        found = {"folder": str(packed.folder), "images": len(packed), "bytes": size, "shards": len(packed.shards)}
        print_json(found | {"damaged": damaged})
    else:
        print(f"{packed.folder}: {len(packed)} images in {len(packed.shards)} file(s), {size / 1e6:.1f} MB")
        for file in damaged:
            print(f"damaged: {file} differs from its checksum; pack anew")
        if not arguments.verify:
            print(f"next: ernet-fast train --data {arguments.data} --packed {packed.folder} ...")
    return FAILED if damaged else 0
