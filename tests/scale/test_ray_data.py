"""Normalisation of Ray data sets, by two actors of which one is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ernet_fast.data.image_io import read_pixels
from ernet_fast.data.synthetic import generate_patch
from ernet_fast.scale import normalize_dataset, normalize_files, ray_data
from ernet_fast.scale.method import MacenkoMethod
from ernet_fast.scale.target import make_method
from ernet_fast.stain.options import Options

ray = pytest.importorskip("ray", reason="Ray is large, and no package of the tests: pip install 'ray[data]'")
pytest.importorskip("ray.data")
pytestmark = pytest.mark.slow

COUNT = 24


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Two workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, logging_level="ERROR")
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield
        ray.shutdown()


def patch_of(number: int) -> np.ndarray:
    size = (32, 32 + 8 * (number % 2))
    return np.ascontiguousarray(generate_patch("DC", size=size, seed=number).image.transpose(1, 2, 0))


def test_of_two_actors_one_is_killed(tmp_path, monkeypatch):
    """Every row once, with the pixels of a run in which nobody dies."""
    killed, started = tmp_path / "killed", tmp_path / "started"
    started.mkdir()

    class Mortal(MacenkoMethod):
        def normalize(self, images, source=None):
            own = started / str(os.getpid())
            if own.exists() and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)  # with its second batch in work
            own.touch()
            return super().normalize(images, source)

    right = make_method("published")
    monkeypatch.setattr(ray_data, "make_method", lambda *given: Mortal(right.target, right.options))
    rows = ray.data.from_items([{"number": n, "image": patch_of(n)} for n in range(COUNT)], override_num_blocks=8)
    done = normalize_dataset(rows, batch_size=3, actors=2).take_all()
    assert killed.exists(), "an actor was killed"
    assert len(os.listdir(started)) >= 2, "another did what it left"
    assert sorted(row["number"] for row in done) == list(range(COUNT)), "nothing lost, nothing twice"
    for row in done:
        image = patch_of(row["number"])
        (expected,), values, _ = right.normalize([ray_data.torch.from_numpy(image)])
        assert row["stain_status"] == "ok" and np.array_equal(row["image"], expected.numpy())
        assert row["stains"].tolist() == values[0].tolist() and row["tissue_share"] == right.tissue.share(image)


def test_files(tmp_path: Path, write_patch):
    for number in range(4):
        write_patch(tmp_path / "in" / f"{number}.jpg", number, quality=90)
    (tmp_path / "in" / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    write_patch(tmp_path / "in" / "white.png", 0).write_bytes(_white())
    options = Options(on_degenerate="raise")
    summary = normalize_files(tmp_path / "in", tmp_path / "out", format="png", options=options)
    rows = {Path(row["path"]).name: row for row in normalize_dataset(tmp_path / "in", options=options).take_all()}
    assert len(rows) == 6
    for file in summary.files:
        row = rows[Path(file.input).name]
        assert (row["stain_status"], row["stain_reason"]) == (file.status, file.reason)
        if file.output is None:
            assert row["image"].size == 0
        else:
            assert np.array_equal(row["image"], read_pixels(file.output)) and tuple(row["stains"]) == file.stains


def _white() -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (20, 20), "white").save(file, "PNG")
    return file.getvalue()


def test_what_makes_no_sense():
    with pytest.raises(TypeError, match="expected a ray.data.Dataset, or paths"):
        normalize_dataset(3)
    with pytest.raises(ValueError, match="batch_size=0"):
        normalize_dataset([], batch_size=0)
    actor = ray_data._Actor(make_method("published"), None, "image", ray_data.USUAL_LIMITS, 1, False)
    with pytest.raises(ValueError, match="columns picture; expected 'image'"):
        actor({"picture": np.zeros((1, 4, 4, 3), np.uint8)})
    with pytest.raises(TypeError, match=r"holds float64 \(4, 4, 3\)"):
        actor({"image": np.zeros((1, 4, 4, 3))})
