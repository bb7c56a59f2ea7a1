"""CIE L*a*b* (D65) of sRGB images and back, as torch operations on [B, 3, ...]; differentiable."""

from __future__ import annotations

from typing import Any

import torch

# linear sRGB to XYZ, and the XYZ of white
RGB_TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
WHITE = (0.95047, 1.0, 1.08883)
TINY = 1e-12


def linear_of_rgb(rgb: torch.Tensor) -> torch.Tensor:
    """Light intensities of sRGB values in 0..1."""
    # Powers are taken of positive values only, so that the gradient of the other branch stays finite.
    return torch.where(rgb > 0.04045, ((rgb.clamp(min=0) + 0.055) / 1.055) ** 2.4, rgb / 12.92)


def linear_of_bytes(levels: torch.Tensor) -> torch.Tensor:
    """`linear_of_rgb` of levels / 255, uint8."""
    table = linear_of_rgb(torch.arange(256, dtype=torch.float64, device=levels.device) / 255)
    return table.index_select(0, levels.flatten().int()).reshape(levels.shape)


def lab_of_linear(linear: torch.Tensor) -> torch.Tensor:
    """L in 0..100, a, b of light intensities in 0..1."""
    white = _table(WHITE)
    xyz = _mix(linear, _table(RGB_TO_XYZ) / white[:, None])
    f = torch.where(xyz > 0.008856, _power(xyz.clamp(min=TINY), 1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(dim=1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def lab_to_rgb(lab: torch.Tensor) -> torch.Tensor:
    """SRGB values, clipped to 0..1."""
    lightness, a, b = lab.unbind(dim=1)
    y = (lightness + 16) / 116
    f = torch.stack([y + a / 500, y, y - b / 200], dim=1)
    xyz = torch.where(f > 0.2068966, f**3, (f - 16 / 116) / 7.787)
    matrix = torch.linalg.inv(_table(RGB_TO_XYZ)) * torch.tensor(WHITE, dtype=torch.float64, device="cpu")
    linear = _mix(xyz, matrix)
    rgb = torch.where(linear > 0.0031308, 1.055 * _power(linear.clamp(min=TINY), 1 / 2.4) - 0.055, 12.92 * linear)
    return rgb.clamp(0, 1)


def _table(numbers: tuple[Any, ...]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def _power(base: torch.Tensor, exponent: float) -> torch.Tensor:
    """Powers base ** exponent of positive numbers to a few units in the last place, in a third of the time."""
    return (base.log() * exponent).exp()


def _mix(channels: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Matrix times channels, term by term: a matrix product may round otherwise for another number of images."""
    a, b, c = channels.unbind(dim=1)
    rows = matrix.tolist()
    return torch.stack([(a * x).add_(b, alpha=y).add_(c, alpha=z) for x, y, z in rows], dim=1)
