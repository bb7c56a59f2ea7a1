"""Operators of earlier versions, for exported programs that hold them: compositions of the operators of today.

They are removed in the second minor version after the one that deprecated them.
"""

from __future__ import annotations

import warnings

import torch

from ernet_fast import _backend
from ernet_fast.stain import torch_backend

_LIBRARY = torch.library.Library("ernet", "FRAGMENT")
_STAINS = "Tensor source_stain, Tensor source_max, Tensor target_stain, Tensor target_max"
_SCHEMAS = (
    "macenko_moments(Tensor images, float Io, float beta, float range=255.) -> Tensor",
    f"macenko_reconstruct_scaled(Tensor images, {_STAINS}, Tensor mean, Tensor std, float Io, ScalarType dtype, "
    "float range=255.) -> Tensor",
    "macenko_normalize_scaled(Tensor images, Tensor target_stain, Tensor target_max, Tensor mean, Tensor std, "
    "float Io, float alpha, float beta, bool nearest, bool identity, ScalarType dtype, float range=255.) -> (Tensor "
    "images, Tensor stain_matrix, Tensor max_concentration, Tensor status)",
)
NAMES = tuple(schema.split("(")[0] for schema in _SCHEMAS)


def _warn(name: str, instead: str) -> None:
    warnings.warn(
        f"ernet::{name} is deprecated; {instead}. Export programs that hold it again.", DeprecationWarning, stacklevel=3
    )


def _moments(images: torch.Tensor, Io: float, beta: float, range: float = 255.0) -> torch.Tensor:
    _warn("macenko_moments", "macenko_fit computes the moments it needs itself")
    return torch_backend.macenko_moments(images, Io, beta, range)


def _reconstruct_scaled(
    images: torch.Tensor,
    source_stain: torch.Tensor,
    source_max: torch.Tensor,
    target_stain: torch.Tensor,
    target_max: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    Io: float,
    dtype: torch.dtype,
    range: float = 255.0,
) -> torch.Tensor:
    _warn("macenko_reconstruct_scaled", "macenko_reconstruct takes dtype, mean and std")
    stains = source_stain, source_max, target_stain, target_max
    return torch.ops.ernet.macenko_reconstruct(images, *stains, Io, range, dtype=dtype, mean=mean, std=std)


def _normalize_scaled(
    images: torch.Tensor,
    target_stain: torch.Tensor,
    target_max: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    Io: float,
    alpha: float,
    beta: float,
    nearest: bool,
    identity: bool,
    dtype: torch.dtype,
    range: float = 255.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _warn("macenko_normalize_scaled", "macenko_normalize takes dtype, mean and std")
    numbers = Io, alpha, beta, nearest, identity, range
    return torch.ops.ernet.macenko_normalize(
        images, target_stain, target_max, *numbers, dtype=dtype, mean=mean, std=std
    )


def _register() -> None:
    functions = _moments, _reconstruct_scaled, _normalize_scaled
    for name, schema, function in zip(NAMES, _SCHEMAS, functions, strict=True):
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, function, "CompositeImplicitAutograd")


if _backend.extension_available():
    _register()
