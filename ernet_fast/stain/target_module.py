"""A module whose buffers are a fitted target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch


class TargetModule(torch.nn.Module):
    """Its buffers follow the module to other devices, and stay in float32 at least: a network in half precision takes
    the same target.

    Arrays and sequences may be assigned to them, as to the attributes of torchstain's normalisers.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> TargetModule:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and torch.finfo(new.dtype).bits < 32:
                self._buffers[name] = old.to(new.device)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        buffer = self.__dict__.get("_buffers", {}).get(name)
        if buffer is not None:
            value = self._as_target(name, value, buffer)
        super().__setattr__(name, value)

    @staticmethod
    def _as_target(name: str, value: Any, buffer: torch.Tensor) -> torch.Tensor:
        """`value` as a plain tensor of the buffer's kind; TypeError for no numbers, ValueError for another shape."""
        if isinstance(value, torch.Tensor):
            plain = type(value).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
            tensor = value.detach().as_subclass(torch.Tensor) if plain else value
        else:
            try:
                tensor = torch.from_numpy(np.array(value, dtype=np.float64))
            except (TypeError, ValueError) as error:
                raise TypeError(f"{name} is {value!r}; expected numbers of shape {tuple(buffer.shape)}.") from error
        if tensor.shape != buffer.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(buffer.shape)}.")
        return tensor.to(buffer)
