"""The loops of docs/normalize-archive.md run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ernet_fast.data.synthetic import generate_patch
from ernet_fast.scale.slide_writer import Form, write_pyramid
from ernet_fast.stain import MacenkoNormalizer

for package in ("openslide", "tifffile", "imagecodecs"):
    pytest.importorskip(package)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "normalize-archive.md"
SIZE = 1100, 1050


@pytest.fixture
def slides(tmp_path: Path) -> list[Path]:
    """One with tissue, one without."""
    patch = generate_patch("DC", size=(128, 128), seed=3).image.transpose(1, 2, 0)
    paths = [tmp_path / "tissue.svs", tmp_path / "white.svs"]
    for path, pixels in zip(paths, (patch, patch * 0 + 244), strict=True):
        form = Form(tile=128, mpp=(0.5, 0.5), description="Aperio test|AppMag = 20|MPP = 0.5")
        with open(path, "wb") as file:
            write_pyramid(file, tmp_path, SIZE, lambda t, pixels=pixels: pixels[: t[3], : t[2]], form, lambda: None)
    return paths


def test_feature_extraction(slides, tmp_path, monkeypatch):
    section = PAGE.read_text().split("## Tiles for training", 1)[1].split("\n## ", 1)[0]
    clam, trident = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.save(MacenkoNormalizer().state_dict(), "target.pt")
    encoder = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    for name, code in (("clam", clam), ("trident", trident)):
        out = tmp_path / name
        out.mkdir()
        code = code.replace("num_workers=8", "num_workers=0")
        exec(compile(code, name, "exec"), {"slides": slides, "encoder": encoder, "device": "cpu", "out": out})
    assert {path.name for path in (tmp_path / "clam").iterdir()} == {"tissue.pt", "tissue.coordinates.pt"}
    features, places = (torch.load(tmp_path / "clam" / f"tissue{part}.pt") for part in ("", ".coordinates"))
    assert features.shape == (16, 3) and places.shape == (16, 2) and places.max() == 768
    bag = torch.load(tmp_path / "trident" / "tissue.pt")
    assert bag["features"].shape == (4, 3) and bag["patch_size_level0"] == 512
    assert bag["coords"].tolist() == [[0, 0], [448, 0], [0, 448], [448, 448]]
    assert bool(bag["features"].isfinite().all())
    assert not (tmp_path / "trident" / "white.pt").exists()
