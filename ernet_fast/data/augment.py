"""From a uint8 image to a network's input: stain normalisation, size, augmentation, scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_RESIZE_MODES = ("shorter", "squeeze", "none")


class PatchTransform:
    """uint8 [3, H, W] to float32 [3, size, size], scaled by ``(x / 255 - mean) / std``.

    In order: `normalizer` on the whole image; resize (antialiased, bilinear); crop to the size, at random in training
    and central otherwise; in training also flips and quarter turns (exact), then one resampling that rotates, shifts
    and zooms by random amounts about the centre, bilinear, with the image mirrored beyond its border. Without
    training nothing is random.

    Random numbers come from torch's default generator, which `DataLoader` seeds anew for every worker and epoch.
    Instances can be pickled if `normalizer` can.

    Args:
        size: height and width of the result in pixels, an int or a pair.
        train: augment.
        resize: ``"shorter"`` scales so that the image just covers the size, ``"squeeze"`` scales each side on its
            own, ``"none"`` leaves the scale (the image must be at least as large as the size).
        flips: flip left-right and up-down, each with probability 1/2.
        quarter_turns: rotate by a random multiple of 90 degrees (only where the size is square).
        rotation: further rotation, uniform in ± this many degrees.
        translation: shift along each side, uniform in ± this share of the side.
        zoom: scale factor, log-uniform between these two values; above 1 enlarges.
        normalizer: callable from uint8 [3, H, W] to uint8 [3, H, W], e.g. a stain normaliser.
        mean: one value a channel, in units of the 0 ... 1 range.
        std: one value a channel, in the same units.

    Raises:
        ValueError: an argument is out of range; on call, the image's shape is, or too small for ``resize="none"``.
        TypeError: on call, the image (or what `normalizer` returned) is no uint8 tensor.
    """

    def __init__(
        self,
        size: int | tuple[int, int] = 224,
        *,
        train: bool = False,
        resize: str = "shorter",
        flips: bool = True,
        quarter_turns: bool = True,
        rotation: float = 15.0,
        translation: float = 0.05,
        zoom: tuple[float, float] = (0.9, 1.1),
        normalizer: Callable[[Tensor], Tensor] | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        height, width = (size, size) if isinstance(size, int) else size if len(size) == 2 else (0, 0)
        if height < 1 or width < 1:
            raise ValueError(f"size={size!r}; expected a positive int or a pair of them")
        self.size = (height, width)
        if resize not in _RESIZE_MODES:
            raise ValueError(f"resize={resize!r}; expected one of {', '.join(map(repr, _RESIZE_MODES))}")
        if not 0 <= rotation <= 180:
            raise ValueError(f"rotation={rotation}; expected degrees between 0 and 180")
        if not 0 <= translation < 1:
            raise ValueError(f"translation={translation}; expected a share 0 <= translation < 1")
        if len(zoom) != 2 or not 0 < zoom[0] <= zoom[1] < math.inf:
            raise ValueError(f"zoom={zoom!r}; expected a pair 0 < smallest <= largest")
        if len(mean) != 3 or len(std) != 3 or not all(0 < value < math.inf for value in std):
            raise ValueError(f"mean={mean!r}, std={std!r}; expected three values each, std above 0")
        self.train, self.resize, self.flips = train, resize, flips
        self.quarter_turns = quarter_turns and self.size[0] == self.size[1]
        self.rotation, self.translation = float(rotation), float(translation)
        self.zoom = float(zoom[0]), float(zoom[1])
        self.normalizer = normalizer
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))

    def __call__(self, image: Tensor) -> Tensor:
        """Transform one uint8 image [3, H, W], which is not modified."""
        _check_image(image, "image")
        if self.normalizer is not None:
            image = self.normalizer(image)
            _check_image(image, "what normalizer returned")
        if self.resize == "none" and (image.shape[1] < self.size[0] or image.shape[2] < self.size[1]):
            raise ValueError(
                f"the image is {image.shape[1]}x{image.shape[2]} pixels, smaller than size "
                f"{self.size[0]}x{self.size[1]}; use resize='shorter' or a smaller size"
            )
        image = resized(image, self.size, self.resize)
        room = image.shape[1] - self.size[0], image.shape[2] - self.size[1]
        top, left = (int(torch.randint(r + 1, (), device="cpu")) if self.train and r else r // 2 for r in room)
        image = image[:, top : top + self.size[0], left : left + self.size[1]]
        if self.train and self.flips:
            across, down = _uniform(2)
            axes = [axis for axis, chance in ((1, down), (2, across)) if chance < 0.5]
            image = image.flip(axes) if axes else image
        if self.train and self.quarter_turns:
            image = torch.rot90(image, int(torch.randint(4, (), device="cpu")), dims=(1, 2))
        pixels = image.to(torch.float32)
        if self.train and (self.rotation or self.translation or self.zoom != (1.0, 1.0)):
            angle, right, down, zoom = _uniform(4)
            low, high = map(math.log, self.zoom)
            shift = (2 * right - 1) * self.translation, (2 * down - 1) * self.translation
            scale, rotation = math.exp(low + zoom * (high - low)), (2 * angle - 1) * self.rotation
            matrix = affine_matrix(self.size, rotation=rotation, translation=shift, zoom=scale)
            pixels = warp_affine(pixels, matrix)
        # of the image, whatever torch.set_default_device and set_default_dtype say
        std, mean = (torch.tensor(v, dtype=pixels.dtype, device=pixels.device) for v in (self.std, self.mean))
        factor, offset = std.mul(255).reciprocal_(), mean / std
        return torch.addcmul(-offset[:, None, None], pixels, factor[:, None, None]).contiguous()

    def __repr__(self) -> str:
        shown = [f"{name}={value!r}" for name, value in vars(self).items() if name not in ("mean", "std")]
        return f"PatchTransform({', '.join(shown)})"


def resized(image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Antialiased bilinear resize of [C, H, W] so that it covers `size` ("shorter"), or has it ("squeeze")."""
    height, width = image.shape[1:]
    scaled = resized_size((height, width), size, mode)
    if scaled == (height, width):
        return image
    return F.interpolate(image[None], size=scaled, mode="bilinear", antialias=True)[0]


def resized_size(image_size: tuple[int, int], size: tuple[int, int], mode: str) -> tuple[int, int]:
    """Height and width that `resized` gives an image of `image_size`."""
    height, width = image_size
    if mode == "shorter":
        factor = max(size[0] / height, size[1] / width)
        return max(size[0], round(height * factor)), max(size[1], round(width * factor))
    return image_size if mode == "none" else size


def _uniform(count: int) -> list[float]:
    """Draws from 0 to 1 of the CPU's generator."""
    draws: list[float] = torch.rand(count, dtype=torch.float32, device="cpu").tolist()
    return draws


def affine_matrix(
    size: tuple[int, int], *, rotation: float = 0.0, translation: tuple[float, float] = (0.0, 0.0), zoom: float = 1.0
) -> Tensor:
    """Matrix [2, 3] for `warp_affine`: zoom and rotate the content about the image's centre, then shift it.

    `rotation` in degrees, counter-clockwise as seen on a screen; `translation` is (right, down) in shares of width
    and height. It maps coordinates of the result to those of the input, -1 and 1 being the image's outer edges.
    """
    kind: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    shift, angle, factor = (torch.tensor([value], **kind) for value in (translation, rotation, zoom))
    return affine_matrices(size, rotation=angle, translation=shift, zoom=factor)[0]


def affine_matrices(size: tuple[int, int], *, rotation: Tensor, translation: Tensor, zoom: Tensor) -> Tensor:
    """`affine_matrix` of B images: rotation [B], translation [B, 2] and zoom [B] float64 to [B, 2, 3] float32."""
    height, width = size
    cosine, sine = torch.deg2rad(rotation).cos() / zoom, torch.deg2rad(rotation).sin() / zoom
    rows = torch.stack([cosine, -sine * height / width, sine * width / height, cosine], dim=1)
    linear = rows.view(-1, 2, 2)
    return torch.cat([linear, -(linear @ (2 * translation)[..., None])], dim=2).float()


def warp_affine(image: Tensor, matrix: Tensor) -> Tensor:
    """Resample a float image [C, H, W] bilinearly through an `affine_matrix`, mirrored beyond its border; or images
    [B, C, H, W] through matrices [B, 2, 3].
    """
    batch = image if image.ndim == 4 else image[None]
    grid = F.affine_grid(matrix.view(-1, 2, 3).to(image), list(batch.shape), align_corners=False)
    warped = F.grid_sample(batch, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return warped if image.ndim == 4 else warped[0]


def _check_image(image: Tensor, what: str) -> None:
    if not isinstance(image, Tensor) or image.dtype != torch.uint8:
        found = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"{what} is {found}; expected a torch.uint8 tensor [3, H, W]")
    if image.ndim != 3 or image.shape[0] != 3 or min(image.shape) < 1:
        raise ValueError(f"{what} has shape {tuple(image.shape)}; expected [3, H, W], not empty")
