"""Shapes, dtypes, layouts and error measures that the ER tests share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ernet_fast.er.epilogue_arguments import EpilogueState

# N, C, H, W: multiples of nothing, single pixels and samples, more channels than a tile, more pixels than a chunk
SHAPES = [(2, 3, 7, 11), (1, 65, 7, 7), (3, 1, 1, 49), (5, 33, 1, 1), (2, 64, 9, 9), (1, 2, 61, 67), (1, 1030, 2, 3)]
SHAPES += [(2, 37, 14, 14), (2, 5, 24, 43)]  # planes that are a half or a quarter of a cache line too long
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def maps_like(
    shape: tuple[int, ...], count: int, dtype: torch.dtype, layout: torch.memory_format, seed: int = 0
) -> list[Tensor]:
    """Random maps with a mean of their own."""
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5 * i - 1 for i in range(count)]
    return [x.to(dtype).contiguous(memory_format=layout) for x in maps]


def new_table(like: Tensor, num_maps: int, num_groups: int = 0) -> Tensor:
    """The table of a stage of `num_maps` maps like `like` [N, C, H, W]."""
    return EpilogueState(like, num_maps, 1e-5, measure=True, num_groups=num_groups, composed=False).table


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in double."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-300))


def tolerance(dtype: torch.dtype, terms: int, stored: bool = True) -> float:
    """Bound on the relative error of a result summed from `terms` products.

    Accumulation (float32, or float64 for float64 maps) contributes a random walk of rounding errors, sqrt(terms) unit
    roundoffs; a result stored in `dtype` is rounded once more. The factor 4 covers cancellation between terms.
    """
    accumulate = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    rounding = torch.finfo(dtype).eps if stored else 0.0
    return 4 * accumulate * math.sqrt(terms) + rounding
