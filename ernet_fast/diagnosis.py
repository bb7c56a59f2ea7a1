"""The facts that ``ernet-fast doctor`` shows, gathered without any optional package."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

import torch

from ernet_fast import __version__, _backend
from ernet_fast.er.operators import supports_device
from ernet_fast.models.stage import ERStage
from ernet_fast.output_cache import kept_memory
from ernet_fast.processor import processor

# Module, distribution, extra that brings it, purpose.
_PACKAGES = (
    ("torch", "torch", "core", "tensors"),
    ("numpy", "numpy", "core", "arrays"),
    ("triton", "triton", "with CUDA torch", "ER operators on GPUs"),
    ("PIL", "pillow", "train", "reading and writing images"),
    ("lightning_fabric", "lightning-fabric", "train", "training: devices, precision, several processes"),
    ("torchmetrics", "torchmetrics", "train", "metrics"),
    ("matplotlib", "matplotlib", "train", "pictures"),
    ("rich", "rich", "train", "progress bars"),
    ("scipy", "scipy", "study", "range tests of ernet-fast ablate"),
    ("safetensors", "safetensors", "optional", "weights in .safetensors files"),
    ("onnx", "onnx", "export", "ONNX files"),
    ("onnxruntime", "onnxruntime", "export", "running ONNX files"),
    ("tensorboardX", "tensorboardX", "tensorboard", "event files of training for TensorBoard"),
    ("timm", "timm", "timm", "model registry"),
    ("torchvision", "torchvision", "optional", "needed by timm only"),
    ("skimage", "scikit-image", "segment", "nuclei"),
    ("openslide", "openslide-python", "slides", "whole-slide images"),
    ("tifffile", "tifffile", "slides", "TIFF images"),
    ("imagecodecs", "imagecodecs", "slides", "writing slides as JPEG"),
    ("torchstain", "torchstain", "bench", "the package to compare with"),
)


def diagnose() -> dict[str, Any]:
    """Everything, as plain values."""
    return {
        "version": __version__,
        "machine": _machine(),
        "packages": [_package(*package) for package in _PACKAGES],
        "extension": {
            "available": _backend.extension_available(),
            "reason": _backend.why_unavailable(),
            "build": _backend.build_info(),
            "caches": _backend.caches(),
            "streaming": _backend.streaming(),
            "kept_memory_limit": kept_memory().limit_bytes,
        },
        "cuda": _cuda(),
        "operators": _operators(),
        "stages": _stages(),
    }


def environment() -> dict[str, Any]:
    """What a result depends on besides its settings: versions, processor, devices, instruction set; plain values."""
    machine, build = _machine(), _backend.build_info()
    found = [
        _package(*package) for package in _PACKAGES if package[0] != "torchvision"
    ]  # whose version needs an import
    return {
        "ernet_fast": __version__,
        **{name: machine[name] for name in ("python", "system", "processor", "cores", "threads")},
        "instruction_set": build["isa"] if build else None,
        "cuda": [device["name"] for device in _cuda()["devices"]],
        "packages": {package["name"]: package["version"] for package in found if package["version"]},
    }


def _machine() -> dict[str, Any]:
    cpu = processor()
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": cpu["name"],
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _package(module: str, distribution: str, extra: str, purpose: str) -> dict[str, Any]:
    """Name, version (None if missing), extra, and what it is for or what is wrong with it."""
    entry = {"name": distribution, "version": None, "extra": extra, "note": purpose}
    try:
        present = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        present = False
    if present:
        try:
            entry["version"] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            entry["version"] = "unknown"
        if module == "torchvision":
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
    archs = (_backend.build_info() or {"cuda_archs": []})["cuda_archs"]
    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "index": index,
                "name": found.name,
                "capability": f"{found.major}.{found.minor}",
                "memory_gib": round(found.total_memory / 2**30, 1),
                "compiled_for": _backend.serves_capability(archs, found.major, found.minor),
            }
        )
    reason = None
    if not devices and torch.version.cuda is None:
        reason = f"torch {torch.__version__} was built without CUDA"
    elif not devices:
        reason = "torch sees no device; check the driver with nvidia-smi"
    return {"torch_cuda": torch.version.cuda, "devices": devices, "reason": reason}


def _operators() -> list[dict[str, str]]:
    rows = []
    for name, purpose in _backend.OPERATORS.items():
        for device in ("cpu", "cuda"):
            backend, why = _backend_on(name, device)
            rows.append({"operator": name, "purpose": purpose, "device": device, "backend": backend, "why": why})
    for name, purpose in _backend.TRITON_OPERATORS.items():
        backend, why = _backend_on(name, "cuda")
        rows.append({"operator": name, "purpose": purpose, "device": "cuda", "backend": backend, "why": why})
    return rows


def _backend_on(name: str, device: str) -> tuple[str, str]:
    """Which implementation serves an operator on a device, and the reason."""
    if device == "cuda" and not torch.cuda.is_available():
        return "-", "no CUDA device here"
    if device == "cuda" and name.startswith("macenko"):
        return _macenko_on_cuda(name)
    if device == "cuda" and supports_device(torch.empty(1, 1, 1, 1, device="cuda")):
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
    rows = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
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
