"""How near a result has to be to the one it is compared with.

Bounds come from the dtype and the length of the sums: sqrt(n) unit roundoffs of float32 a sum of n, times 4 where terms
cancel, and one rounding of a result that is stored in a shorter type.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Error(NamedTuple):
    """What was compared, how far off it is, and how far it may be."""

    what: str
    error: float
    limit: float


def require(errors: Iterable[Error]) -> float:
    """The largest error, if all are within their limits; not a number never is."""
    worst = 0.0
    for what, error, limit in errors:
        if not error <= limit:
            raise AssertionError(f"{what}: error {error:.3g}, at most {limit:.3g} expected")
        worst = max(worst, error)
    return worst


def relative(found: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """||found - expected|| / ||scale||, in double on the CPU."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    size = (expected if scale is None else scale.cpu().double()).norm().clamp_min(1e-300)
    return float((found - expected).norm() / size)


def bound(dtype: torch.dtype, terms: int, stored: bool = True) -> float:
    """What the relative error of a sum of `terms` products may be."""
    rounding = torch.finfo(dtype).eps if stored else 0.0
    return 4 * torch.finfo(torch.float32).eps * math.sqrt(terms) + rounding


def levels(what: str, found: Tensor, expected: Tensor) -> Iterator[Error]:
    """Grey levels off by one at most, in 0.05 % of the values at most."""
    difference = (found.cpu().int() - expected.int()).abs()
    yield Error(f"grey levels of {what}", float(difference.max()), 1)
    yield Error(f"values of {what}", float((difference != 0).sum()), max(2, 5e-4 * difference.numel()))


@contextlib.contextmanager
def asking_for(plan: str) -> Iterator[None]:
    """Calls on a CUDA device take this plan; "" leaves it to the library."""
    from ernet_fast import _backend

    library = _backend.extension()
    set_plan = (lambda plan: None) if library is None else library.set_macenko_plan
    set_plan(plan or "auto")
    try:
        yield
    finally:
        set_plan(os.environ.get("ERNET_MACENKO_PLAN", "auto"))
