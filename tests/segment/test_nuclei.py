from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("skimage", reason="scikit-image (extra segment) is not installed")

from ernet_fast.data.synthetic import SyntheticPatch, beer_lambert, generate_patch
from ernet_fast.data.synthetic.nuclei import Nuclei, paint_nuclei
from ernet_fast.data.synthetic.stain import StainProfile
from ernet_fast.segment import Detection, NucleiSettings, compare_nuclei, draw_outlines, nuclei
from ernet_fast.stain import MacenkoStatus, macenko_fit

SUBTYPES = ("A", "TA", "DC", "LC")
STAIN = StainProfile((0.60, 0.72, 0.35), (0.20, 0.87, 0.45), (1.0, 1.0), 240.0)


def detection(patch: SyntheticPatch) -> Detection:
    found = nuclei(patch.image, mpp=patch.mpp)
    true = patch.nuclei
    return compare_nuclei(found.regions.position, true.position, true.axes.mean(axis=1), found.labels.shape)


# What is reached over these patches is 0.78 to 0.83, and counts 8 % to 24 % too low: nuclei that others cover are not
# found. Details in docs/segment.md.
@pytest.mark.parametrize(
    ("magnification", "size"), [(40, (460, 48)), (100, (230, 200)), (200, (230, 230)), (400, (230, 300))]
)
def test_nuclei_of_synthetic_tissue(magnification, size):
    patches = [generate_patch(s, magnification=magnification, size=size, seed=5) for s in SUBTYPES]
    found = [detection(patch) for patch in patches]
    assert np.mean([d.f1 for d in found]) > 0.75
    assert min(d.f1 for d in found) > 0.65
    assert -0.3 < np.mean([d.count_error for d in found]) < 0.05
    assert np.mean([d.precision for d in found]) > 0.8


def apart(mpp: tuple[float, float], scale: float = 1.0) -> tuple[np.ndarray, Nuclei]:
    """An image [3, 300, 300] of 25 elliptic nuclei that do not touch, on eosin, and the nuclei."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(np.arange(5), np.arange(5), indexing="ij"), axis=-1).reshape(-1, 2)
    long, short = rng.uniform(3.5, 5.5, 25) * scale, rng.uniform(2.2, 3.3, 25) * scale
    still = np.zeros(25)
    pixel = mpp[0]
    # half axes in pixels of y; the image is squeezed along x afterwards
    true = Nuclei(30.0 + 60 * grid, np.stack([long, short], 1) / pixel, rng.uniform(0, 3, 25), still + 1, still, still)
    cover, haematoxylin = paint_nuclei(rng, true, (300, 300))
    eosin = 0.4 + 0.2 * np.sin(np.arange(300) / 9)[None] * np.ones((300, 1))
    light = beer_lambert(np.stack([haematoxylin, eosin * (1 - cover)]).astype(np.float32), STAIN)
    image = (light + rng.standard_normal(light.shape)).clip(0, 255).astype(np.uint8)
    step = round(mpp[1] / mpp[0])
    return image.reshape(3, 300, 300 // step, step).mean(axis=3).astype(np.uint8), true


@pytest.mark.parametrize("mpp", [(0.2, 0.2), (0.25, 0.5)])
def test_nuclei_that_lie_apart_are_all_found_and_measured(mpp):
    image, true = apart(mpp)
    found = nuclei(image, mpp=mpp)
    assert found.count == 25 and found.status is MacenkoStatus.OK
    position = found.regions.position * [1, mpp[1] / mpp[0]]
    each = np.linalg.norm(position[:, None] - true.position, axis=2).argmin(axis=1)
    assert sorted(each) == [*range(25)] and np.abs(position - true.position[each]).max() < 2.5
    long, short = true.axes[each].T * mpp[0]
    np.testing.assert_allclose(found.regions.area, np.pi * long * short, rtol=0.2)
    np.testing.assert_allclose(found.regions.eccentricity, np.sqrt(1 - (short / long) ** 2), atol=0.12)
    np.testing.assert_allclose(found.regions.axes[:, 0], 2 * long, rtol=0.15)
    figures = found.figures()
    field = image.shape[1] * image.shape[2] * mpp[0] * mpp[1] / 1e6
    assert figures["density_per_mm2"] == pytest.approx(25 / field) and figures["whole_nuclei"] == 25


def test_areas_and_borders_are_respected():
    image, _ = apart((0.2, 0.2))
    areas = nuclei(image, mpp=0.2).regions.area
    middle = float(np.median(areas))
    some = nuclei(image, mpp=0.2, settings=NucleiSettings(max_area=middle))
    assert some.count == (areas <= middle).sum() and some.labels.max() == some.count
    cut = nuclei(image[:, 30:, :], mpp=0.2)
    assert cut.regions.at_border.sum() == 5 and cut.figures()["whole_nuclei"] == cut.count - 5


def test_every_form_of_images_gives_the_same():
    patches = [generate_patch("DC", size=(96, 96), seed=k) for k in (1, 2)]
    batch = torch.stack([torch.from_numpy(p.image) for p in patches])
    mpp = patches[0].mpp
    single = nuclei(batch[0], mpp=mpp)
    assert isinstance(single.labels, np.ndarray) and single.labels.dtype == np.int32 and single.count > 5
    for other in (
        nuclei(batch, mpp=(mpp, mpp))[0],
        nuclei(batch.permute(0, 2, 3, 1).numpy(), mpp=mpp)[0],
        nuclei([batch[0], batch[1, :, :50]], mpp=mpp)[0],
        nuclei(batch[0], mpp=mpp, source=macenko_fit(batch[0])),
        nuclei([*batch], mpp=mpp, source=macenko_fit(batch))[0],
    ):
        assert np.array_equal(other.labels, single.labels)


def test_no_tissue_has_no_nuclei():
    found = nuclei(torch.full((3, 64, 64), 238, dtype=torch.uint8), mpp=0.5)
    assert found.count == 0 and found.status is not MacenkoStatus.OK
    assert found.figures()["area_mean_um2"] is None and found.figures()["density_per_mm2"] == 0


@pytest.mark.parametrize("mpp", [0, -1.0, float("nan"), (0.5,), "0.5", True])
def test_a_pixel_size_that_is_none(mpp):
    with pytest.raises(ValueError, match="mpp="):
        nuclei(torch.zeros(3, 64, 64, dtype=torch.uint8), mpp=mpp)


def test_settings_that_contradict_each_other():
    with pytest.raises(ValueError, match="min_area < max_area"):
        NucleiSettings(min_area=50, max_area=50)
    with pytest.raises(ValueError, match="contrast=0"):
        NucleiSettings(contrast=0)


def test_outlines_are_drawn_on_the_image():
    image, _ = apart((0.2, 0.2))
    found = nuclei(image, mpp=0.2)
    shown = draw_outlines(image, found, colour=(1, 2, 3))
    drawn = (shown == (1, 2, 3)).all(axis=2)
    assert shown.shape == (600, 600, 3)
    inside = found.labels.repeat(2, 0).repeat(2, 1) > 0
    assert drawn.any() and not (drawn & ~inside).any()
    assert np.array_equal(shown[~drawn], image.transpose(1, 2, 0).repeat(2, 0).repeat(2, 1)[~drawn])
    with pytest.raises(ValueError, match="300x300"):
        draw_outlines(image[:, :10], found)


def test_agreement_counts_by_hand():
    true = [(10.0, 10.0), (20.0, 20.0), (50.0, 50.0), (-3.0, 30.0)]
    found = [(11.0, 10.0), (12.0, 10.0), (24.0, 20.0), (0.0, 30.0), (80.0, 80.0)]
    d = compare_nuclei(found, true, 4.0, (100, 100))
    # (11, 10) takes the first, (24, 20) the second; (0, 30) is what the nucleus outside shows; two are found too many
    assert d == Detection(found=4, true=3, matched=2)
    assert d.f1 == pytest.approx(4 / 7) and d.precision == 0.5 and d.recall == pytest.approx(2 / 3)
    assert d.count_error == pytest.approx(1 / 3)
    empty = compare_nuclei([], [], 4.0, (100, 100))
    assert empty.f1 == 1 and np.isnan(empty.count_error)
