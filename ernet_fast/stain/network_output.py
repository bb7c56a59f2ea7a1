"""Normalised images as a network takes them: (I' / range - mean) / std, channels last, in float32 or 16 bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

OUTPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class NetworkOutput(NamedTuple):
    """The scale of a network's input."""

    dtype: torch.dtype  # one of OUTPUT_DTYPES
    mean: torch.Tensor  # [3] float64 on the CPU, of values in [0, 1]
    std: torch.Tensor  # the same


def read_output(
    output: str | torch.dtype, mean: Sequence[float] | None, std: Sequence[float] | None
) -> NetworkOutput | None:
    """What `output`, `mean` and `std` ask for; None for images. ValueError where they make no sense."""
    if isinstance(output, str) and output == "image":
        if mean is not None or std is not None:
            raise ValueError(
                "mean and std scale a network's input; pass output=torch.float32, torch.bfloat16 or torch.float16."
            )
        return None
    if output not in OUTPUT_DTYPES:
        raise ValueError(f"output={output!r}; expected 'image', torch.float32, torch.bfloat16 or torch.float16.")
    means = _three("mean", (0.0, 0.0, 0.0) if mean is None else mean)
    deviations = _three("std", (1.0, 1.0, 1.0) if std is None else std)
    if min(deviations) <= 0:
        raise ValueError(f"std={tuple(deviations)}; expected three positive numbers.")
    both = (torch.tensor(values, dtype=torch.float64, device="cpu") for values in (means, deviations))
    return NetworkOutput(output, *both)  # type: ignore[arg-type]


def _three(name: str, values: Any) -> list[float]:
    numbers = [float(value) for value in values]
    if len(numbers) != 3 or not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"{name}={tuple(numbers)}; expected three finite numbers, for red, green and blue.")
    return numbers


def _on(device: torch.device, three: torch.Tensor) -> torch.Tensor:
    """Numbers of the host, written by the device itself: while a CUDA graph is captured nothing may be uploaded."""
    if device.type == "cpu":
        return three
    return torch.stack([torch.full((), number, dtype=torch.float64, device=device) for number in three.tolist()])


def scale(images: torch.Tensor, output: NetworkOutput, range: float) -> torch.Tensor:
    """Images [B, 3, H, W], scaled; differentiable."""
    unit = 255.0 if images.dtype == torch.uint8 else range
    mean, std = (_on(images.device, part)[:, None, None] for part in (output.mean, output.std))
    # Rounded to float32 first, as the operator does.
    scaled = ((images.double() / unit - mean) / std).float().to(output.dtype)
    return scaled.contiguous(memory_format=torch.channels_last)
