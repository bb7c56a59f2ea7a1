"""Registration of the Triton operators for CUDA devices; neither CUDA nor Triton is initialised or imported by it."""

from __future__ import annotations

import importlib.util

import torch

from ernet_fast.er.triton import coefficient_launch, map_launch

# For builds without the C++ extension, which defines the same ones.
_SCHEMAS = (
    "channel_moments(Tensor x, bool per_sample) -> (Tensor mean, Tensor var)",
    "weighted_sum(Tensor[] maps, Tensor a, Tensor? b, bool relu) -> Tensor",
    "weighted_dot(Tensor dy, Tensor[] maps, Tensor? y, bool per_sample) -> (Tensor da, Tensor db, Tensor g)",
    "block_coefficients(Tensor(a!) table, int index, bool doubles, Tensor? mean, Tensor? var, Tensor? count, "
    "int elements, int norm, Tensor? gamma, Tensor? beta, Tensor(b!)? norm_mean, Tensor(c!)? norm_var, "
    "Tensor(d!)? norm_batches, float? norm_momentum, float norm_eps, Tensor? weight, Tensor(e!)? running_mean, "
    "Tensor(f!)? running_var, Tensor(g!)? batches, bool use_running, float? momentum, float eps) "
    "-> (Tensor a, Tensor b)",
    "map_dots(Tensor z, Tensor? dy, Tensor? y, Tensor[] later_g, bool per_sample) -> (Tensor sums, Tensor g)",
    "map_coefficients_backward(Tensor table, int index, Tensor? sums, Tensor? a, Tensor[] later_a, Tensor[] later_db, "
    "Tensor[] later_weight, Tensor[] later_running_mean, Tensor[] later_running_var, Tensor(a!)[] later_dweight, "
    "Tensor? count, int elements, int norm, float eps, bool measured, bool pass_on) "
    "-> (Tensor rows, Tensor k0, Tensor dgamma, Tensor dbeta, Tensor dmoments)",
)

# Of CUDA devices alone: what are two operators each on the CPU.
_CUDA_SCHEMAS = (
    "measured_coefficients(Tensor z, Tensor(a!) table, int index, int norm, Tensor? gamma, Tensor? beta, "
    "Tensor(b!)? norm_mean, Tensor(c!)? norm_var, Tensor(d!)? norm_batches, float? norm_momentum, float norm_eps, "
    "Tensor? weight, Tensor(e!)? running_mean, Tensor(f!)? running_var, Tensor(g!)? batches, bool use_running, "
    "float? momentum, float eps) -> (Tensor a, Tensor b)",
    "map_backward(Tensor z, Tensor? dy, Tensor? y, Tensor[] later_g, Tensor table, int index, Tensor? a, "
    "Tensor[] later_a, Tensor[] later_db, Tensor[] later_weight, Tensor[] later_running_mean, "
    "Tensor[] later_running_var, Tensor(a!)[] later_dweight, int norm, float eps, bool measured, bool pass_on) "
    "-> (Tensor rows, Tensor k0, Tensor dgamma, Tensor dbeta, Tensor db, Tensor g)",
)

_LIBRARY: torch.library.Library | None = None  # keeps the registrations alive


def available() -> bool:
    """True if this PyTorch has CUDA (or HIP) devices and Triton is installed."""
    on_gpu = torch.version.cuda is not None or torch.version.hip is not None
    try:
        return on_gpu and importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):  # an import hook hides it
        return False


IMPLEMENTATIONS = (
    map_launch.channel_moments,
    map_launch.weighted_sum,
    map_launch.weighted_dot,
    map_launch.map_dots,
    coefficient_launch.block_coefficients,
    coefficient_launch.map_coefficients_backward,
    coefficient_launch.measured_coefficients,
    coefficient_launch.map_backward,
)
"""The operators on CUDA devices, each named as its function."""


def register(*, define: bool) -> None:
    """Register the operators for CUDA tensors; with `define` their schemas too, for builds without the extension."""
    global _LIBRARY
    _LIBRARY = torch.library.Library("ernet", "FRAGMENT")
    for schema in (*_CUDA_SCHEMAS, *(_SCHEMAS if define else ())):
        _LIBRARY.define(schema)
    for implementation in IMPLEMENTATIONS:
        _LIBRARY.impl(implementation.__name__, implementation, "CUDA")
