"""Share of a training's time that steps wait for images, by where the images come from: the table of docs/training.md.

python3 bench/data_wait.py [--base-channels N] [--repeats N] [--work FOLDER]

Synthetic PNG images of BreakHis's size (700x460) are normalised and brought to 112x112 pixels. Each way trains two
epochs in turn with the others; the second counts. `--repeats 0` only draws and packs the images, into `--work`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from ernet_fast.data import BreakHis
from ernet_fast.data.synthetic import write_breakhis_like
from ernet_fast.train import Reporter, TrainConfig, fit
from ernet_fast.train.pack import pack_images

IMAGE_SIZE, BATCH, IMAGES = 112, 16, 48
WAYS: dict[str, dict[str, Any]] = {
    "image files": {},
    "image files, `--num-workers 1`": {"num_workers": 1},
    "`pack`, full size": {"packed": "full"},
    "`pack --image-size 112 --stain-target`": {"packed": "small"},
    "`--cache`": {"cache": True},
}


def prepare(work: Path) -> Path:
    """Draw and pack the images, unless they are there; returns the stain target."""
    data = work / "data"
    if not data.exists():
        write_breakhis_like(data, patients=16, patches_per_patient=10, size=(460, 700))
    target = BreakHis(data, "train").samples[0].path
    for name, options in (("full", {}), ("small", {"image_size": IMAGE_SIZE, "stain_target": target})):
        if not (work / name).exists():
            pack_images(data, work / name, reporter=Reporter(quiet=True), **options)
    return target


def epoch(work: Path, target: Path, way: dict[str, Any], base_channels: int) -> dict[str, Any]:
    """The record of the second epoch."""
    settings = dict(way)
    if "packed" in settings:
        settings["packed"] = str(work / settings["packed"])
    with tempfile.TemporaryDirectory() as out:
        config = TrainConfig(
            data=str(work / "data"), out=out, base_channels=base_channels, image_size=IMAGE_SIZE, batch_size=BATCH,
            epochs=2, max_train_images=IMAGES, max_val_images=4, stain_target=str(target), device="cpu", **settings,
        )  # fmt: skip
        return fit(config, reporter=Reporter(quiet=True)).history[-1]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-channels", type=int, default=64, help="of the ER-ResNet-18 (default: 64)")
    parser.add_argument("--repeats", type=int, default=5, help="of each way (default: 5)")
    parser.add_argument("--work", type=Path, help="folder that keeps the images (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        target = prepare(work)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
        for _ in range(options.repeats):
            for name, way in WAYS.items():
                found[name].append(epoch(work, target, way, options.base_channels))
    if options.repeats:
        print("| images from | waiting (least, most) | images a second |\n| --- | --: | --: |")
    for name, records in found.items():
        if records:
            shares = [record["data_wait"] for record in records]
            rate = IMAGES / median(record["train_seconds"] for record in records)
            print(f"| {name} | {median(shares):.1%} ({min(shares):.1%}, {max(shares):.1%}) | {rate:.0f} |")


if __name__ == "__main__":
    main()
