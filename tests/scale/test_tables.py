"""Colour tables: what a viewer shows with them is the normalised image."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFilter

from ernet_fast.cli import main
from ernet_fast.data.image_io import read_pixels
from ernet_fast.scale import normalize_files, write_tables
from ernet_fast.scale.colour_table import ColourTable
from ernet_fast.scale.target import make_method
from ernet_fast.stain.options import Options

EXACT = 3  # grey levels that tables of these images may be off, at most


@pytest.fixture
def archive(tmp_path: Path, write_patch) -> Path:
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        write_patch(tmp_path / "in" / name, int(name[2]), size=(64, 64))
    return tmp_path / "in"


def read_cube(path: Path) -> np.ndarray:
    """[N, N, N, 3], blue, green and red, as the format has it."""
    title, size, *rows = path.read_text().splitlines()
    assert title.startswith('TITLE "') and size.startswith("LUT_3D_SIZE ")
    return np.loadtxt(rows).reshape(*[int(size.split()[1])] * 3, 3)


def by_pillow(path: Path, image: np.ndarray) -> np.ndarray:
    """An image through a .cube file, by another's interpolation."""
    cube = read_cube(path)
    table = ImageFilter.Color3DLUT(len(cube), cube.reshape(-1))
    return np.asarray(Image.fromarray(image).filter(table)).astype(int)


def by_colour_management(profile: bytes, image: np.ndarray) -> np.ndarray:
    """What a colour-managed viewer shows of an image with this profile."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    shown = ImageCms.profileToProfile(Image.fromarray(image), source, ImageCms.createProfile("sRGB"))
    return np.asarray(shown).astype(int)


@pytest.mark.parametrize(("fit", "points"), [("per-image", 33), ("per-folder", 33), ("fixed", 33), ("fixed", 65)])
def test_a_viewer_shows_the_normalised_images(archive, tmp_path, fit, points):
    source = {"source": archive / "a" / "1.png"} if fit == "fixed" else {}
    tables = write_tables(archive, tmp_path / "tables", fit=fit, points=points, **source)
    normalize_files(archive, tmp_path / "out", fit=fit, **source)
    names = {"per-image": ["a/1", "a/2", "b/3"], "per-folder": ["a", "b"], "fixed": ["all"]}[fit]
    assert [table.name for table in tables] == names and sum(table.images for table in tables) == 3
    for name in ("a/1", "a/2", "b/3"):
        image, right = read_pixels(archive / f"{name}.png"), read_pixels(tmp_path / "out" / f"{name}.png").astype(int)
        place = {"per-image": name, "per-folder": name[0], "fixed": "all"}[fit]
        assert len(read_cube(tmp_path / "tables" / f"{place}.cube")) == points
        difference = np.abs(by_pillow(tmp_path / "tables" / f"{place}.cube", image) - right)
        (table,) = [table for table in tables if table.name == place]
        assert table.largest <= EXACT and table.mean < 0.3
        assert difference.max() <= table.largest + 1 and difference.mean() < 0.5
        shown = by_colour_management((tmp_path / "tables" / f"{place}.icc").read_bytes(), image)
        assert np.abs(shown - right).max() <= EXACT and np.abs(shown - right).mean() < 0.5
        assert np.abs(image.astype(int) - right).mean() > 5, "which is not what it was"


def test_the_error_is_that_of_the_colours_that_occur(archive):
    method = make_method("published")
    image = read_pixels(archive / "a" / "1.png")
    (right,), values, _ = method.normalize([torch.from_numpy(image)])
    table = ColourTable(method, tuple(values[0].tolist()))
    colours = np.unique(image.reshape(-1, 3), axis=0)
    error = table.error(colours)
    difference = np.abs(table.apply(image.reshape(-1, 3)).round() - right.numpy().reshape(-1, 3))
    assert error.largest == difference.max() and error.colours == len(colours)
    grid = np.linspace(0, 255, 33)[[0, 7, 32]]
    assert np.array_equal(
        table.apply(np.stack([grid, grid, grid], axis=1)), table.grid[[0, 7, 32], [0, 7, 32], [0, 7, 32]]
    )


def test_reinhard(archive, tmp_path):
    target = archive / "b" / "3.png"
    write_tables(archive / "a" / "1.png", tmp_path / "tables", method="reinhard", target=target, points=65)
    normalize_files(archive / "a" / "1.png", tmp_path / "out.png", method="reinhard", target=target)
    image = read_pixels(archive / "a" / "1.png")
    difference = np.abs(by_pillow(tmp_path / "tables" / "1.cube", image) - read_pixels(tmp_path / "out.png"))
    assert difference.max() <= EXACT + 1 and difference.mean() < 0.5


@pytest.mark.parametrize("policy", ["reference", "identity", "raise"])
def test_no_stains(tmp_path, policy):
    Image.new("RGB", (20, 20), (245, 240, 250)).save(tmp_path / "white.png")
    (table,) = write_tables(tmp_path / "white.png", tmp_path / "out", options=Options(on_degenerate=policy))
    assert table.status == ("error" if policy == "raise" else "degenerate") and "no stains" in table.reason
    if policy == "identity":
        colours = np.random.default_rng(0).integers(0, 256, (20, 20, 3)).astype(np.uint8)
        assert np.abs(by_pillow(tmp_path / "out" / "white.cube", colours) - colours).max() <= 1


def test_the_command(archive, tmp_path, capsys):
    (archive / "b" / "broken.png").write_bytes(b"")
    command = ["normalize", str(archive), str(tmp_path / "out"), "--as", "lut", "--quiet"]
    assert main(command) == 3
    out = capsys.readouterr().out
    assert "largest error" in out and "3 tables; written to" in out and "broken: the file is empty" in out
    assert main(command) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--fit", "per-folder"]) == 0
    assert "1 of 2 images cannot be read" in capsys.readouterr().out
    assert main([*command, "--status", "x.csv"]) == 2 and "--status is for images" in capsys.readouterr().err
