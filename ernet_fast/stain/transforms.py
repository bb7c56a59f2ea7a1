"""Normalisation and augmentation as data set transforms: plain callables, and torchvision v2 transforms.

torchvision is imported by `as_v2` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ernet_fast.stain.augment import check_widths, macenko_augment
from ernet_fast.stain.options import check_policy


class StainNormalize:
    """An image with the stains or the colours of a target. Picklable, so it runs in the workers of a DataLoader.

    Args:
        normalizer: a fitted MacenkoNormalizer or ReinhardNormalizer.

    Raises:
        TypeError: `normalizer` cannot be called.
    """

    def __init__(self, normalizer: Callable[[Any], Any]) -> None:
        if not callable(normalizer):
            raise TypeError(f"normalizer is a {type(normalizer).__name__}; expected a MacenkoNormalizer.")
        self.normalizer = normalizer

    def __call__(self, image: Any) -> Any:
        """The normalised image, in the form that the normaliser gives."""
        with torch.no_grad():
            return self.normalizer(image)

    def __repr__(self) -> str:
        """The normaliser in its name."""
        return f"{type(self).__name__}({self.normalizer!r})"


class StainAugment:
    """`macenko_augment` of an image, with probability `p`. Picklable, so it runs in the workers of a DataLoader.

    Numbers come from torch's default generator, which a DataLoader seeds anew in each worker and epoch.

    Args:
        p: how often to change an image, in [0, 1].
        gain: as in `macenko_augment`.
        shift: as in `macenko_augment`.
        options: further arguments of `macenko_augment`, e.g. `source`, `range`, `layout` or `on_degenerate`.

    Raises:
        TypeError, ValueError: an argument that makes no sense.
    """

    def __init__(self, p: float = 1.0, gain: float = 0.2, shift: float = 0.2, **options: Any) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p={p!r}; expected a probability in [0, 1].")
        check_widths(gain, shift)
        refused = set(options) & {"generator", "return_status"}
        if refused:
            raise TypeError(f"{', '.join(sorted(refused))}: not an option of a transform; call macenko_augment.")
        check_policy(options.get("on_degenerate", "reference"))
        self.p, self.gain, self.shift, self.options = p, gain, shift, options

    def __call__(self, image: Any) -> Any:
        """The image, changed or not."""
        if self.p < 1 and float(torch.rand((), device="cpu")) >= self.p:
            return image
        with torch.no_grad():
            return macenko_augment(image, gain=self.gain, shift=self.shift, **self.options)

    def __repr__(self) -> str:
        """Its arguments."""
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"{type(self).__name__}(p={self.p}, gain={self.gain}, shift={self.shift}{options})"


def as_v2(transform: Callable[[Any], Any]) -> Any:
    """`transform` as a torchvision.transforms.v2.Transform, which finds the images in samples of any structure.

    Images are `tv_tensors.Image`, PIL images (given back as PIL images, in RGB) and, by torchvision's
    rule, the first plain tensor of a sample without either; boxes, masks and labels pass through.

    Args:
        transform: StainNormalize, StainAugment or another callable of an image [3, H, W].

    Raises:
        ImportError: torchvision, or torchvision before 0.16, does not import here. `transform` itself works in its
            place where samples are images.
    """
    try:
        from ernet_fast.stain.v2_transform import V2StainTransform
    except (ImportError, RuntimeError) as error:  # a torchvision built for another torch raises RuntimeError
        raise ImportError(
            f"torchvision.transforms.v2 does not import here ({error}). Install the torchvision that belongs to torch "
            f"{torch.__version__}, or use the transform as it is: it is a plain callable."
        ) from error
    return V2StainTransform(transform)
