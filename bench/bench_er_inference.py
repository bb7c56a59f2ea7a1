"""How long is inference with an optimised ER-ResNet against the plain ResNet with its BatchNorms folded?

Float32, all cores, 224 x 224, within PyTorch and, where they are installed, within onnxruntime and OpenVINO: the graph
of `export_network` against the plain network's in the same runtime, both exported with torch's exporter on
torch.export. `compiled` is the folded plain network under torch.compile (with --compiled). All results are compared
with PyTorch's before anything is timed.

Run: python3 dev.py bench bench_er_inference --compiled    (--slow adds the 101-layer net at batch 16)
"""

from __future__ import annotations

import functools
import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contestants import contestants
from er_networks import batch_of, network
from torch import Tensor, nn

from ernet_fast import optimize_for_inference
from ernet_fast.benchmark.networks import folded
from ernet_fast.models import export_network

CASES = [(50, 1), (50, 16), (101, 1), pytest.param(101, 16, marks=pytest.mark.slow)]
RUNTIMES = tuple(name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name))
IN_RUNTIMES = tuple(f"{runtime} {who}" for runtime in RUNTIMES for who in ("er", "plain"))
FOLDER = tempfile.TemporaryDirectory()
Call = Callable[[], Any]


@functools.cache
def trained(name: str, depth: int) -> nn.Module:
    """A network in evaluation whose statistics are of something."""
    model = network(name, depth)
    with torch.no_grad():
        model(batch_of(4, 64)[0])
    return model.eval()


@functools.cache
def optimized(who: str, depth: int) -> nn.Module:
    """The network as it is deployed: BatchNorms folded, the ER network by this library's own call."""
    model = trained("fused" if who == "er" else "plain", depth)
    return (optimize_for_inference if who == "er" else folded)(model).requires_grad_(False)


@functools.cache
def exported(who: str, depth: int) -> Path:
    """Its ONNX graph, of any number of images, of one size."""
    file, images = Path(FOLDER.name) / f"{who}-{depth}.onnx", batch_of(2)[0].contiguous()
    if who == "er":
        export_network(trained("fused", depth), file, images, format="onnx", dynamic_size=False)
        return file
    shapes = ({0: torch.export.Dim("n", min=1, max=65536)},)
    names: Any = {"input_names": ["images"], "output_names": ["logits"], "verbose": False}
    with torch.no_grad():
        program: Any = torch.onnx.export(optimized(who, depth), (images,), dynamo=True, dynamic_shapes=shapes, **names)
    program.save(file)
    return file


def in_onnxruntime(file: Path, images: Tensor, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    array = images.contiguous().numpy()
    return lambda: session.run(None, {"images": array})[0]


def in_openvino(file: Path, images: Tensor, threads: int) -> Call:
    import openvino

    graph = openvino.Core().read_model(str(file))
    graph.reshape(list(images.shape))
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(graph, "CPU", options)
    array = images.contiguous().numpy()
    return lambda: compiled(array)[0]


def calls_of(depth: int, batch: int, threads: int, with_compiled: bool) -> dict[str, Call]:
    """The forward passes of all contestants, whose results agree with PyTorch's."""
    images, _ = batch_of(batch)
    calls: dict[str, Call] = {who: functools.partial(optimized(who, depth), images) for who in ("er", "plain")}
    if with_compiled:
        calls["compiled"] = functools.partial(torch.compile(optimized("plain", depth), dynamic=False), images)
    calls = {who: torch.no_grad()(call) for who, call in calls.items()}
    for runtime in RUNTIMES:
        make = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}[runtime]
        calls |= {f"{runtime} {who}": make(exported(who, depth), images, threads) for who in ("er", "plain")}
    expected = {who: calls[who]() for who in ("er", "plain")}
    for name, call in calls.items():
        logits = expected["er" if name.split()[-1] == "er" else "plain"]
        limit = 1e-3 * float(logits.abs().max())
        torch.testing.assert_close(torch.as_tensor(call()), logits, rtol=1e-3, atol=limit, msg=name)
    return calls


@contestants("er", "plain", "compiled", *IN_RUNTIMES)
@pytest.mark.parametrize(("depth", "batch"), CASES)
def test_inference(interleave, record_row, torch_threads, with_compiled, depth, batch, who):
    threads = len(os.sched_getaffinity(0))
    torch_threads(threads)
    make = functools.partial(calls_of, depth, batch, threads, with_compiled)
    figures = interleave(make, rounds=15, budget=30.0).figures("er")
    if who != "er":
        return
    shares = {"plain_share": figures["er_ms"] / figures["plain_ms"]}
    if "compiled_ms" in figures:
        shares["compiled_share"] = figures["er_ms"] / figures["compiled_ms"]
    for runtime in RUNTIMES:
        shares[f"{runtime}_share"] = figures[f"{runtime}_er_ms"] / figures[f"{runtime}_plain_ms"]
    targets = ["plain_share <= 1.0", *["compiled_share <= 1.05"] * ("compiled_share" in shares)]
    record_row(
        "inference", **figures, **shares, peer="plain ResNet, folded", peer_p50=figures["plain_ms"], target=targets
    )  # fmt: skip
