"""The operators as torch sees them: schema, fake kernels, autograd, compile, and their own argument checks."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from stain_images import batch, synthetic_tissue

from ernet_fast import _backend, reference
from ernet_fast.stain import MacenkoFit, MacenkoNormalizer, macenko_fit, macenko_normalize

compiled = pytest.mark.skipif(not _backend.extension_available(), reason="the compiled operators are not built")
TARGET = MacenkoNormalizer().target
STAINS = TARGET.stain_matrix, TARGET.max_concentration


def some_images(dtype, channels_last):
    images = batch(*(synthetic_tissue(19, 23, seed) for seed in range(2))).to(dtype)
    return images.to(memory_format=torch.channels_last) if channels_last else images


@compiled
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_opcheck(dtype, channels_last):
    images = some_images(dtype, channels_last)
    ops = torch.ops.ernet
    torch.library.opcheck(ops.macenko_fit.default, (images, 240.0, 1.0, 0.15, False))
    torch.library.opcheck(ops.macenko_reconstruct.default, (images, *STAINS, *STAINS, 240.0))
    torch.library.opcheck(ops.macenko_normalize.default, (images, *STAINS, 240.0, 1.0, 0.15, True, False))
    torch.library.opcheck(ops.macenko_reconstruct_stains.default, (images, *STAINS, *STAINS, 240.0))
    changes = torch.rand((2, 2, 2), dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    torch.library.opcheck(ops.macenko_change.default, (images, *STAINS, *changes, 240.0))
    torch.library.opcheck(ops.macenko_augment.default, (images, *STAINS, *changes, 240.0, 1.0, 0.15, True, False))


@compiled
def test_operators_check_their_arguments():
    ops = torch.ops.ernet
    images = some_images(torch.uint8, False)
    with pytest.raises(RuntimeError, match=r"\[B, 3, H, W\]; got \[2, 19, 23\]"):
        ops.macenko_fit(images[:, 0], 240.0, 1.0, 0.15, False)
    with pytest.raises(RuntimeError, match=r"contiguous\(\)"):
        ops.macenko_fit(images[..., ::2], 240.0, 1.0, 0.15, False)
    rows = images[:, :, 2:10]  # planes that do not follow each other
    for found, expected in zip(
        ops.macenko_fit(rows, 240.0, 1.0, 0.15, False),
        ops.macenko_fit(rows.clone(), 240.0, 1.0, 0.15, False),
        strict=True,
    ):
        assert torch.equal(found, expected)
    with pytest.raises(RuntimeError, match="channels of planar images must follow each other"):
        ops.macenko_reconstruct(rows, *STAINS, *STAINS, 240.0)
    with pytest.raises(RuntimeError, match="channels of planar images must follow each other"):
        ops.macenko_normalize(rows, *STAINS, 240.0, 1.0, 0.15, True, False)
    with pytest.raises(RuntimeError, match="uint8, float32 or float64"):
        ops.macenko_fit(images.to(torch.int16), 240.0, 1.0, 0.15, False)
    with pytest.raises(RuntimeError, match="Io must be in"):
        ops.macenko_fit(images, 0.0, 1.0, 0.15, False)
    with pytest.raises(RuntimeError, match="alpha must be in"):
        ops.macenko_fit(images, 240.0, 60.0, 0.15, False)
    with pytest.raises(RuntimeError, match="source_stain of image 0 is not finite"):
        ops.macenko_reconstruct(images, STAINS[0] * math.nan, STAINS[1], *STAINS, 240.0)
    with pytest.raises(RuntimeError, match=r"gain must be \[2, 2\] float64.*got \[1, 2\]"):
        ops.macenko_change(images, *STAINS, torch.ones(1, 2, dtype=torch.float64), torch.ones(2, 2), 240.0)
    with pytest.raises(RuntimeError, match="float64"):
        ops.macenko_reconstruct(images, STAINS[0].float(), STAINS[1].float(), *STAINS, 240.0)
    with pytest.raises(RuntimeError, match=r"B = 1 or 2; got \[3, 3, 2\]"):
        ops.macenko_reconstruct(images, torch.cat([STAINS[0]] * 3), torch.cat([STAINS[1]] * 3), *STAINS, 240.0)


def double_images():
    """Values away from 255, where the clip has no derivative."""
    return batch(synthetic_tissue(5, 7, 1), synthetic_tissue(5, 7, 2)).double().clamp(max=200).requires_grad_()


def test_gradcheck_to_the_image_and_the_stains():
    images = double_images()
    fits = macenko_fit(batch(synthetic_tissue(30, 30, 1), synthetic_tissue(30, 30, 2)))
    parts = [fits.stain_matrix, fits.max_concentration, *STAINS]
    parts = [part.clone().requires_grad_() for part in parts]

    def reconstruct(images, source_stain, source_max, target_stain, target_max):
        source = MacenkoFit(source_stain, source_max, torch.zeros(2, dtype=torch.int32))
        target = MacenkoFit(target_stain, target_max, torch.zeros(1, dtype=torch.int32))
        return macenko_normalize(images, target, source)

    assert torch.autograd.gradcheck(reconstruct, (images, *parts), eps=1e-6, atol=1e-5, rtol=1e-5)


def rebuilt_by_formula(images, source_stain, source_max, target_stain, target_max):
    """min(Io exp(-HE_target diag(max_target / max_source) pinv(HE_source) OD), 255) in torch's own operations."""
    od = -((images.flatten(2) + 1) / 240).log()
    gain = torch.diag_embed(target_max / source_max)
    exponents = target_stain @ gain @ torch.linalg.pinv(source_stain) @ od
    return (240 * (-exponents).exp()).clamp(max=255).reshape(images.shape)


@pytest.mark.parametrize("targets", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_are_those_of_the_formula(channels_last, targets):
    """For the images and for every stain parameter, clipped values included."""
    images = batch(synthetic_tissue(31, 23, 1), synthetic_tissue(31, 23, 2)).double()
    images = images.contiguous(memory_format=torch.channels_last) if channels_last else images
    fits = macenko_fit(batch(synthetic_tissue(30, 30, 1), synthetic_tissue(30, 30, 2)))
    target = [torch.cat([part * (1 + 0.1 * i) for i in range(targets)]) for part in STAINS]
    values = [images, fits.stain_matrix, fits.max_concentration, *target]
    weight = torch.linspace(-1, 1, images.numel(), dtype=torch.float64).reshape(images.shape)
    results = []
    for reconstruct in (
        lambda x, stain, top, wanted, wanted_top: macenko_normalize(
            x,
            MacenkoFit(wanted, wanted_top, torch.zeros(targets, dtype=torch.int32)),
            MacenkoFit(stain, top, torch.zeros(2, dtype=torch.int32)),
        ),
        rebuilt_by_formula,
    ):
        leaves = [value.clone().requires_grad_() for value in values]
        out = reconstruct(*leaves)
        results.append((out, *torch.autograd.grad((out * weight).sum(), leaves)))
    assert (results[1][0] == 255).any() and (results[1][0] < 255).any()
    for found, expected in zip(*results, strict=True):
        # Sums over 713 pixels of terms of one size, through the inverse of a 2 x 2 matrix of condition below 100.
        torch.testing.assert_close(
            found, expected, rtol=1e-10, atol=713 * 100 * 2.0**-52 * float(expected.detach().abs().max())
        )


def test_estimated_stains_are_constants():
    images = double_images()
    fixed = macenko_fit(images.detach())
    weight = torch.linspace(-1, 1, images.numel(), dtype=torch.float64).reshape(images.shape)
    (expected,) = torch.autograd.grad((macenko_normalize(images, TARGET, fixed) * weight).sum(), images)
    (found,) = torch.autograd.grad((macenko_normalize(images, TARGET) * weight).sum(), images)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_in_other_dtypes_and_range(dtype):
    exact = (double_images().detach() / 255).to(dtype).double().requires_grad_()
    images = exact.detach().to(dtype).requires_grad_()
    source = macenko_fit(exact, range=1)
    (expected,) = torch.autograd.grad(macenko_normalize(exact, TARGET, source, range=1).sum(), exact)
    (found,) = torch.autograd.grad(macenko_normalize(images, TARGET, source, range=1).sum(), images)
    assert found.dtype == dtype
    # The saved output is rounded to the dtype, and three terms are added.
    torch.testing.assert_close(found.double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_clipped_values_have_no_gradient():
    images = torch.full((1, 3, 4, 4), 254.0, dtype=torch.float64, requires_grad=True)
    dark = macenko_normalize(images / 2, TARGET, TARGET)
    strong = TARGET._replace(max_concentration=4 * TARGET.max_concentration)
    bright = macenko_normalize(images, strong, TARGET, Io=240)  # a negative OD, four times
    assert (bright == 255).all()
    (zero,) = torch.autograd.grad(bright.sum(), images)
    (some,) = torch.autograd.grad(dark.sum(), images)
    assert not zero.any() and (some != 0).all()


def test_images_that_require_grad_follow_the_policy():
    images = double_images().detach()
    images[1] = 200.0
    images.requires_grad_()
    out = macenko_normalize(images, TARGET, on_degenerate="identity")
    (grad,) = torch.autograd.grad(out.sum(), images)
    assert torch.equal(out[1], images[1]) and torch.equal(grad[1], torch.ones_like(grad[1]))


@compiled
def test_compile_traces_the_operators():
    images = some_images(torch.uint8, False)

    def normalise(x):
        return torch.ops.ernet.macenko_normalize(x, *STAINS, 240.0, 1.0, 0.15, False, False)[0].float() / 255

    traced = torch.compile(normalise, backend="aot_eager", fullgraph=True)
    assert torch.equal(traced(images), normalise(images))


@compiled
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512vbmi"])
def test_every_instruction_set_gives_the_same_result(isa, tmp_path):
    """In a process of its own, as the instruction set is chosen once."""
    images = torch.stack([batch(synthetic_tissue(90, 70, seed))[0] for seed in range(3)])
    torch.save(images, tmp_path / "images.pt")
    script = f"""
import torch
from ernet_fast import _backend
from ernet_fast.stain import MacenkoNormalizer, macenko_normalize
assert _backend.extension_available(), _backend.why_unavailable()
images = torch.load({str(tmp_path / "images.pt")!r})
target = MacenkoNormalizer().target
out = [macenko_normalize(x, target) for x in (images, images.float())]
torch.save(out, {str(tmp_path / "out.pt")!r})
"""
    import os

    environment = {**os.environ, "ERNET_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    if done.returncode and "this CPU or this build does not have it" in done.stderr:
        pytest.skip(f"{isa} is not available here")
    assert done.returncode == 0, done.stderr
    levels, floats = torch.load(tmp_path / "out.pt")
    assert torch.equal(levels, macenko_normalize(images, TARGET))
    # Instruction sets may fuse multiplications differently: a few ulp of float64 in the stains, then one rounding.
    torch.testing.assert_close(
        floats, macenko_normalize(images.float(), TARGET), rtol=torch.finfo(torch.float32).eps, atol=0
    )


def test_without_the_extension_everything_works_with_one_warning():
    script = """
import warnings, torch
from ernet_fast.stain import MacenkoNormalizer, macenko_fit, macenko_normalize
from ernet_fast import reference
images = torch.randint(30, 220, (2, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    n = MacenkoNormalizer()
    out = n(images); n.normalize(images); fit = macenko_fit(images)
    x = images.double().requires_grad_()
    n(x).sum().backward()
assert len([w for w in caught if "reference implementation" in str(w.message)]) == 1, caught
assert torch.equal(out, reference.macenko_normalize(images, n.target)), "differs"
assert x.grad.isfinite().all() and fit.status.tolist() == [0, 0]
"""
    import os

    environment = {**os.environ, "ERNET_DISABLE_EXTENSION": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_reference_functions_take_what_the_fast_ones_take():
    image = synthetic_tissue(30, 40, 1)
    for form in (image, torch.from_numpy(image), batch(image)):
        out, status = reference.macenko_normalize(form, TARGET, return_status=True)
        assert type(out) is type(form) and out.shape == form.shape and status.tolist() == [0]
    with pytest.raises(ValueError, match="image 0: fewer than 10 tissue pixels"):
        reference.macenko_normalize(image * 0 + 255, TARGET, on_degenerate="raise")
