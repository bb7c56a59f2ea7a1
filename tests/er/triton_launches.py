"""What the ER operators would launch on a GPU, recorded without one from calls on tensors without data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from ernet_fast.er.triton import coefficient_launch, map_launch

TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}
ALIGNED = [["tt.divisibility", 16]]


class Launch(NamedTuple):
    """One launch: the kernel's name, its grid, its arguments in order, and its constants."""

    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    def specialisation(self) -> tuple[Any, ...]:
        """What Triton compiles a kernel for: types of the arguments, and constants."""
        return self.kernel, tuple(self.types()), tuple(sorted(self.constants.items()))

    def types(self) -> list[Any]:
        """The arguments' types as `triton.compile` wants them."""
        return [_type(argument) for argument in self.arguments]

    def alignments(self) -> dict[tuple[int, ...], Any]:
        """That every tensor is aligned to 16 bytes, as `triton.compile` wants it."""
        found = {}
        for i, argument in enumerate(self.arguments):
            if isinstance(argument, tuple):
                found |= {(i, j): ALIGNED for j in range(len(argument))}
            elif isinstance(argument, torch.Tensor):
                found[(i,)] = ALIGNED
        return found


def _type(argument: Any) -> Any:
    if isinstance(argument, tuple):
        return tuple(_type(part) for part in argument)
    if isinstance(argument, torch.Tensor):
        return TYPES[argument.dtype]
    if argument is None:
        return "constexpr"
    if isinstance(argument, float):
        return "fp32"
    return "i32" if -(2**31) <= argument < 2**31 else "i64"


class _Recorder:
    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def __getattr__(self, kernel: str) -> Any:
        recorder = self

        class Kernel:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                return lambda *arguments, **constants: recorder.launches.append(
                    Launch(kernel, grid, arguments, constants)
                )

        return Kernel()


def record(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> list[Launch]:
    """The launches of `call`, made on tensors of any device."""
    recorder = _Recorder()
    with monkeypatch.context() as patch:
        for module in (map_launch, coefficient_launch):
            patch.setattr(module, "kernels", lambda: recorder)
        patch.setattr(map_launch, "_interpreted", lambda: True)
        call()
    return recorder.launches
