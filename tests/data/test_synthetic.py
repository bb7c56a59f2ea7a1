"""The synthetic set: repeatable, physically consistent, and readable as BreakHis."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ernet_fast.data import SUBTYPES, BreakHis, read_image
from ernet_fast.data.synthetic import StainProfile, beer_lambert, generate_patch, sample_stain, write_breakhis_like
from ernet_fast.reference import macenko_fit

BENIGN = [code for code, kind in SUBTYPES.items() if not kind.malignant]
MALIGNANT = [code for code, kind in SUBTYPES.items() if kind.malignant]


def test_equal_seeds_give_equal_bytes_and_others_do_not() -> None:
    first = generate_patch("MC", size=(64, 80), seed=[1, 2])
    again = generate_patch("MC", size=(64, 80), seed=[1, 2])
    assert first.image.dtype == np.uint8 and first.image.shape == (3, 64, 80)
    assert first.concentrations.shape == (2, 64, 80) and first.nuclear_cover.shape == (64, 80)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.concentrations, again.concentrations)
    assert first.stain == again.stain
    other = generate_patch("MC", size=(64, 80), seed=[1, 3])
    assert not np.array_equal(first.image, other.image) and first.stain != other.stain


@pytest.mark.parametrize("subtype", SUBTYPES)
@pytest.mark.parametrize("magnification", [100, 400])
def test_every_subtype_and_magnification(subtype: str, magnification: int) -> None:
    patch = generate_patch(subtype, magnification=magnification, size=(96, 128), seed=4)
    assert np.isfinite(patch.concentrations).all() and (patch.concentrations >= 0).all()
    assert 0 <= patch.nuclear_cover.min() and patch.nuclear_cover.max() <= 1
    assert 20 < patch.image.mean() < 245 and patch.image.std() > 15  # an image, neither black nor blank
    nucleus = patch.nuclear_cover > 0.9
    haematoxylin, eosin = patch.concentrations
    assert haematoxylin[nucleus].mean() > 3 * haematoxylin[patch.nuclear_cover == 0].mean()
    assert eosin[nucleus].mean() < eosin[patch.nuclear_cover == 0].mean()


def test_image_obeys_beer_lambert() -> None:
    stain = StainProfile((3.0, 4.0, 0.0), (0.1, 0.9, 0.4), strength=(0.8, 1.3), background=236.0)
    assert stain.haematoxylin == (0.6, 0.8, 0.0)  # unit vectors, whatever was given
    patch = generate_patch("A", size=(96, 96), stain=stain, seed=0, noise=0)
    density = (stain.stain_matrix * np.array(stain.strength)) @ patch.concentrations.reshape(2, -1).astype(np.float64)
    light = 236.0 * np.exp(-density).reshape(3, 96, 96)
    # Rounded to the nearest level; float32 moves a value by 236 * 2^-24 times a few, which may tip the rounding.
    assert np.abs(patch.image - light).max() <= 0.5 + 1e-4
    np.testing.assert_allclose(beer_lambert(patch.concentrations, stain), light, rtol=16 * 2**-24)


def test_noise_is_what_was_asked_for() -> None:
    clean, noisy = (generate_patch("F", size=(128, 128), seed=0, noise=sigma).image.astype(float) for sigma in (0, 4.0))
    inner = (clean > 20) & (clean < 225)  # five standard deviations from the clipping
    # The rounding adds 1/12; 10^4 values and more know the variance to 2 %.
    assert np.var((noisy - clean)[inner]) == pytest.approx(16 + 1 / 6, rel=0.08)


def angle(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Degrees between directions [3, ...], accurate for small angles too."""
    a, b = a / np.linalg.norm(a, axis=0), b / np.linalg.norm(b, axis=0)
    return np.degrees(2 * np.arcsin(np.clip(np.linalg.norm(a - b, axis=0) / 2, 0, 1)))


@pytest.mark.parametrize("subtype", ["A", "PT", "DC", "PC"])
@pytest.mark.parametrize("regime", ["similar", "shifted"])
def test_macenko_recovers_the_planted_stains(subtype: str, regime: str) -> None:
    drawn = sample_stain(np.random.default_rng([5, len(subtype)]), regime)
    stain = StainProfile(drawn.haematoxylin, drawn.eosin, drawn.strength, background=240.0)
    patch = generate_patch(subtype, stain=stain, seed=11, noise=0)
    fit = macenko_fit(torch.from_numpy(patch.image)[None])
    estimated = fit.stain_matrix[0].numpy()

    # What the method can know: the extreme mixtures that occur. Tissue is chosen as it does (optical density >= 0.15
    # in all channels of the image it sees); the mixture of a pixel is the angle of its true concentrations; the 1st
    # and 99th percentile are its stains.
    seen = -np.log((patch.image.reshape(3, -1) + 1.0) / 240)
    tissue = (seen >= 0.15).all(axis=0)
    concentration = (
        patch.concentrations.reshape(2, -1).astype(np.float64)[:, tissue] * np.array(stain.strength)[:, None]
    )
    mixture = np.percentile(np.arctan2(concentration[1], concentration[0]), [1, 99])
    extremes = stain.stain_matrix @ np.stack([np.cos(mixture), np.sin(mixture)])
    # Rounding to grey levels and the method's I+1 turn each pixel's direction a little; a percentile of the seen
    # directions lies within the largest such turn of the true percentile. (The plane, fitted to all pixels, turns by
    # less.)
    tolerance = angle(stain.stain_matrix @ concentration, seen[:, tissue]).max()
    assert tolerance < 1.2  # degrees
    for column, planted in enumerate((stain.haematoxylin, stain.eosin)):
        assert angle(estimated[:, column], extremes[:, column]) <= tolerance
        # Nearly pure pixels occur (the extreme mixtures hold at most 6 % of the other stain), so the planted vectors
        # are found.
        assert angle(estimated[:, column], np.array(planted)) < 4


def test_classes_differ_in_density_size_and_variety_of_nuclei() -> None:
    from ernet_fast.data.synthetic.tissue import PROFILES

    assert max(PROFILES[c].nuclear_radius for c in BENIGN) < min(PROFILES[c].nuclear_radius for c in MALIGNANT)
    assert max(PROFILES[c].pleomorphism for c in BENIGN) < min(PROFILES[c].pleomorphism for c in MALIGNANT)
    cover = {
        code: np.mean([generate_patch(code, size=(96, 96), seed=k).nuclear_cover.mean() for k in range(12)])
        for code in SUBTYPES
    }
    assert np.mean([cover[c] for c in MALIGNANT]) > 1.3 * np.mean([cover[c] for c in BENIGN])


def test_nuclei_scale_with_magnification() -> None:
    """Twice the magnification: nuclei of twice the width, so half the share of their pixels lies on an outline."""

    def edge_share(magnification: int) -> float:
        covers = [
            generate_patch("TA", magnification=magnification, size=(230, 230), seed=k).nuclear_cover for k in range(6)
        ]
        edge = sum(np.abs(np.diff(cover, axis=0)).sum() for cover in covers)
        return float(edge / sum(cover.sum() for cover in covers))

    assert edge_share(100) / edge_share(200) == pytest.approx(2, rel=0.25)
    assert edge_share(200) / edge_share(400) == pytest.approx(2, rel=0.25)


def test_field_of_view_does_not_depend_on_the_size() -> None:
    coarse, fine = (
        np.mean([generate_patch("DC", size=size, seed=k).nuclear_cover.mean() for k in range(8)])
        for size in ((92, 92), (230, 230))
    )
    assert coarse == pytest.approx(fine, rel=0.15)


def test_regimes_differ_by_more_than_patients_do() -> None:
    def draw(regime: str) -> np.ndarray:
        profiles = [sample_stain(np.random.default_rng(k), regime) for k in range(200)]
        return np.array([[*p.haematoxylin, *p.eosin, *np.log(p.strength)] for p in profiles])

    similar, shifted = draw("similar"), draw("shifted")
    distance = np.abs(similar.mean(0) - shifted.mean(0)) / np.sqrt(similar.var(0) + shifted.var(0))
    assert (distance[-2:] > 2).all()
    assert np.allclose(np.linalg.norm(similar[:, :3], axis=1), 1)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"subtype": "XX"}, "subtype='XX'"),
        ({"magnification": 50}, "magnification=50"),
        ({"size": (16, 64)}, r"size=\(16, 64\)"),
        ({"noise": -1}, "noise=-1"),
    ],
)
def test_patch_arguments_are_checked(arguments: dict[str, object], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        generate_patch(**arguments)


def test_stain_arguments_are_checked() -> None:
    good = (0.6, 0.7, 0.3)
    for arguments, what in (
        (((0, 0, 0), good), "haematoxylin"),
        ((good, (1, -1, 0)), "eosin"),
        ((good, (1.0, float("nan"), 0)), "eosin"),
        ((good, good, (1, 0)), "strength"),
        ((good, good, (1, 1), 256), "background"),
    ):
        with pytest.raises(ValueError, match=what):
            StainProfile(*arguments)
    with pytest.raises(ValueError, match="regime='other'"):
        sample_stain(np.random.default_rng(0), "other")


def tree_bytes(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_written_set_is_read_back(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    options = {
        "patients": 14,
        "patches_per_patient": 2,
        "magnifications": (100, 400),
        "size": (40, 48),
        "staining": "shifted",
    }
    root = write_breakhis_like(tmp_path / "set", **options, progress=lambda done, total: seen.append((done, total)))
    assert root == tmp_path / "set"
    assert seen == [(k, 56) for k in range(1, 57)]
    everything = BreakHis(root, "all", verify=True)
    assert len(everything) == 56 and sum(everything.targets) == 28
    assert {sample.subtype for sample in everything.samples} == set(SUBTYPES)
    assert everything.samples[0].path.name == "SOB_B_A-14-90001-100-001.png"
    assert everything[0][0].shape == (3, 40, 48)
    assert len(BreakHis(root, "train", fold=3)) + len(BreakHis(root, "val", fold=3)) + len(BreakHis(root, "test")) == 56

    again = write_breakhis_like(tmp_path / "again", **options)
    assert tree_bytes(again) == tree_bytes(root)
    other = write_breakhis_like(tmp_path / "other", **options, seed=1)
    assert tree_bytes(other).keys() == tree_bytes(root).keys() and tree_bytes(other) != tree_bytes(root)
    larger = tree_bytes(
        write_breakhis_like(tmp_path / "larger", **{**options, "staining": "similar", "patches_per_patient": 3})
    )
    smaller = tree_bytes(write_breakhis_like(tmp_path / "smaller", **{**options, "staining": "similar"}))
    assert all(larger[name] == data for name, data in smaller.items() if name.endswith(".png"))
    assert "show no patient" in (root / "histology_slides" / "README.txt").read_text()


def test_shifted_staining_is_that_of_the_test_patients(tmp_path: Path) -> None:
    options = {"patients": 14, "patches_per_patient": 1, "size": (64, 64), "split_seed": 3}
    similar = write_breakhis_like(tmp_path / "similar", staining="similar", **options)
    shifted = write_breakhis_like(tmp_path / "shifted", staining="shifted", **options)
    changed = {
        sample.patient
        for sample in BreakHis(similar, "all").samples
        if not torch.equal(read_image(sample.path), read_image(shifted / sample.path.relative_to(similar)))
    }
    assert changed == {sample.patient for sample in BreakHis(shifted, "test", seed=3).samples}
    assert {sample.malignant for sample in BreakHis(shifted, "test", seed=3).samples} == {
        0,
        1,
    }  # the shift says nothing of the class


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path: Path) -> None:
    options = {"patients": 2, "patches_per_patient": 2, "size": (32, 32)}

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_breakhis_like(tmp_path, **options, progress=stop)
    assert list(tmp_path.iterdir()) == []
    write_breakhis_like(tmp_path, **options)
    before = tree_bytes(tmp_path)
    with pytest.raises(FileExistsError, match="histology_slides' exists"):
        write_breakhis_like(tmp_path, **options, seed=1)
    assert tree_bytes(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"patients": 1}, "patients=1"),
        ({"patches_per_patient": 0}, "patches_per_patient=0"),
        ({"magnifications": (150,)}, "magnifications="),
        ({"magnifications": ()}, "magnifications="),
        ({"staining": "other"}, "staining='other'"),
        ({"seed": -1}, "seed=-1"),
        ({"size": (8, 8)}, "size="),
        ({"staining": "shifted", "patients": 4}, "too few patients"),
    ],
)
def test_writer_arguments_are_checked(tmp_path: Path, arguments: dict[str, object], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        write_breakhis_like(tmp_path / "set", **arguments)
    assert not list(tmp_path.rglob("*.png"))
