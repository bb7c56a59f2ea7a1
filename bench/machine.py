"""What a record says of the machine and of the tree it was made from."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from this_tree import processor

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "triton", "torchstain", "stainx", "torch-staintools", "tiatoolbox")
SOURCES = ("setup.py", "csrc", "ernet_fast", "tests")
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh")


def output_of(*command: str, root: Path = ROOT) -> str:
    """What a command prints, or "" where it cannot run or fails."""
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def sources_hash(root: Path = ROOT) -> str:
    """A name for the state of the files that decide what is built, measured and tested; needs no git."""
    digest = hashlib.sha256()
    for path in (root / name for name in SOURCES):
        for file in sorted([path] if path.is_file() else path.rglob("*")):
            if file.suffix in SUFFIXES and file.is_file():
                content = file.read_bytes()
                digest.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def commit_of(root: Path = ROOT) -> tuple[str, bool]:
    """Nine digits of the commit and whether tracked files differ from it; $ERNET_COMMIT where there is no git."""
    commit = output_of("git", "rev-parse", "--short=9", "HEAD", root=root)
    if not commit:
        return os.environ.get("ERNET_COMMIT", "unknown")[:9], False
    return commit, bool(output_of("git", "status", "--porcelain", "--untracked-files=no", root=root))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_state() -> dict[str, str]:
    """Clocks, power and temperature at this moment; empty where nvidia-smi is missing or has no answer."""
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")
    values = of_gpu(*fields).split(", ")
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def of_gpu(*fields: str) -> str:
    """What nvidia-smi says of the first device, separated by commas."""
    return output_of("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", "0")


def describe(kind: str, root: Path = ROOT) -> dict[str, Any]:
    """The description of this machine and tree: `kind` is "cpu" or "gpu", what the rows are measured on."""
    commit, dirty = commit_of(root)
    cpu = processor.processor()
    found: dict[str, Any] = {
        "kind": kind,
        "name": f"cpu-{cores()}-cores",
        "cpu": cpu["name"],
        "processor": cpu,
        "cores": cores(),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := version(name))},
        "commit": commit,
        "dirty": dirty,
        "sources": sources_hash(root),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "clocks": [],
    }
    return found | (_gpu() if kind == "gpu" else {})


def _gpu() -> dict[str, Any]:
    import torch

    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": of_gpu("driver_version"),
        "cuda": torch.version.cuda,
        "nvcc": output_of(nvcc, "--version").splitlines()[-1:],
        "clocks": [state] if (state := gpu_state()) else [],
    }
