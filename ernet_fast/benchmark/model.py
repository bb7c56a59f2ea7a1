"""``ernet-fast bench model``: an ER-ResNet beside what one would take in its place, trained and deployed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ernet_fast import __version__
from ernet_fast.benchmark.er_questions import agreement_within, bound
from ernet_fast.benchmark.interleaved import percentiles, time_interleaved
from ernet_fast.benchmark.macenko_peers import reason_of
from ernet_fast.benchmark.networks import MODELS, Network, inference_of, networks, random_batch, training_of
from ernet_fast.benchmark.run import device_of, wait_for
from ernet_fast.benchmark.tensor_memory import activation_peak, held_bytes, training_peak
from ernet_fast.console.progress import Reporter
from ernet_fast.diagnosis import diagnose

ROUNDS = 25
LAYERS = 152  # of the deepest: how far roundings may take two of its twins apart


@dataclass(frozen=True)
class ModelBenchConfig:
    """What is measured, where and how long.

    Attributes:
        model: one of `MODELS`.
        batch: images of a step, and of a forward pass in evaluation.
        size: pixels a side.
        seconds: about how long the timing takes; five rounds are made in any case, and warm-up, memory and compiling
            come on top.
        device: "auto", "cpu" or "cuda".
        compiled: with the naive composition under torch.compile, which compiles for minutes where nothing is cached.
    """

    model: str = "er_resnet50"
    batch: int = 8
    size: int = 224
    seconds: float = 60.0
    device: str = "auto"
    compiled: bool = True

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"model={self.model!r}; expected one of {', '.join(MODELS)}.")
        if not 2 <= self.batch <= 4096:
            raise ValueError(f"batch={self.batch}; expected 2 to 4096 images: BatchNorm needs more than one value.")
        if not 32 <= self.size <= 4096:
            raise ValueError(f"size={self.size}; expected 32 to 4096 pixels a side.")
        if not 0 < self.seconds < 86400:
            raise ValueError(f"seconds={self.seconds:g}; expected more than 0, and less than a day.")


def run_model_bench(config: ModelBenchConfig, reporter: Reporter) -> dict[str, Any]:
    """All figures, as plain values: the settings, `machine`, `packages`, and `networks`, one dict each.

    Times are in ms, memory in bytes of tensors: `peak_bytes` with parameters, gradients and the optimiser's state,
    `activation_bytes` without.

    Raises:
        RuntimeError: the ER-ResNet, lean or not, does not compute what the naive one does; nothing is timed then.
        ValueError: there is no such device.
    """
    device = device_of(config.device)
    wait = wait_for(device)
    images, labels = random_batch(config.batch, config.size, device)
    found = networks(config.model, device, config.compiled)
    rows: dict[str, dict[str, Any]] = {}
    missing: list[dict[str, str]] = []
    with reporter.task("bench model", 2 * len(found) + 2) as task:
        task.advance(0, "comparing results")
        _check_twins(found, images)
        steps: dict[str, Callable[[], None]] = {}
        for network in found:
            task.advance(1, f"memory: {network.name}" + (" (compiling)" if network.compiled else ""))
            try:
                step, rows[network.key] = _memory(network, images, labels, device)
            except Exception as error:  # a compiler that is not there, say: the others are measured
                missing.append({"name": network.name, "reason": reason_of(error)})
                continue
            steps[network.key] = step
        task.advance(1, "training steps")
        _add(rows, "step", steps, 0.75 * config.seconds, config.batch, wait)
        for network in found:
            network.model.zero_grad(set_to_none=True)
        steps.clear()
        gc.collect()
        forwards = {}
        for network in found:
            task.advance(1, f"inference: {network.name}")
            forward = inference_of(network, images) if network.key in rows else None
            if forward is not None:
                forward()
                forwards[network.key] = forward
        task.advance(1, "inference")
        _add(rows, "inference", forwards, 0.25 * config.seconds, config.batch, wait)
    return {
        "version": __version__,
        **_where(device),
        **asdict(config),
        "missing": missing,
        "networks": list(rows.values()),
    }


def _where(device: torch.device) -> dict[str, Any]:
    found = diagnose()
    return {
        "machine": found["machine"],
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "packages": {package["name"]: package["version"] for package in found["packages"] if package["version"]},
        "compiled_operators": found["extension"]["available"],
        "isa": (found["extension"]["build"] or {}).get("isa"),
    }


def _check_twins(found: list[Network], images: Tensor) -> None:
    """Raise RuntimeError unless the networks with one set of weights compute the same in training."""
    twins = [network for network in found if network.twin and not network.compiled]
    outputs = {network.key: network.model(images).detach() for network in twins}
    limit = bound(512 * 9, LAYERS)
    for key, output in outputs.items():
        agreement = agreement_within(limit, [output], [outputs["naive"]])
        if not agreement.same:
            raise RuntimeError(
                f"the result of {key!r} is wrong, so no speed is reported: {agreement.detail} from the naive network, "
                f"at most {limit:.1g} expected"
            )


def _memory(
    network: Network, images: Tensor, labels: Tensor, device: torch.device
) -> tuple[Callable[[], None], dict[str, Any]]:
    """A training step of the network after one that warms up, and what memory it takes."""
    step, optimizer = training_of(network.model, images, labels)
    step()
    if device.type == "cuda":
        peak, activations = _cuda_peaks(network, step, optimizer)
    else:
        peak = training_peak(network.model, optimizer, step)
        activations = activation_peak(network.model, images, labels)
    return step, {
        "key": network.key, "name": network.name, "parameters": network.parameters, "peak_bytes": peak,
        "activation_bytes": activations,
    }  # fmt: skip


def _cuda_peaks(network: Network, step: Callable[[], None], optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """The most during a step, with and without parameters and what is held for them."""
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated() - before
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    held = held_bytes([*network.model.parameters(), *network.model.buffers(), *state])
    gradients = held_bytes(p.grad for p in network.model.parameters() if p.grad is not None)
    return held + most, max(0, most - gradients)


def _add(
    rows: Mapping[str, dict[str, Any]],
    what: str,
    calls: Mapping[str, Callable[[], Any]],
    seconds: float,
    images: int,
    wait: Callable[[], Any],
) -> None:
    """Time all calls interleaved, and write percentiles and rates into the rows."""
    for key, values in time_interleaved(calls, ROUNDS, budget=seconds, wait=wait).items():
        figures = percentiles(values, 1e3)
        rows[key][what] = {f"{name}_ms": value for name, value in figures.items()} | {"repeats": len(values)}
        rows[key][f"{what}_images_per_second"] = 1e3 * images / figures["p50"]
