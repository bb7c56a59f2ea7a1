"""The operators of CUDA devices on other tensors: their Python functions, whose kernels are recorded or interpreted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ernet_fast.er import epilogue, epilogue_composed, operators
from ernet_fast.er.triton import register

if not operators.TRITON:  # the schemas of operators that the CPU has not
    register.register(define=False)

FUNCTIONS: dict[str, Callable[..., Any]] = {function.__name__: function for function in register.IMPLEMENTATIONS}


class TritonOperators(TorchDispatchMode):
    """Calls the functions of CUDA devices in place of our operators, and lists the operators that touch two devices."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.across: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        self.calls.append(name)
        if name.startswith("ernet::"):
            return FUNCTIONS[name.removeprefix("ernet::")](*args, **kwargs)
        out = func(*args, **kwargs)
        devices = {t.device for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}
        if len(devices) > 1:
            self.across.append(name)
        return out


@contextmanager
def as_on_cuda() -> Iterator[TritonOperators]:
    """What runs inside, on the CPU or on meta tensors, takes the path of CUDA devices, operators included."""
    with (
        mock.patch.object(epilogue, "block_operator_supports", lambda x, group: False),
        mock.patch.object(operators, "supports_device", lambda x: True),
        mock.patch.object(epilogue_composed, "together", lambda state, z: state.group is None and not state.num_groups),
        TritonOperators() as found,
    ):
        yield found
