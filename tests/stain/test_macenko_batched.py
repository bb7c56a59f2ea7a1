"""The batched torch operations that serve GPUs without kernels, on CPU tensors: against the reference, bit for bit for
any batch, and without an operation that would wait for a device.
"""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from stain_images import batch, load, real_parameters, synthetic_tissue
from torch.utils._python_dispatch import TorchDispatchMode

from ernet_fast import _backend, reference
from ernet_fast.stain import (
    MacenkoNormalizer,
    MacenkoStatus,
    macenko_augment,
    macenko_fit,
    macenko_normalize,
    operators,
    pipeline,
    separate,
    torch_backend,
)
from ernet_fast.stain.principal_plane import principal_plane
from ernet_fast.stain.result import published_stains

TARGET = MacenkoNormalizer().target
IMAGES = batch(*(synthetic_tissue(61, 47, seed) for seed in range(4)))
# Fixed-point ODs are off by at most 1.5 units of 2^-24, and eigenvectors by that times the ratio of the OD's spread to
# the eigenvalue gap, which is below 30 in these images.
STAIN_TOLERANCE = 30 * 1.5 * 2.0**-24
DTYPES = [torch.uint8, torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture
def composed(monkeypatch):
    """Every call takes the path of a GPU for which there are no kernels."""
    monkeypatch.setattr(operators, "_is_compiled_for", lambda images: False)
    monkeypatch.setattr(operators, "is_composed", lambda images: True)


def with_bad_images(dtype):
    """Tissue, a white image, tissue, one colour, and in floating point one with NaN."""
    images = IMAGES.to(dtype).clone()
    images[1] = 255
    images[3] = torch.tensor([60, 120, 180])[:, None, None].to(dtype)
    statuses = [MacenkoStatus.OK, MacenkoStatus.TOO_FEW_TISSUE_PIXELS, MacenkoStatus.OK, MacenkoStatus.RANK_DEFICIENT]
    if dtype == torch.uint8:
        return images, statuses
    broken = images[:1].clone()
    broken[0, 1, 5, 7] = math.nan
    return torch.cat([images, broken]), [*statuses, MacenkoStatus.NON_FINITE]


def assert_same_image(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    if found.dtype == torch.uint8:
        difference = (found.int() - expected.int()).abs()
        assert difference.max() <= 1 and (difference != 0).float().mean() <= 5e-4
    else:
        # Exponents, below 6, amplify what the stains differ by; the result is rounded to its dtype.
        rtol = 6 * STAIN_TOLERANCE + torch.finfo(found.dtype).eps
        torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("percentile", ["linear", "nearest"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fit_equals_the_reference(composed, dtype, percentile):
    images, statuses = with_bad_images(dtype)
    expected = reference.macenko_fit(images, percentile=percentile)
    found = macenko_fit(images, percentile=percentile)
    assert found.status.tolist() == expected.status.tolist() == statuses
    torch.testing.assert_close(found.stain_matrix, expected.stain_matrix, rtol=0, atol=STAIN_TOLERANCE, equal_nan=True)
    torch.testing.assert_close(
        found.max_concentration, expected.max_concentration, rtol=STAIN_TOLERANCE, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("policy", ["reference", "identity"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_normalisation_equals_the_reference(composed, dtype, channels_last, policy):
    images, statuses = with_bad_images(dtype)
    images = images.to(memory_format=torch.channels_last) if channels_last else images
    before = images.clone()
    source = macenko_fit(images)
    for given in (None, source):
        expected = reference.macenko_normalize(images, TARGET, given, on_degenerate=policy)
        found, status = macenko_normalize(images, TARGET, given, on_degenerate=policy, return_status=True)
        assert found.stride() == images.stride() and status.tolist() == statuses
        assert_same_image(found, expected)
    assert torch.equal(images.nan_to_num(7), before.nan_to_num(7)), "the input is not modified"
    with pytest.raises(ValueError, match="image 1: fewer than 10 tissue pixels; image 3: the tissue colours"):
        macenko_normalize(images, TARGET, on_degenerate="raise")


@pytest.mark.parametrize("parameter", real_parameters()[:4])
def test_real_images_equal_the_reference(composed, parameter):
    image = load(parameter)
    expected = reference.macenko_normalize(image, TARGET)
    difference = np.abs(macenko_normalize(image, TARGET).astype(int) - expected)
    assert difference.max() <= 1 and (difference == 0).mean() >= 0.9995


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_results_do_not_depend_on_the_batch(composed, dtype, monkeypatch):
    images, _ = with_bad_images(dtype)
    whole = (macenko_normalize(images, TARGET), *macenko_fit(images))
    monkeypatch.setattr(torch_backend, "PIXELS_AT_A_TIME", 3 * 61 * 47)
    groups = (macenko_normalize(images, TARGET), *macenko_fit(images))
    ones = [(macenko_normalize(one, TARGET), *macenko_fit(one)) for one in images.split(1)]
    for a, b, c in zip(whole, groups, (torch.cat(parts) for parts in zip(*ones, strict=True)), strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)) and torch.equal(a.nan_to_num(7), c.nan_to_num(7))


@pytest.mark.skipif(not _backend.extension_available(), reason="needs the compiled operators")
class TestAgainstTheOperators:
    def test_everything_else_of_the_interface(self, monkeypatch):
        images, _ = with_bad_images(torch.float32)
        listed = [IMAGES[0], IMAGES[1, :, :33], IMAGES[2]]
        mask = torch.rand((len(images), 61, 47), generator=torch.Generator().manual_seed(1)) < 0.7
        mask[0] = False

        def everything():
            parts = separate(images, target=TARGET)
            normalizer = MacenkoNormalizer()
            return [
                macenko_augment(images, generator=torch.Generator().manual_seed(3)),
                *parts,
                *normalizer.normalize(images),
                *macenko_normalize(listed, TARGET),
                macenko_normalize(images, TARGET, mask=mask),
                *macenko_fit(images, mask=mask),
                macenko_normalize(images, TARGET, output=torch.float32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)),
            ]

        expected = everything()
        monkeypatch.setattr(operators, "_is_compiled_for", lambda images: False)
        monkeypatch.setattr(operators, "is_composed", lambda images: True)
        for found, wanted in zip(everything(), expected, strict=True):
            assert found.dtype == wanted.dtype and found.stride() == wanted.stride()
            if found.dtype in (torch.uint8, torch.int32):
                assert (found.int() - wanted.int()).abs().max() <= 1
            else:
                # Compiled code computes values of floats in float32: exponents below 16, eight roundings each, twice.
                torch.testing.assert_close(found, wanted, rtol=16 * 2.0**-24 * 16, atol=1e-5, equal_nan=True)

    def test_masks_give_the_bits_of_the_masked_pixels(self, composed):
        mask = torch.rand((4, 61, 47), generator=torch.Generator().manual_seed(2)) < 0.6
        mask[3] = False
        found = macenko_fit(IMAGES, mask=mask)
        assert found.status.tolist() == [0, 0, 0, MacenkoStatus.TOO_FEW_TISSUE_PIXELS]
        for i in range(3):
            alone = macenko_fit(IMAGES[i][:, mask[i]][:, None])
            for a, b in zip(found, alone, strict=True):
                assert torch.equal(a[i : i + 1], b)


WAITING = {
    "aten::_local_scalar_dense": "reads a value",
    "aten::nonzero": "counts",
    "aten::masked_select": "counts",
    "aten::lift_fresh": "makes a tensor of Python numbers, which a GPU would have to be sent",
    "aten::_linalg_eigh": "reads its error code",
    "aten::linalg_eigh": "reads its error code",
    "aten::equal": "reads a value",
    "aten::unique_dim": "counts",
    "aten::_unique2": "counts",
    "aten::repeat_interleave.Tensor": "counts",
}


class NothingWaits(TorchDispatchMode):
    """Fails at an operation for which the host would have to wait for a device, or a boolean mask as an index."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function._schema.name
        assert name not in WAITING and function.name() not in WAITING, f"{name} {WAITING.get(name)}"
        if name in ("aten::index", "aten::index_put_"):
            assert all(index is None or index.dtype != torch.bool for index in arguments[1]), "a mask is counted"
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_nothing_waits_for_the_device(composed, dtype, monkeypatch):
    # Checks of values that are made on the CPU only.
    monkeypatch.setattr(pipeline, "is_readable", lambda values: False)
    published_stains()  # made once, on the CPU, and sent from pinned memory
    images, _ = with_bad_images(dtype)
    mask = torch.ones(len(images), 61, 47, dtype=torch.bool)
    normalizer = MacenkoNormalizer(on_degenerate="identity")
    source = macenko_fit(images)
    with NothingWaits():
        torch_backend.macenko_normalize(images, *TARGET[:2], 240.0, 1.0, 0.15, False, False)
        normalizer(images)
        normalizer(images, source)
        normalizer.normalize(images)
        macenko_normalize(images, TARGET, mask=mask)
        macenko_augment(images)
        separate(images)
        with pytest.raises(AssertionError, match="reads a value"):
            float(images.sum())
        with pytest.raises(AssertionError, match="a mask is counted"):
            images[images > 3]


def test_directions_of_hard_matrices():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(360, 3, 3, generator=generator, dtype=torch.float64)).Q
    values = torch.tensor(
        [
            [1e-4, 2e-2, 0.3],
            [1e-9, 1e-2, 0.3],
            [0.3, 0.3, 0.3],
            [0.0, 0.0, 0.0],
            [0.0, 0.0, 1.0],
            [1e-17, 2e-17, 1.0],
            [1e-3, 0.5, 0.5],
            [0.1, 0.1, 0.5],
            [0.1, 0.5, 0.5 + 1e-9],
        ],
        dtype=torch.float64,
    ).repeat(40, 1)
    matrices = (basis * values[:, None]) @ basis.mT
    matrices = torch.cat([(matrices + matrices.mT) / 2, torch.diag_embed(values)])
    upper = tuple(matrices[:, i, j] for i, j in torch_backend.PAIRS)
    found = principal_plane(upper)
    expected = torch.linalg.eigvalsh(matrices)
    scale = expected.abs().amax(dim=1).clamp(min=1e-300)
    first, second = found.first, found.second
    eps = 64 * torch.finfo(torch.float64).eps
    assert ((found.middle - expected[:, 1]).abs() <= eps * scale).all()
    for vector, value in ((first, expected[:, 1]), (second, expected[:, 2])):
        assert (vector.norm(dim=1) - 1).abs().max() <= eps
        residual = torch.einsum("bij,bj->bi", matrices, vector) - value[:, None] * vector
        assert (residual.norm(dim=1) <= eps * scale).all()
    assert (first * second).sum(dim=1).abs().max() <= eps


@pytest.mark.parametrize(
    ("available", "architectures", "capability", "reason"),
    [
        (True, ["80", "90a"], (9, 0), None),
        (True, ["80", "90a"], (8, 6), None),
        (True, ["80", "120"], (13, 0), None),
        (True, ["80", "90a"], (7, 5), r"compiled for 80, 90a, and the device has compute capability 7\.5"),
        (True, ["90a"], (10, 0), "ERNET_CUDA_ARCHS=100"),
        (False, [], (9, 0), "built without CUDA kernels"),
    ],
)
def test_why_no_kernels_serve_a_device(monkeypatch, available, architectures, capability, reason):
    monkeypatch.setattr(_backend, "extension_available", lambda: True)
    monkeypatch.setattr(_backend, "build_info", lambda: {"cuda_archs": architectures})
    monkeypatch.setattr(torch_backend, "cuda_kernels_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = torch_backend.why_no_kernels.__wrapped__(0)
    assert found is None if reason is None else re.search(reason, found)
