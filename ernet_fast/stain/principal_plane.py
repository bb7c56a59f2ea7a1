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

Vector = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Symmetric = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""xx, xy, xz, yy, yz, zz, a tensor [B] each."""


class PrincipalPlane(NamedTuple):
    """The two largest principal directions of B matrices.

    Attributes:
        middle: [B], the eigenvalue in the middle.
        first: unit eigenvector of the eigenvalue in the middle, three tensors [B].
        second: unit eigenvector of the largest eigenvalue.
    """

    middle: torch.Tensor
    first: Vector
    second: Vector


def principal_plane(matrix: Symmetric) -> PrincipalPlane:
    """Directions of the middle and the largest eigenvalue of finite float64 matrices; signs are arbitrary."""
    lone, is_largest = _separated_eigenvalue(matrix)
    axis = _eigenvector(matrix, lone)
    u, v = _complement(axis)
    value_a, vector_a, value_b, vector_b = _rotated(matrix, u, v)
    a_above = value_a > value_b
    above, below = _select(a_above, vector_a, vector_b), _select(a_above, vector_b, vector_a)
    larger, smaller = torch.maximum(value_a, value_b), torch.minimum(value_a, value_b)
    return PrincipalPlane(
        larger.where(is_largest, smaller), _select(is_largest, above, below), _select(is_largest, axis, above)
    )


def dot(a: Vector, b: Vector) -> torch.Tensor:
    """Scalar product."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def cross(a: Vector, b: Vector) -> Vector:
    """Vector product."""
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def _select(condition: torch.Tensor, a: Vector, b: Vector) -> Vector:
    return a[0].where(condition, b[0]), a[1].where(condition, b[1]), a[2].where(condition, b[2])


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


def _eigenvector(matrix: Symmetric, value: torch.Tensor) -> Vector:
    """The unit vector that the rows of the matrix less `value` are orthogonal to; x where they are all zero."""
    xx, xy, xz, yy, yz, zz = matrix
    rows: tuple[Vector, Vector, Vector] = ((xx - value, xy, xz), (xy, yy - value, yz), (xz, yz, zz - value))
    best = cross(rows[0], rows[1])
    length = dot(best, best)
    for i, j in ((0, 2), (1, 2)):
        other = cross(rows[i], rows[j])
        square = dot(other, other)
        best, length = _select(length >= square, best, other), torch.maximum(length, square)
    found = length > 0
    norm = length.where(found, 1.0).sqrt()
    return (best[0] / norm).where(found, 1.0), (best[1] / norm).where(found, 0.0), (best[2] / norm).where(found, 0.0)


def _complement(axis: Vector) -> tuple[Vector, Vector]:
    """Two unit vectors that are orthogonal to `axis` and to each other."""
    x, y, z = axis
    wide = x.abs() > y.abs()
    norm = (torch.maximum(x * x, y * y) + z * z).sqrt()
    zero = torch.zeros_like(x)
    u = _select(wide, (-z / norm, zero, x / norm), (zero, z / norm, -y / norm))
    return u, cross(axis, u)


def _rotated(matrix: Symmetric, u: Vector, v: Vector) -> tuple[torch.Tensor, Vector, torch.Tensor, Vector]:
    """Both eigenvalues and eigenvectors in the plane of u and v, by the rotation that makes u' A v' zero."""
    xx, xy, xz, yy, yz, zz = matrix

    def image(a: Vector) -> Vector:
        return dot((xx, xy, xz), a), dot((xy, yy, yz), a), dot((xz, yz, zz), a)

    au, av = image(u), image(v)
    uu, uv, vv = dot(u, au), dot(u, av), dot(v, av)
    turned = uv != 0
    theta = (vv - uu) / (2 * uv.where(turned, 1.0))
    tangent = (1 / (theta.abs() + (theta * theta + 1).sqrt())).copysign(theta)
    tangent = tangent.where(turned, 0.0)
    cosine = 1 / (tangent * tangent + 1).sqrt()
    sine = tangent * cosine
    a = cosine * u[0] - sine * v[0], cosine * u[1] - sine * v[1], cosine * u[2] - sine * v[2]
    b = sine * u[0] + cosine * v[0], sine * u[1] + cosine * v[1], sine * u[2] + cosine * v[2]
    return uu - tangent * uv, a, vv + tangent * uv, b
