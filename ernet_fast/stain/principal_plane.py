"""Eigenvectors of many symmetric 3x3 matrices in closed form, element by element.

`torch.linalg.eigh` waits for the device to report failures, and its results may depend on how many matrices it gets.
Here every matrix is worked on alone. The eigenvalue farthest from the two others has a well-conditioned eigenvector, a
cross product of two rows; one rotation in the plane orthogonal to it finds the other two (D. Eberly, "A robust
eigensolver for 3x3 symmetric matrices").
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

Symmetric = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""xx, xy, xz, yy, yz, zz, a tensor [B] each."""


class PrincipalPlane(NamedTuple):
    """The two largest principal directions of B matrices."""

    middle: torch.Tensor  # [B], the eigenvalue in the middle
    first: torch.Tensor  # [B, 3], its unit eigenvectors
    second: torch.Tensor  # [B, 3], those of the largest


def principal_plane(matrix: Symmetric) -> PrincipalPlane:
    """Directions of the middle and the largest eigenvalue of finite float64 matrices; signs are arbitrary."""
    lone, is_largest = _separated_eigenvalue(matrix)
    axis = _eigenvector(matrix, lone)
    u, v = _complement(axis)
    value_a, vector_a, value_b, vector_b = _rotated(matrix, u, v)
    a_above = (value_a > value_b)[:, None]
    above, below = vector_a.where(a_above, vector_b), vector_b.where(a_above, vector_a)
    larger, smaller = torch.maximum(value_a, value_b), torch.minimum(value_a, value_b)
    lone_first = is_largest[:, None]
    return PrincipalPlane(
        larger.where(is_largest, smaller), above.where(lone_first, below), axis.where(lone_first, above)
    )


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Scalar products [B] of [B, 3], in a fixed order."""
    return a[:, 0] * b[:, 0] + a[:, 1] * b[:, 1] + a[:, 2] * b[:, 2]


def cross(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Vector products of [B, 3]; torch's own may round otherwise for another number of matrices."""
    (ax, ay, az), (bx, by, bz) = a.unbind(dim=1), b.unbind(dim=1)
    return torch.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], dim=1)


def _rows(matrix: Symmetric) -> torch.Tensor:
    xx, xy, xz, yy, yz, zz = matrix
    return torch.stack([xx, xy, xz, xy, yy, yz, xz, yz, zz]).view(3, 3, -1).transpose(1, 2)


def _separated_eigenvalue(matrix: Symmetric) -> tuple[torch.Tensor, torch.Tensor]:
    """The eigenvalue farthest from the other two, and whether it is the largest (else it is the smallest)."""
    xx, xy, xz, yy, yz, zz = matrix
    mean = (xx + yy + zz) / 3
    x, y, z = xx - mean, yy - mean, zz - mean
    spread = ((x * x + y * y + z * z + 2 * (xy * xy + xz * xz + yz * yz)) / 6).sqrt()
    safe = spread.where(spread > 0, 1.0)
    a, b, c, d, e, f = (part / safe for part in (x, xy, xz, y, yz, z))
    determinant = a * (d * f - e * e) - b * (b * f - c * e) + c * (b * e - c * d)
    half = (determinant / 2).clamp(-1, 1)
    is_largest = half >= 0
    angle = half.acos() / 3
    return mean + 2 * spread * (angle + (2 * math.pi / 3) * ~is_largest).cos(), is_largest


def _eigenvector(matrix: Symmetric, value: torch.Tensor) -> torch.Tensor:
    """The unit vector that the rows of the matrix less `value` are orthogonal to; x where they are all zero."""
    xx, xy, xz, yy, yz, zz = matrix
    rows = _rows((xx - value, xy, xz, yy - value, yz, zz - value))
    best = cross(rows[0], rows[1])
    length = dot(best, best)
    for i, j in ((0, 2), (1, 2)):
        other = cross(rows[i], rows[j])
        square = dot(other, other)
        best, length = best.where((length >= square)[:, None], other), torch.maximum(length, square)
    found = length > 0
    unit = best / length.where(found, 1.0).sqrt()[:, None]
    return unit.where(found[:, None], torch.eye(3, dtype=unit.dtype, device=unit.device)[0])


def _complement(axis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two unit vectors that are orthogonal to `axis` and to each other."""
    x, y, z = axis.unbind(dim=1)
    norm = (torch.maximum(x * x, y * y) + z * z).sqrt()
    zero = torch.zeros_like(x)
    in_xz, in_yz = torch.stack([-z, zero, x], dim=1), torch.stack([zero, z, -y], dim=1)
    u = in_xz.where((x.abs() > y.abs())[:, None], in_yz) / norm[:, None]
    return u, cross(axis, u)


def _rotated(
    matrix: Symmetric, u: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both eigenvalues and eigenvectors in the plane of u and v, by the rotation that makes u' A v' zero."""
    au, av = (torch.stack([dot(row, a) for row in _rows(matrix)], dim=1) for a in (u, v))
    uu, uv, vv = dot(u, au), dot(u, av), dot(v, av)
    turned = uv != 0
    theta = (vv - uu) / (2 * uv.where(turned, 1.0))
    tangent = (1 / (theta.abs() + (theta * theta + 1).sqrt())).copysign(theta)
    tangent = tangent.where(turned, 0.0)
    cosine = 1 / (tangent * tangent + 1).sqrt()
    c, s = cosine[:, None], (tangent * cosine)[:, None]
    return uu - tangent * uv, c * u - s * v, vv + tangent * uv, s * u + c * v
