"""Operators of earlier versions, for exported programs that hold them: compositions of the operators of today.

They are removed in the second minor version after the one that deprecated them.
"""

from __future__ import annotations

import warnings
from typing import Any

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


def _reconstruct_scaled(images: torch.Tensor, *arguments: Any, range: float = 255.0) -> torch.Tensor:
    _warn("macenko_reconstruct_scaled", "macenko_reconstruct takes dtype, mean and std")
    *stains, mean, std, Io, dtype = arguments[:8]
    range = arguments[8] if len(arguments) > 8 else range
    return torch.ops.ernet.macenko_reconstruct(images, *stains, Io, range, dtype=dtype, mean=mean, std=std)


def _normalize_scaled(images: torch.Tensor, *arguments: Any, range: float = 255.0) -> tuple[torch.Tensor, ...]:
    _warn("macenko_normalize_scaled", "macenko_normalize takes dtype, mean and std")
    target_stain, target_max, mean, std, *numbers, dtype = arguments[:10]
    numbers.append(arguments[10] if len(arguments) > 10 else range)
    return torch.ops.ernet.macenko_normalize(
        images, target_stain, target_max, *numbers, dtype=dtype, mean=mean, std=std
    )


if _backend.extension_available():
    functions = _moments, _reconstruct_scaled, _normalize_scaled
    for name, schema, function in zip(NAMES, _SCHEMAS, functions, strict=True):
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, function, "CompositeImplicitAutograd")
