"""Images for the Macenko benches: real H&E where the data is, else generated tissue."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from tissue import tissue, varied_tissue

SIZES = {
    "64x64": (64, 64), "96x96": (96, 96), "224x224": (224, 224), "700x460": (460, 700), "1024x1024": (1024, 1024),
}  # fmt: skip
"""Height and width by the name of a size, which is width x height."""
SETS = ("BreaKHis_tiny", "BreaKHis_mini", "slides", "torchstain")
TISSUE_LEVEL = 205  # of all channels: (I + 1) / 240 <= exp(-0.15)
LEAST_SHARE = 0.02  # of the pixels that are tissue
CROPS_OF_A_FILE = 4  # of a slide all


def data_root() -> Path | None:
    """The folder of real images: $ERNET_TEST_DATA, else ../shared/data beside the repository."""
    given = os.environ.get("ERNET_TEST_DATA")
    root = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    return root if root.is_dir() else None


def read(path: Path) -> np.ndarray:
    """An image [H, W, 3] uint8."""
    image = pytest.importorskip("PIL.Image", reason="Pillow reads the real images").open(path)
    return np.ascontiguousarray(np.array(image)[..., :3])  # the torchstain pair has an alpha channel


def large_image() -> np.ndarray:
    """An H&E image of at least 1300 x 1300 pixels."""
    root = data_root()
    if root is not None:
        return np.tile(read(root / "torchstain" / "source.png"), (3, 3, 1))
    return np.ascontiguousarray(tissue(1, 1300, 1300, channels_last=True)[0].permute(1, 2, 0).numpy())


def files_of(root: Path, name: str) -> list[Path]:
    """Every image of one of the sets of `root`, in order."""
    return sorted(path for path in (root / name).rglob("*") if path.suffix in (".png", ".jpg", ".svs"))


def crops(root: Path, size: int = 224, least_tissue: int = 1000) -> Iterator[np.ndarray]:
    """The middle of every image of BreaKHis_mini that is large enough and has enough tissue in it."""
    for path in files_of(root, "BreaKHis_mini"):
        image = read(path)
        top, left = ((length - size) // 2 for length in image.shape[:2])
        crop = np.ascontiguousarray(image[max(top, 0) : top + size, max(left, 0) : left + size])
        if crop.shape == (size, size, 3) and tissue_pixels(crop) >= least_tissue:
            yield crop


def tissue_pixels(image: np.ndarray) -> int:
    return int((image.max(axis=2) <= TISSUE_LEVEL).sum())


class Images(NamedTuple):
    """Different images [H, W, 3] uint8 of one size, and in words where they are from."""

    arrays: list[np.ndarray]
    origin: str


def different_images(size: str, count: int) -> Images:
    """`count` different images of one of SIZES.

    Crops of all sets of real images that do not overlap, taken from the sets in turn. Where these are too few, as of
    1024x1024, images that are too small are continued by their mirror images. Without the data, generated tissue.
    """
    height, width = SIZES[size]
    root = data_root()
    if root is None:
        return Images([varied_tissue(seed, height, width) for seed in range(count)], f"{count} generated")
    makers: tuple[Callable[..., Iterator[np.ndarray]], ...] = (_crops_of_set, _mirrored_of_set)
    found: list[np.ndarray] = []
    origin: list[str] = []
    for maker, suffix in zip(makers, ("", ", mirrored to fill the size"), strict=True):
        taken: Counter[str] = Counter()
        for name, image in _in_turn({name: maker(root, name, height, width) for name in SETS}):
            if len(found) == count:
                break
            found.append(image)
            taken[name] += 1
        origin += [f"{number} of {name}{suffix}" for name, number in taken.items()]
    if len(found) < count:
        raise ValueError(f"{root} has {len(found)} different images for {size}; {count} are asked for")
    return Images(found, "real: " + "; ".join(origin))


def _in_turn(sources: dict[str, Iterator[np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """One image of each source after the other, until all are used up."""
    for images in itertools.zip_longest(*sources.values()):
        yield from ((name, image) for name, image in zip(sources, images, strict=True) if image is not None)


def _shuffled(root: Path, name: str) -> list[Path]:
    """The files of a set in an order that mixes its slides, the same each time."""
    files = files_of(root, name)
    return [files[index] for index in np.random.default_rng(0).permutation(len(files))]


def _large_enough(path: Path, height: int, width: int) -> bool:
    """Known from the head of the file."""
    with pytest.importorskip("PIL.Image", reason="Pillow reads the real images").open(path) as image:
        return bool(image.height >= height and image.width >= width)


def _crops_of_set(root: Path, name: str, height: int, width: int) -> Iterator[np.ndarray]:
    """Crops that do not overlap and have tissue in them."""
    for path in _shuffled(root, name):
        if not _large_enough(path, height, width):
            continue
        image = read(path)
        corners = [(y, x) for y in range(0, image.shape[0] - height + 1, height)
                   for x in range(0, image.shape[1] - width + 1, width)]  # fmt: skip
        order = np.random.default_rng(1).permutation(len(corners))
        given = (image[y : y + height, x : x + width] for y, x in (corners[index] for index in order))
        most = len(corners) if path.suffix == ".svs" else CROPS_OF_A_FILE
        wanted = (crop for crop in given if tissue_pixels(crop) >= LEAST_SHARE * height * width)
        yield from map(np.ascontiguousarray, itertools.islice(wanted, most))


def _mirrored_of_set(root: Path, name: str, height: int, width: int) -> Iterator[np.ndarray]:
    """Images that are too small, continued by their mirror images."""
    for path in _shuffled(root, name):
        if _large_enough(path, height, width):
            continue
        image = read(path)
        if tissue_pixels(image) >= LEAST_SHARE * image.shape[0] * image.shape[1]:
            missing = [(0, max(0, size - have)) for size, have in zip((height, width), image.shape, strict=False)]
            yield np.ascontiguousarray(np.pad(image, [*missing, (0, 0)], mode="symmetric")[:height, :width])


ADVERSARIAL = ("noise", "few colours", "two colours", "gradients", "1 % tissue", "ties")


def adversarial(kind: str, seed: int, height: int = 224, width: int = 224) -> np.ndarray:
    """An image [H, W, 3] uint8 that is hard on a search for percentiles; `kind` is one of ADVERSARIAL."""
    rng = np.random.default_rng([ADVERSARIAL.index(kind), seed])
    if kind == "noise":
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind in ("few colours", "two colours"):
        colours = rng.integers(20, 200, (2 if kind == "two colours" else 12, 3), dtype=np.uint8)
        return colours[rng.integers(0, len(colours), (height, width))]
    if kind == "gradients":
        y, x = np.mgrid[0:height, 0:width] / max(height, width)
        slopes = rng.uniform(-1, 1, (3, 2))
        ramp = np.stack([a * y + b * x for a, b in slopes], axis=2)
        return np.uint8(20 + 180 * (ramp - ramp.min()) / (ramp.max() - ramp.min()))
    if kind == "1 % tissue":
        return varied_tissue(seed, height, width, tissue_share=0.01)
    return (varied_tissue(seed, height, width) // 32 * 32).astype(np.uint8)  # ties: eight levels a channel
