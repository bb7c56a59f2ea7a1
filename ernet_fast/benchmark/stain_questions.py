"""How fast are images normalised?"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ernet_fast import reference
from ernet_fast.benchmark.macenko_peers import as_levels, peers_on, planar
from ernet_fast.benchmark.question import OWN, Agreement, Contestant, Question
from ernet_fast.data.synthetic import generate_patch
from ernet_fast.stain import macenko_fit, macenko_normalize

Image = NDArray[np.uint8]
SAME_WITHIN = 3  # grey levels: other rounding, other rules of percentiles; other definitions differ by a hundred
REFERENCE_WITHIN, REFERENCE_EQUAL = 1, 0.9995


def tissue(count: int, height: int, width: int, first: int = 0) -> list[Image]:
    """Synthetic H&E images [height, width, 3] uint8."""
    patches = (generate_patch("DC", size=(height, width), seed=seed) for seed in range(first, first + count))
    return [np.ascontiguousarray(patch.image.transpose(1, 2, 0)) for patch in patches]


def difference_of(result: Any, own: Any) -> tuple[int, float]:
    """The largest difference in levels, and the share of equal values."""
    difference = np.abs(as_levels(result) - as_levels(own))
    return int(difference.max(initial=0)), float((difference == 0).mean())


def same_levels(result: Any, own: Any) -> Agreement:
    """Compares two results level by level."""
    if as_levels(result).shape != as_levels(own).shape:
        return Agreement(False, f"another shape: {as_levels(result).shape}")
    largest, equal = difference_of(result, own)
    return Agreement(largest <= SAME_WITHIN, f"{100 * equal:.2f} % of the values equal, largest difference {largest}")


def macenko(name: str, title: str, images: list[Image], device: torch.device, threads: int | None) -> Question:
    """Images in a batch, to a target that is fitted beforehand."""
    target = planar(tissue(1, 300, 300, first=1000)[0])
    given = torch.stack([planar(image) for image in images])
    batch = given.to(device)

    def own() -> Any:
        return functools.partial(macenko_normalize, batch, macenko_fit(target.to(device)))

    def verify(result: Any) -> None:
        largest, equal = difference_of(result[:1], reference.macenko_normalize(given[:1], macenko_fit(target)))
        assert largest <= REFERENCE_WITHIN and equal >= REFERENCE_EQUAL, (
            f"{100 * equal:.2f} % of the values equal the float64 reference, largest difference {largest}"
        )

    others = [
        Contestant(peer.name, functools.partial(peer.normalize, batch, target.to(device)), peer.package)
        for peer in peers_on(device)
    ]
    return Question(name, title, Contestant(OWN, own), others, verify, same_levels, len(images), threads)


def stain_questions(device: torch.device) -> list[Callable[[], Question]]:
    """On a CPU single images on one thread, and a batch on all; on a GPU batches."""
    if device.type == "cpu":
        return [
            lambda: macenko("macenko-224", "Macenko, one 224 x 224 image", tissue(1, 224, 224), device, 1),
            lambda: macenko("macenko-700x460", "Macenko, one 700 x 460 image", tissue(1, 460, 700), device, 1),
            lambda: macenko("macenko-batch", "Macenko, 16 images of 224 x 224", tissue(16, 224, 224), device, None),
        ]
    return [
        lambda: macenko("macenko-224", "Macenko, 256 images of 224 x 224", tissue(8, 224, 224) * 32, device, None),
        lambda: macenko("macenko-700x460", "Macenko, 32 images of 700 x 460", tissue(4, 460, 700) * 8, device, None),
    ]
