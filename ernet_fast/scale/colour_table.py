"""A normalisation with known stains as a table: what becomes of an image is then a function of colour alone.

A viewer that applies tables shows a slide normalised without a pixel being written. Two forms: .cube, an interpolated
table of RGB values, and an ICC profile (Specification ICC.1:2001-04, lut16Type) which, assigned to the original image
in place of its own, lets every colour-managed viewer show the normalised colours.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
import torch

from ernet_fast.scale.method import Method, Values

POINTS = (33, 65)
"""Grid points of each channel."""

# IEC 61966-2-1: linear sRGB to CIE XYZ, adapted to the white D50 of profiles (Bradford)
_XYZ_OF_SRGB = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]], np.float64
)
_D50 = np.array([0.9642, 1.0, 0.8249])


class TableError(NamedTuple):
    """Differences in grey levels between a table and the normalisation, over `colours` colours and three channels."""

    largest: float
    mean: float
    colours: int


class ColourTable:
    """The normalised colours on a grid.

    Attributes:
        grid: [N, N, N, 3] float64 grey levels for red, green and blue from 0 to 255 in equal steps. Half a level is
            taken off, so that rounding gives what 8-bit results hold, which are truncated.
    """

    def __init__(self, method: Method, source: Values, points: int = 33) -> None:
        if points not in POINTS:
            raise ValueError(f"points={points!r}; expected {' or '.join(map(str, POINTS))}.")
        self.method, self.source = method, source
        levels = torch.linspace(0, 255, points, dtype=torch.float64)
        colours = torch.stack(torch.meshgrid(levels, levels, levels, indexing="ij"), dim=-1)
        (mapped,), _, _ = method.normalize([colours.reshape(points, points * points, 3)], source)
        # under "identity" a colour without stains stays as it is, and nothing is truncated
        half = 0.0 if method.working.identity and not source else 0.5
        self.grid = np.maximum(mapped.reshape(points, points, points, 3).numpy() - half, 0.0)

    @property
    def points(self) -> int:
        """Grid points of each channel."""
        return len(self.grid)

    def apply(self, colours: np.ndarray) -> np.ndarray:
        """Trilinear interpolation: levels [n, 3] in, levels [n, 3] float64 out."""
        place = np.asarray(colours, np.float64) * ((self.points - 1) / 255)
        low = np.minimum(place.astype(int), self.points - 2)
        share = place - low
        out = np.zeros_like(place)
        for corner in np.ndindex(2, 2, 2):
            weight = np.where(corner, share, 1 - share).prod(axis=1)
            out += weight[:, None] * self.grid[tuple((low + corner).T)]
        return out

    def error(self, colours: np.ndarray) -> TableError:
        """Over colours [n, 3] uint8, rounded as a viewer does; n must not be 0."""
        (right,), _, _ = self.method.normalize([torch.from_numpy(colours[None])], self.source)
        difference = np.abs(self.apply(colours).round() - right[0].numpy())
        return TableError(float(difference.max()), float(difference.mean()), len(colours))

    def cube(self, title: str) -> str:
        """The table as the text of a .cube file, red fastest, values from 0 to 1."""
        plain = title.replace('"', "'").encode("ascii", "replace").decode()
        rows = (self.grid / 255).transpose(2, 1, 0, 3).reshape(-1, 3)
        lines = "\n".join(f"{r:.6f} {g:.6f} {b:.6f}" for r, g, b in rows.tolist())
        return f'TITLE "{plain}"\nLUT_3D_SIZE {self.points}\n{lines}\n'

    def icc(self, title: str) -> bytes:
        """The table as an ICC profile of an RGB input device (version 2.4, A2B0 as lut16Type, Lab, D50)."""
        tags = {
            b"desc": _description(title),
            b"cprt": b"text\0\0\0\0No copyright\0",
            b"wtpt": b"XYZ \0\0\0\0" + _fixed(_D50),
            b"A2B0": _lut16(self.grid),
        }
        offset, entries, data = 128 + 4 + 12 * len(tags), b"", b""
        for name, value in tags.items():
            entries += struct.pack(">4sII", name, offset + len(data), len(value))
            data += value + bytes(-len(value) % 4)
        body = struct.pack(">I", len(tags)) + entries + data
        header = struct.pack(">I4xI4s4s4s12x4s28x", 128 + len(body), 0x02400000, b"scnr", b"RGB ", b"Lab ", b"acsp")
        return (header + _fixed(_D50)).ljust(128, b"\0") + body


def _fixed(values: np.ndarray) -> bytes:
    """Numbers as s15Fixed16."""
    return np.round(np.asarray(values).ravel() * 65536).astype(">i4").tobytes()


def _description(title: str) -> bytes:
    """TextDescriptionType with its ASCII part."""
    text = title.encode("ascii", "replace")[:255] + b"\0"
    return b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(8 + 3 + 67)


def _lut16(grid: np.ndarray) -> bytes:
    """RGB to Lab by a grid [N, N, N, 3] of sRGB levels, between tables that change nothing."""
    lab = _lab(grid / 255)
    scaled = lab * [65280 / 100, 256, 256] + [0, 128 * 256, 128 * 256]
    entries = np.clip(np.round(scaled), 0, 65535).astype(">u2").tobytes()
    straight = struct.pack(">HH", 0, 65535) * 3
    head = b"mft2\0\0\0\0" + bytes([3, 3, len(grid), 0]) + _fixed(np.eye(3)) + struct.pack(">HH", 2, 2)
    return head + straight + entries + straight


def _lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* under D50 of sRGB values [..., 3] in [0, 1]."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x = linear @ _XYZ_OF_SRGB.T / _D50
    f = np.where(x > 216 / 24389, np.cbrt(x), (24389 / 27 * x + 16) / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)
