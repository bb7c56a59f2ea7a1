"""How calls behave on a CUDA device, with the kernels and with torch operations alone: nothing waits, streams and
devices are honoured, graphs are captured, batches change no bits.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from stain_images import batch, synthetic_tissue

from ernet_fast import _backend
from ernet_fast.stain import (
    MacenkoNormalizer,
    MacenkoStatus,
    macenko_augment,
    macenko_fit,
    macenko_normalize,
    separate,
    torch_backend,
)

pytestmark = pytest.mark.gpu
SIZES = [(61, 47), (224, 224)]


@pytest.fixture(params=["kernels", "torch operations"], autouse=True)
def path(request, monkeypatch):
    """Both ways of serving a device."""
    if request.param == "torch operations":
        monkeypatch.setattr(torch_backend, "why_no_kernels", lambda device: "not in this test")
    elif reason := torch_backend.why_no_kernels(torch.cuda.current_device()):
        pytest.fail(f"a CUDA device is present, but {reason}")
    return request.param


def images_of(size, dtype=torch.uint8, count=5):
    """Tissue and one white image, on the device."""
    images = batch(*(synthetic_tissue(*size, seed) for seed in range(count))).to(dtype)
    images[1] = 255
    return images.cuda()


@contextlib.contextmanager
def no_waiting():
    """An error where the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def calls(target):
    """Every call of the interface that need not wait."""
    listed = [images_of(size, count=2)[0] for size in ((61, 47), (33, 65), (61, 47))]
    mask = torch.ones(5, 61, 47, dtype=torch.bool)
    network = {"output": torch.bfloat16, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    return {
        "fit": lambda images: macenko_fit(images),
        "normalize": lambda images: macenko_normalize(images, target),
        "identity": lambda images: macenko_normalize(images, target, on_degenerate="identity"),
        "nearest": lambda images: macenko_normalize(images, target, percentile="nearest"),
        "source": lambda images: macenko_normalize(images, target, target),
        "mask": lambda images: macenko_normalize(images, target, mask=mask),
        "network": lambda images: macenko_normalize(images, target, **network),
        "augment": lambda images: macenko_augment(images),
        "separate": lambda images: separate(images, target=target),
        "list": lambda images: macenko_normalize(listed, target),
        "module": MacenkoNormalizer().cuda(),
        "stains": MacenkoNormalizer().cuda().normalize,
    }


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_results_equal_the_cpu(size, dtype):
    images, target = images_of(size, dtype), MacenkoNormalizer().target
    for percentile in ("linear", "nearest"):
        fit = macenko_fit(images, percentile=percentile)
        expected = macenko_fit(images.cpu(), percentile=percentile)
        assert fit.status.tolist() == expected.status.tolist() == [0, MacenkoStatus.TOO_FEW_TISSUE_PIXELS, 0, 0, 0]
        # Logarithms of floats may differ by one unit of fixed point, 2^-24, and eigenvectors by 30 times that.
        atol = 30 * 2.0**-24
        torch.testing.assert_close(fit.stain_matrix.cpu(), expected.stain_matrix, rtol=0, atol=atol, equal_nan=True)
        torch.testing.assert_close(
            fit.max_concentration.cpu(), expected.max_concentration, rtol=atol, atol=0, equal_nan=True
        )
        found = macenko_normalize(images, target, percentile=percentile).cpu()
        wanted = macenko_normalize(images.cpu(), target, percentile=percentile)
        if dtype == torch.uint8:
            difference = (found.int() - wanted.int()).abs()
            assert difference.max() <= 1 and (difference != 0).float().mean() <= 5e-4
        else:
            # Exponents below 16 in float32, eight roundings each, and what the stains differ by.
            torch.testing.assert_close(found, wanted, rtol=16 * (2.0**-24 * 8 + atol), atol=0)


@pytest.mark.parametrize("target_device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_no_call_waits_for_the_device(dtype, target_device):
    images = images_of((61, 47), dtype)
    target = MacenkoNormalizer().to(target_device).target
    for name, call in calls(target).items():
        call(images)  # modules are loaded and memory is found the first time
        with no_waiting():
            call(images)
        torch.cuda.synchronize()
        assert name
    with pytest.raises(RuntimeError, match="synchronizing"), no_waiting():
        images.sum().item()


@pytest.mark.parametrize("plan", ["streaming", "resident", "cluster2", "cluster8"])
def test_no_plan_waits_for_the_device(path, plan, request):
    if path != "kernels" or (plan.startswith("cluster") and torch.cuda.get_device_capability()[0] < 9):
        pytest.skip("this way of serving a device has no such plan")
    _backend.extension().set_macenko_plan(plan)
    request.addfinalizer(lambda: _backend.extension().set_macenko_plan("auto"))
    images, target = images_of((61, 47)), MacenkoNormalizer().cuda().target
    for name in ("fit", "normalize", "identity", "nearest", "network", "augment"):
        call = calls(target)[name]
        expected = call(images)
        with no_waiting():
            found = call(images)
        if name != "augment":  # which draws anew
            pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
            assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in pairs)


def test_a_call_returns_while_the_device_is_busy():
    images, normalizer = images_of((224, 224)), MacenkoNormalizer().cuda()
    expected = normalizer(images)
    torch.cuda.synchronize()
    torch.cuda._sleep(1 << 31)
    busy = torch.cuda.Event()
    busy.record()
    found = normalizer(images)
    assert not busy.query(), "the call waited for the device"
    assert torch.equal(found, expected)


def test_raise_reads_the_status():
    images = images_of((61, 47))
    with pytest.raises(ValueError, match="image 1: fewer than 10 tissue pixels"):
        macenko_normalize(images, MacenkoNormalizer().target, on_degenerate="raise")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_whole_calls_are_captured_in_graphs(size, dtype):
    images, other = images_of(size, dtype), images_of(size, dtype).flip(0).clone()
    target = MacenkoNormalizer().cuda().target
    normalizer = MacenkoNormalizer(output=torch.bfloat16, on_degenerate="identity").cuda()

    def call(given):
        out, status = macenko_normalize(given, target, return_status=True)
        return out, status, *macenko_fit(given), *(normalizer(given) if dtype == torch.uint8 else ())

    expected = [call(images), call(other)]
    static = images.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(static)
    for given, wanted in ((images, expected[0]), (other, expected[1]), (images, expected[0])):
        static.copy_(given)
        graph.replay()
        for a, b in zip(captured, wanted, strict=True):
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def test_calls_run_on_the_current_stream():
    """The images arrive on a side stream behind a long wait: work on another stream would read them too early."""
    source, normalizer = images_of((61, 47)), MacenkoNormalizer().cuda()
    expected = normalizer(source), *macenko_fit(source)
    for _ in range(3):
        images = torch.zeros_like(source)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            images.copy_(source)
            found = normalizer(images), *macenko_fit(images)
        stream.synchronize()
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_may_be_current():
    images = images_of((61, 47))
    expected = macenko_normalize(images, MacenkoNormalizer().target)
    with torch.cuda.device(1):
        assert torch.equal(macenko_normalize(images, MacenkoNormalizer().target), expected)
        there = macenko_normalize(images.to("cuda:1"), MacenkoNormalizer().target)
        assert there.device.index == 1 and torch.equal(there.cpu(), expected.cpu())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_batches_and_repeats_change_no_bits(size, dtype):
    images, target = images_of(size, dtype), MacenkoNormalizer().cuda().target
    together = images.repeat(30, 1, 1, 1)
    for call in (macenko_fit, lambda part: (macenko_normalize(part, target),)):
        whole, again = call(together), call(together)
        alone = [call(one) for one in images.split(1)]
        for whole_part, again_part, *parts in zip(whole, again, *alone, strict=True):
            assert torch.equal(whole_part.nan_to_num(7), again_part.nan_to_num(7))
            expected = torch.cat(parts).repeat(30, *[1] * (parts[0].ndim - 1))
            assert torch.equal(whole_part.nan_to_num(7), expected.nan_to_num(7))


def test_one_bad_image_changes_no_other():
    images, target = images_of((61, 47), torch.float32), MacenkoNormalizer().cuda().target
    expected = macenko_normalize(images, target)
    broken = images.clone()
    broken[3, 1, 5, 7] = float("nan")
    found, status = macenko_normalize(broken, target, return_status=True)
    assert status.tolist() == [0, MacenkoStatus.TOO_FEW_TISSUE_PIXELS, 0, MacenkoStatus.NON_FINITE, 0]
    kept = [0, 1, 2, 4]
    assert torch.equal(found[kept], expected[kept])


def test_masks_have_the_bits_of_the_masked_pixels_fitted_alone(path):
    images = images_of((61, 47))
    mask = torch.rand((5, 61, 47), generator=torch.Generator().manual_seed(2)) < 0.6
    found = macenko_fit(images, mask=mask.cuda())
    expected = macenko_fit(images.cpu(), mask=mask)
    assert found.status.tolist() == expected.status.tolist()
    # Moments are the CPU's bits; the rest is float64 in another order.
    torch.testing.assert_close(found.stain_matrix.cpu(), expected.stain_matrix, rtol=0, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(
        found.max_concentration.cpu(), expected.max_concentration, rtol=1e-9, atol=0, equal_nan=True
    )
