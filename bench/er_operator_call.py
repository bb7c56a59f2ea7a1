"""A call of one ER operator on the maps that the last block of a stage reads, and what it must move, each map once:

channel_moments  reads 1 map      weighted_sum  reads L, writes 1      weighted_dot  reads L + 2, writes 1
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from er_stage_epilogues import EpilogueMaps

from ernet_fast.er import operators


class OperatorCall(NamedTuple):
    """The call, its arguments, and how many maps it reads and writes."""

    run: Callable[[], Any]
    arguments: tuple[Any, ...]
    accesses: int


def operator_call(operator: str, maps: EpilogueMaps) -> OperatorCall:
    """The call of "channel_moments", "weighted_sum" or "weighted_dot"."""
    xs, (dy, y, *_) = [z.detach() for z in maps.zs], maps.dys
    arguments: tuple[Any, ...]
    if operator == "channel_moments":
        arguments, accesses = (xs[0],), 1
    elif operator == "weighted_sum":
        channels = dy.shape[1]
        a, b = torch.randn(len(xs), channels, device=dy.device), torch.randn(channels, device=dy.device)
        arguments, accesses = (xs, a, b, True), len(xs) + 1
    else:
        arguments, accesses = (dy, xs, y.relu_()), len(xs) + 3
    function = getattr(operators, operator)
    return OperatorCall(lambda: function(*arguments), arguments, accesses)
