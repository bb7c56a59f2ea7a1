"""The facts that ``ernet-fast doctor`` shows, gathered without any optional package."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
from typing import Any, NamedTuple

import torch

from ernet_fast import __version__, _backend
from ernet_fast._backend import serves_capability


class _Package(NamedTuple):
    module: str
    distribution: str
    extra: str
    purpose: str


_PACKAGES = (
    _Package("torch", "torch", "core", "tensors"),
    _Package("numpy", "numpy", "core", "arrays"),
    _Package("triton", "triton", "with CUDA torch", "ER operators on GPUs"),
    _Package("PIL", "pillow", "train", "reading and writing images"),
    _Package("lightning_fabric", "lightning-fabric", "train", "training: devices, precision, several processes"),
    _Package("torchmetrics", "torchmetrics", "train", "metrics"),
    _Package("matplotlib", "matplotlib", "train", "pictures"),
    _Package("rich", "rich", "train", "progress bars"),
    _Package("safetensors", "safetensors", "optional", "weights in .safetensors files"),
    _Package("timm", "timm", "timm", "model registry"),
    _Package("torchvision", "torchvision", "optional", "needed by timm only"),
    _Package("openslide", "openslide-python", "slides", "whole-slide images"),
    _Package("tifffile", "tifffile", "slides", "TIFF images"),
    _Package("torchstain", "torchstain", "bench", "the package to compare with"),
)

_PURPOSES = {
    "channel_moments": "ER shortcuts: mean and variance of each channel",
    "weighted_sum": "ER shortcuts: forward and backward",
    "weighted_dot": "ER shortcuts: gradients of the weights",
    "block_coefficients": "ER shortcuts: coefficients of a block's weighted sum",
    "map_dots": "ER shortcuts: inner products of a map with all gradients of sums that read it",
    "map_coefficients_backward": "ER shortcuts: gradients of weights, gamma and beta from them",
    "er_block": "ER shortcuts: the epilogue of a block",
    "er_block_backward": "ER shortcuts: its gradients",
    "shortcut_sum_backward": "ER shortcuts: gradients of a sum of maps that no block made",
    "macenko_fit": "Macenko: stains of an image",
    "macenko_reconstruct": "Macenko: image with other stains",
    "macenko_reconstruct_stains": "Macenko: the same, and each stain alone",
    "macenko_normalize": "Macenko: fit and reconstruct in one",
    "macenko_change": "Macenko: image with other concentrations",
    "macenko_augment": "Macenko: fit and augmentation in one",
    "macenko_separate": "Macenko: each stain alone",
    "macenko_count_colours": "Macenko: colours of a slide, strip by strip",
    "macenko_fit_colours": "Macenko: stains of counted colours",
}


def diagnose() -> dict[str, Any]:
    """Everything, as plain values."""
    return {
        "version": __version__,
        "machine": _machine(),
        "packages": [_package(package) for package in _PACKAGES],
        "extension": {
            "available": _backend.extension_available(),
            "reason": _backend.why_unavailable(),
            "build": _backend.build_info(),
        },
        "cuda": _cuda(),
        "operators": _operators(),
        "stages": _stages(),
    }


def _machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            found = re.search(r"model name\s*:\s*(.+)", file.read())
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _package(package: _Package) -> dict[str, Any]:
    """Name, version (None if missing), extra, and what it is for or what is wrong with it."""
    entry = {"name": package.distribution, "version": None, "extra": package.extra, "note": package.purpose}
    try:
        present = importlib.util.find_spec(package.module) is not None
    except (ImportError, ValueError):
        present = False
    if not present:
        return entry
    try:
        entry["version"] = importlib.metadata.version(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        entry["version"] = "unknown"
    if package.module == "torchvision":
        entry["note"] = _torchvision_note()
    return entry


def _torchvision_note() -> str:
    """A torchvision built for another torch breaks every package that imports it: worth an import to see."""
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # its failure is a RuntimeError about a missing operator, or an ImportError
        reason = str(error).splitlines()[0]
        return f"does not load ({reason}) and breaks torchmetrics and lightning; uninstall it or match it to torch"
    return "loads"


def _cuda() -> dict[str, Any]:
    devices = []
    info = _backend.build_info()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            devices.append(
                {
                    "index": index,
                    "name": found.name,
                    "capability": f"{found.major}.{found.minor}",
                    "memory_gib": round(found.total_memory / 2**30, 1),
                    "compiled_for": info is not None
                    and serves_capability(info["cuda_archs"], found.major, found.minor),
                }
            )
    if devices:
        reason = None
    elif torch.version.cuda is None:
        reason = f"torch {torch.__version__} was built without CUDA"
    else:
        reason = "torch sees no device; check the driver with nvidia-smi"
    return {"torch_cuda": torch.version.cuda, "devices": devices, "reason": reason}


def _operators() -> list[dict[str, str]]:
    rows = []
    for name, purpose in _PURPOSES.items():
        for device in ("cpu", "cuda"):
            backend, why = _backend_on(name, device)
            rows.append({"operator": name, "purpose": purpose, "device": device, "backend": backend, "why": why})
    return rows


def _backend_on(name: str, device: str) -> tuple[str, str]:
    """Which implementation serves an operator on a device, and the reason."""
    if device == "cuda" and not torch.cuda.is_available():
        return "-", "no CUDA device here"
    if device == "cuda" and name.startswith("macenko"):
        return _macenko_on_cuda(name)
    if device == "cuda" and _triton_serves():
        return "Triton", "compiled at first use"
    if not _backend.extension_available():
        return "PyTorch reference", _backend.why_unavailable() or "the compiled operators are missing"
    info = _backend.build_info() or {}
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"ernet::{name}", device.upper()):
        return ("C++", f"compiled, {info['isa']}") if device == "cpu" else ("CUDA", "registered for CUDA")
    if name == "macenko_separate":
        return "C++ and PyTorch", "macenko_reconstruct between torch operations"
    return "PyTorch reference", f"no {device.upper()} kernel is compiled in"


def _stages() -> list[dict[str, str]]:
    """The path of an `ERStage` with plain modules on each device here, and the reason."""
    from ernet_fast.models.stage import ERStage

    rows = []
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        x = torch.zeros(1, 4, 2, 2, device=device)
        for options in ({}, {"norm": "group", "num_groups": 2}, {"fused": False}):
            choice = ERStage(4, 4, 2, block="basic", **options).to(device).choice(x)
            what = ", ".join(f"{name}={value!r}" for name, value in options.items()) or "norm='batch'"
            rows.append({"stage": what, "device": device, "path": choice.path.value, "why": choice.reason})
    return rows


def _macenko_on_cuda(name: str) -> tuple[str, str]:
    from ernet_fast.stain import operators, torch_backend

    reason = torch_backend.why_no_kernels(torch.cuda.current_device())
    if reason is not None:
        return "PyTorch", f"batched torch operations; {reason}"
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"ernet::{name}", "CUDA") and name not in operators.COMPOSED:
        return "CUDA", "compiled kernels"
    return "CUDA and PyTorch", "compiled kernels and batched torch operations"


def _triton_serves() -> bool:
    from ernet_fast.er import operators

    return operators.supports_device(torch.empty(1, 1, 1, 1, device="cuda"))
