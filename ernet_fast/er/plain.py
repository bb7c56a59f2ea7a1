"""Whether a module does in a call exactly what its class says, so that an operator may stand in for the call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as nn_module

_TENSORS = (nn.Parameter, Tensor, type(None))


Kind = type[nn.Module] | tuple[type[nn.Module], ...]


def is_plain(module: nn.Module, kind: Kind, *more: Any) -> bool:
    """True if `module` is of just this class, and its call would run no more than the class's `forward`.

    False for subclasses, parametrised modules (of a class of their own), modules with hooks (pruning, weight norm and
    offloading work by them), with a replaced `forward`, or with parameters of another type, such as `DTensor`.
    `more`: further modules, each followed by its class or classes, that must be plain as well.
    """
    # one call for all, and none below it: this runs several times in every block
    pairs = (module, kind, *more)
    for i in range(0, len(pairs), 2):
        module, kind = pairs[i], pairs[i + 1]
        if type(module) is not kind and not (isinstance(kind, tuple) and type(module) in kind):
            return False
        state = module.__dict__
        if (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or "forward" in state
        ):
            return False
        for parameter in state["_parameters"].values():
            # torch._subclasses: what torch.export traces with
            if type(parameter) not in _TENSORS and not type(parameter).__module__.startswith("torch._subclasses"):
                return False
    return not (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


def why_not_plain(module: nn.Module, kind: Kind) -> str | None:
    """What `is_plain` found, for people; None if the module is plain."""
    if is_plain(module, kind):
        return None
    name = type(module).__name__
    expected = kind if isinstance(kind, tuple) else (kind,)
    if type(module) not in expected:
        return f"is a {name}, not {' or '.join(one.__name__ for one in expected)}"
    if "forward" in module.__dict__:
        return "has a forward of its own"
    for parameter in module._parameters.values():
        if type(parameter) not in _TENSORS:
            return f"has a parameter that is a {type(parameter).__name__}"
    if nn_module._has_any_global_hook():
        return "is called with hooks that are registered for all modules"
    return "has hooks"
