"""How fast are images normalised?"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ernet_fast import reference
from ernet_fast.benchmark.macenko_peers import MacenkoPeer, as_levels, peers_on, planar
from ernet_fast.benchmark.question import OWN, Agreement, Contestant, Question
from ernet_fast.benchmark.users_images import UsersImages
from ernet_fast.data.layout import MAGNIFICATIONS, SUBTYPES
from ernet_fast.data.synthetic import generate_patch
from ernet_fast.stain import macenko_fit, macenko_normalize

Image = NDArray[np.uint8]
SAME_WITHIN = 3  # grey levels: other rounding, other rules of percentiles; other definitions differ by a hundred
REFERENCE_WITHIN, REFERENCE_EQUAL = 1, 0.9995
COUNTS = {(224, 224): 64, (460, 700): 16}
"""How many different images of each height and width."""


def tissue(count: int, height: int, width: int, first: int = 0) -> list[Image]:
    """Different synthetic H&E images [height, width, 3] uint8: tumour types in turn, each with stains of its own."""
    every_kind = itertools.cycle(itertools.product(MAGNIFICATIONS, SUBTYPES))
    kinds = itertools.islice(every_kind, first, first + count)
    patches = (
        generate_patch(subtype, magnification=magnification, size=(height, width), seed=first + number)
        for number, (magnification, subtype) in enumerate(kinds)
    )
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


def macenko(
    name: str, title: str, images: list[Image], device: torch.device, threads: int | None, each: bool = False
) -> Question:
    """Images in a batch, or (`each`) one at a time, to a target that is fitted beforehand."""
    target = planar(tissue(1, 300, 300, first=1000)[0])
    batches = [planar(image)[None] for image in images]
    batches = batches if each else [torch.cat(batches)]
    given = [batch.to(device) for batch in batches]

    def prepared(calls: list[Callable[[], Any]]) -> Any:
        return calls if each else calls[0]

    def own() -> Any:
        fitted = macenko_fit(target.to(device))
        return prepared([functools.partial(macenko_normalize, batch, fitted) for batch in given])

    def verify(result: Any) -> None:
        fitted = macenko_fit(target)
        compared = zip(result if each else [result], batches, strict=True)
        found = [difference_of(one[:1], reference.macenko_normalize(batch[:1], fitted)) for one, batch in compared]
        largest = max(difference for difference, _ in found)
        equal = sum(share for _, share in found) / len(found)  # one colour of a background may be 0.1 % of its image
        assert largest <= REFERENCE_WITHIN and equal >= REFERENCE_EQUAL, (
            f"{100 * equal:.2f} % of the values equal the float64 reference, largest difference {largest}"
        )

    def by(peer: MacenkoPeer) -> Any:
        return prepared(peer.normalize_each(given, target.to(device)))

    others = [Contestant(peer.name, functools.partial(by, peer), peer.package) for peer in peers_on(device)]
    items = 1 if each else len(images)
    return Question(name, title, Contestant(OWN, own), others, verify, same_levels, items, threads)


def stain_questions(device: torch.device, folder: str | None = None) -> list[Callable[[], Question]]:
    """On a CPU single images on one thread, and a batch on all; on a GPU batches. The folder has images of the user's.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        ValueError: no image of the folder is large enough and has tissue.
    """
    source = None if folder is None else UsersImages(folder)
    sizes = [size for size in COUNTS if source is None or source.of_size(*size, COUNTS[size])]
    if source is not None and not sizes:
        raise ValueError(source.none_fits(min(COUNTS)))
    return [question for size in sizes for question in _questions_of(size, device, source)]


@functools.lru_cache(maxsize=1)
def _generated(height: int, width: int, count: int) -> list[Image]:
    return tissue(count, height, width)


def _questions_of(
    size: tuple[int, int], device: torch.device, source: UsersImages | None
) -> list[Callable[[], Question]]:
    height, width = size
    shown, name = f"{width} x {height}", "macenko-224" if size == (224, 224) else f"macenko-{width}x{height}"
    kind = "generated images" if source is None else "of your images"

    def images() -> list[Image]:
        count = COUNTS[size]
        return _generated(height, width, count) if source is None else source.of_size(height, width, count)

    def batch(count: int) -> list[Image]:
        found = images()
        return [found[number % len(found)] for number in range(count)]

    def one_at_a_time() -> Question:
        found = images()
        return macenko(name, f"Macenko, {len(found)} {kind} of {shown}, one at a time", found, device, 1, each=True)

    if device.type != "cpu":
        count = 256 if size == (224, 224) else 32
        return [lambda: macenko(name, f"Macenko, {count} images of {shown}", batch(count), device, None)]
    if size != (224, 224):
        return [one_at_a_time]
    in_batch = lambda: macenko("macenko-batch", f"Macenko, 16 images of {shown}", batch(16), device, None)  # noqa: E731
    return [one_at_a_time, in_batch]
