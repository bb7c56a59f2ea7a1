"""Reinhard colour normalisation, word for word, in float64 NumPy: the oracle of the tests.

E. Reinhard et al., "Color transfer between images", IEEE Computer Graphics and Applications 2001, in CIE L*a*b* (sRGB,
D65) as the torchstain package has it. That package computes in float32.
"""

from __future__ import annotations

import numpy as np

RGB_TO_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
WHITE = np.array([0.95047, 1.0, 1.08883])


def rgb_to_lab(rgb: np.ndarray) -> np.ndarray:
    """L in 0..100, a, b of sRGB values [..., 3] in 0..1."""
    linear = np.where(rgb > 0.04045, (np.maximum(rgb, 0) / 1.055 + 0.055 / 1.055) ** 2.4, rgb / 12.92)
    xyz = linear @ RGB_TO_XYZ.T / WHITE
    x, y, z = np.moveaxis(np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def lab_to_rgb(lab: np.ndarray) -> np.ndarray:
    """SRGB values [..., 3], clipped to 0..1."""
    y = (lab[..., 0] + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], axis=-1)
    xyz = np.where(f > 0.2068966, f**3, (f - 16 / 116) / 7.787) * WHITE
    linear = xyz @ np.linalg.inv(RGB_TO_XYZ).T
    rgb = np.where(linear > 0.0031308, 1.055 * np.maximum(linear, 0) ** (1 / 2.4) - 0.055, 12.92 * linear)
    return np.clip(rgb, 0, 1)


def reinhard_fit(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [3] and standard deviation [3] of L, a, b of an image [H, W, 3] on the scale 0 to 255."""
    lab = rgb_to_lab(image.astype(np.float64) / 255).reshape(-1, 3)
    return lab.mean(axis=0), lab.std(axis=0)


def reinhard_normalize(
    image: np.ndarray, target_mean: np.ndarray, target_std: np.ndarray, method: str | None = None
) -> np.ndarray:
    """Grey levels [H, W, 3] float64 in 0..255, not truncated, of an image whose L, a and b all vary."""
    lab = rgb_to_lab(image.astype(np.float64) / 255)
    mean, std = reinhard_fit(image)
    if method is None:
        lab = (lab - mean) / std * target_std + target_mean
    else:
        q = (target_std[0] - std[0]) / target_std[0]
        lightness = mean[0] + (lab[..., :1] - mean[0]) * (1 + (q if q > 0 else 0.05))
        lab = np.concatenate([lightness, (lab - mean + target_mean)[..., 1:]], axis=-1)
    return lab_to_rgb(lab) * 255
