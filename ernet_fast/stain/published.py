"""The stains published with the reference code of Macenko's method, which every package takes as its default target."""

from __future__ import annotations

import torch

from ernet_fast.stain.result import MacenkoFit

DEFAULT_STAINS = ((0.5626, 0.2159), (0.7201, 0.8012), (0.4062, 0.5581))
DEFAULT_MAXIMA = (1.9705, 1.0308)


def published_stains() -> MacenkoFit:
    """They as a fit of one image, on the CPU."""
    return MacenkoFit(
        torch.tensor([DEFAULT_STAINS], dtype=torch.float64),
        torch.tensor([DEFAULT_MAXIMA], dtype=torch.float64),
        torch.zeros(1, dtype=torch.int32),
    )
