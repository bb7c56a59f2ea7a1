"""The code on docs/macenko.md runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from stain_images import batch, synthetic_tissue

from ernet_fast.stain import macenko_normalize

PAGE = Path(__file__).resolve().parents[2] / "docs" / "macenko.md"
TARGET, TILE = synthetic_tissue(60, 70, 1), synthetic_tissue(40, 56, 2)

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the documents are not beside the tests")


def blocks(heading, language="python"):
    """The code under a heading of the page."""
    section = PAGE.read_text().split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0] if heading else PAGE.read_text()
    return re.findall(rf"```{language}\n(.*?)```", section, re.S)


def run(code, **names):
    """The names that the code leaves behind."""
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def test_the_first_calls():
    names = run(blocks(None)[0], target=TARGET, tile=TILE, batch=batch(TILE, TILE))
    assert names["image"].shape == names["h"].shape == TILE.shape and names["batch"].shape == (2, 3, 40, 56)
    names = run(blocks(None)[1], thumbnail=TARGET, tiles=batch(TILE), target=names["normalizer"].target)
    assert names["status"].tolist() == [0] and names["tiles"].shape == (1, 3, 40, 56)


def test_moving_from_torchstain_takes_five_lines():
    (code,) = blocks("Moving from torchstain")
    assert len(code.splitlines()) == 5
    chw = torch.from_numpy(TARGET).permute(2, 0, 1)
    names = run(code, target=chw, tile=chw, tiles=batch(TILE))
    assert names["image"].dtype == torch.int32 and names["image"].shape == TARGET.shape
    assert names["tiles"].dtype == torch.uint8 and names["tiles"].shape == (1, 3, 40, 56)


def test_own_images(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image", reason="Pillow reads and writes the images")
    monkeypatch.chdir(tmp_path)
    image.fromarray(TARGET).save("reference.png")
    Path("patches").mkdir()
    tiles = {"tissue.png": TILE, "white.png": np.full_like(TILE, 255)}
    for name, tile in tiles.items():
        image.fromarray(tile).save(Path("patches", name))
    names = run(*blocks("On your own images"))
    expected = {"tissue.png": macenko_normalize(TILE, names["normalizer"].target), "white.png": tiles["white.png"]}
    for name, tile in expected.items():
        np.testing.assert_array_equal(np.asarray(image.open(Path("normalised", name))), tile)
    (command,) = blocks("On your own images", "sh")
    arguments = command.split("#")[0].split()
    assert arguments.pop(0) == "ernet-fast"
    Path("patches").rename(arguments[1])
    arguments[2] = "by_command"
    subprocess.run([sys.executable, "-m", "ernet_fast", *arguments, "--quiet"], check=True)
    np.testing.assert_array_equal(np.asarray(image.open("by_command/tissue.png")), expected["tissue.png"])


def test_a_slide_in_memory_maps(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("slide.npy", TARGET)
    code = next(code for code in blocks("Whole slides") if "open_memmap" in code)
    before = "import numpy as np\nfrom ernet_fast.stain import MacenkoNormalizer, macenko_normalize_slide\n"
    names = run(before + "normalizer = MacenkoNormalizer()\n" + code)
    np.testing.assert_array_equal(names["out"], macenko_normalize(TARGET, names["normalizer"].target))
    assert names["stains"].status.tolist() == [0] and capsys.readouterr().out.endswith("100%\n")


def test_augmentation_separation_and_network_input():
    (code,) = blocks("Augmentation, separation, network input")
    lines = [line for line in code.splitlines() if "as_v2(" not in line]  # torchvision need not be there
    names = run("import torch\n" + "\n".join(lines), images=batch(TILE), target=run(blocks(None)[0], target=TARGET,
                tile=TILE, batch=batch(TILE))["normalizer"].target)  # fmt: skip
    assert names["batch"].dtype == torch.bfloat16 and names["concentrations"].shape == (1, 2, 40, 56)
