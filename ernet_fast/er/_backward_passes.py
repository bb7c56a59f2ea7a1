"""What the autograd nodes of a stage leave for one another in a backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

Left = TypeVar("Left")


class BackwardPasses(Generic[Left]):
    """What has been left, by backward pass.

    It is filed under the number of the running pass, so a second one over a retained graph, or one that reaches only a
    part of the stage, never sees anything stale.
    """

    def __init__(self, new: Callable[[], Left]) -> None:
        self._new = new
        self._left: dict[int, Left] = {}
        self.last_node = -1
        """The map whose node runs last in backward: the first one that has a node."""

    def current(self) -> Left:
        """What has been left in the backward pass that runs now; forgotten when it ends."""
        number = torch._C._current_graph_task_id()
        found = self._left.get(number)
        if found is None:
            found = self._left[number] = self._new()
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._forget(number))
        return found

    def node_done(self, index: int) -> None:
        """Free what the running backward pass has left, if the node of map `index` is the last one."""
        if index == self.last_node:
            self._forget(torch._C._current_graph_task_id())

    def _forget(self, number: int) -> None:
        self._left.pop(number, None)
