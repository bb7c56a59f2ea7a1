"""On CUDA: every plan of csrc/macenko/cuda/plan.h gives the same bits, in every call, on every kind of image."""

from __future__ import annotations

import pytest
import torch
from stain_images import batch, load, real_parameters, synthetic_tissue

from ernet_fast import _backend
from ernet_fast.stain import MacenkoNormalizer, macenko_augment, macenko_fit, macenko_normalize, torch_backend

pytestmark = pytest.mark.gpu
TARGET = MacenkoNormalizer().target
MEAN, STD = (0.7, 0.5, 0.6), (0.2, 0.25, 0.3)
PLANS = ["streaming", "resident", "cluster2", "cluster8", "cluster16"]
SIZES = [(3, 1, 1), (2, 4, 4), (3, 7, 11), (2, 33, 65), (5, 96, 100), (300, 64, 64), (2, 224, 224), (3, 460, 700)]
LARGEST = {"resident": 224 * 224, "cluster2": 300 * 300}  # pixels; the others hold every size here


@pytest.fixture(params=PLANS)
def plan(request, monkeypatch):
    if reason := torch_backend.why_no_kernels(torch.cuda.current_device()):
        pytest.fail(f"a CUDA device is present, but {reason}")
    capability = torch.cuda.get_device_capability()
    if request.param.startswith("cluster") and capability < (9, 0):
        pytest.skip("clusters need compute capability 9.0")
    if request.param == "cluster16" and capability[0] not in (9, 10):
        pytest.skip("clusters of 16 blocks need compute capability 9.0 or 10.0")
    optin = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    if optin < 3 * 224 * 224 + 24 * 1024 and request.param != "streaming":
        monkeypatch.setitem(LARGEST, request.param, 64 * 64)
    ask_for(request.param)
    yield request.param
    ask_for("auto")


def ask_for(plan):
    _backend.extension().set_macenko_plan(plan)


def tissue(count, height, width, channels_last=False):
    """With a white and a black image among more than three."""
    images = batch(*(synthetic_tissue(height, width, seed % 7) for seed in range(count)))
    if count > 3:
        images[1], images[2] = 255, 0
    return images.to(memory_format=torch.channels_last) if channels_last else images


def everything(images):
    """Results of all calls that a plan serves."""
    fit = macenko_fit(images)
    out = [*fit, *macenko_normalize(images, TARGET, on_degenerate="identity", return_status=True)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out.append(macenko_normalize(images, TARGET, output=dtype, mean=MEAN, std=STD))
    return [*out, macenko_augment(images, generator=torch.Generator().manual_seed(1))]


def same(found, expected):
    return all(torch.equal(a.nan_to_num(-7), b.nan_to_num(-7)) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_plans_agree_and_repeat(plan, size, channels_last):
    if size[1] * size[2] > LARGEST.get(plan, 1 << 30):
        pytest.skip("larger than the shared memory of this plan")
    images = tissue(*size, channels_last).cuda()
    found = everything(images)
    assert same(everything(images), found)
    ask_for("streaming")
    assert same(everything(images), found)
    alone = everything(images[:1])
    assert same(alone[:-1], [part[:1] for part in found[:-1]])
    ask_for("auto")
    assert same(everything(images), found)


def test_fits_equal_the_cpu(plan):
    images = tissue(5, 60, 61)
    found, expected = macenko_fit(images.cuda()), macenko_fit(images)
    assert found.status.tolist() == expected.status.tolist()
    for a, b in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_distributions_that_mislead_a_sample(plan):
    """Lists that overflow or miss: half of the pixels of one colour, sorted pixels, very little tissue."""
    generator = torch.Generator().manual_seed(4)
    colours = torch.tensor([[100, 50, 120], [101, 50, 120], [160, 90, 150], [200, 150, 190]], dtype=torch.uint8)
    shares = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.49, 0.01, 0.01, 0.49]])
    few = colours[torch.multinomial(shares, 200 * 200, replacement=True, generator=generator)]
    ordinary = batch(synthetic_tissue(200, 200, 1)).flatten(2).permute(0, 2, 1)
    by_brightness = ordinary[:, ordinary[0].sum(1, dtype=torch.int64).argsort(stable=True)]
    little = torch.full_like(ordinary, 245)
    little[:, 77::3000] = ordinary[:, 77::3000] // 2
    images = torch.cat([few, ordinary, by_brightness, little]).permute(0, 2, 1).reshape(-1, 3, 200, 200).contiguous()
    found, expected = macenko_fit(images.cuda()), macenko_fit(images)
    assert found.status.tolist() == expected.status.tolist()
    for a, b in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("parameter", real_parameters()[:4])
def test_real_crops_equal_the_cpu(plan, parameter):
    images = batch(load(parameter)[:60, :64])
    found, expected = macenko_normalize(images.cuda(), TARGET).cpu(), macenko_normalize(images, TARGET)
    difference = (found.int() - expected.int()).abs()
    assert difference.max() <= 1 and (difference == 0).double().mean() >= 0.9995


def test_plans_are_captured_in_graphs(plan):
    images, other = tissue(4, 64, 64).cuda(), tissue(4, 64, 64).flip(0).cuda()
    target = type(TARGET)(*(part.cuda() for part in TARGET))
    macenko_normalize(images, target)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, status = macenko_normalize(images, target, return_status=True)
        network = macenko_normalize(images, target, output=torch.bfloat16)
    images.copy_(other)
    graph.replay()
    found = [out, status, network]
    expected = macenko_normalize(other, target, return_status=True)
    assert same(found, [*expected, macenko_normalize(other, target, output=torch.bfloat16)])


def test_unknown_and_impossible_plans_are_refused():
    images = tissue(1, 8, 8).cuda()
    with pytest.raises(ValueError, match="ERNET_MACENKO_PLAN=fastest; expected auto, streaming"):
        ask_for("fastest")
    ask_for("cluster3")
    try:
        with pytest.raises(RuntimeError, match="does not support these images"):
            macenko_fit(images)
    finally:
        ask_for("auto")
