"""A torchvision v2 transform; imported where torchvision is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image  # torchvision needs it too
from torchvision import tv_tensors
from torchvision.transforms import v2


class V2StainTransform(v2.Transform):
    """Applies `stain` to the images of a sample."""

    def __init__(self, stain: Callable[[Any], Any]) -> None:
        super().__init__()
        self.stain = stain

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """One image; everything else as it is."""
        if isinstance(inpt, tv_tensors.Image):
            return tv_tensors.wrap(self.stain(inpt.as_subclass(torch.Tensor)), like=inpt)
        if type(inpt) is torch.Tensor:
            return self.stain(inpt)
        if isinstance(inpt, Image.Image):
            return Image.fromarray(self.stain(np.asarray(inpt.convert("RGB"))))
        return inpt

    _transform = transform  # its name before torchvision 0.21
