"""Files normalised in batches: the pixels and outcomes of single files, and clean failures."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ernet_fast.cli import normalize_files as module
from ernet_fast.cli.normalize_files import normalize_batches, normalize_files
from ernet_fast.cli.normalize_plan import plan
from ernet_fast.data.synthetic import generate_patch
from ernet_fast.stain import MacenkoNormalizer


@pytest.fixture
def jobs(tmp_path):
    """Images of three sizes, a white one, a damaged one, one whose output exists."""
    folder = tmp_path / "in"
    folder.mkdir()
    sizes = [(48, 40), (33, 57), (48, 40), (32, 64), (33, 57), (48, 40), (48, 40)]
    for number, size in enumerate(sizes):
        pixels = generate_patch("DC", size=size, seed=number).image
        Image.fromarray(np.ascontiguousarray(np.transpose(pixels, (1, 2, 0)))).save(folder / f"{number}.png")
    Image.new("RGB", (20, 20), (245, 245, 245)).save(folder / "2-white.png")
    (folder / "3-cut.png").write_bytes((folder / "3.png").read_bytes()[:100])

    def make(name):
        out = tmp_path / name
        out.mkdir()
        (out / "5.png").write_bytes(b"precious")
        return plan(folder, out)[0]

    return make


def seen(jobs, outcomes):
    """What became of each input, and the bytes written."""
    written = {job.input.name: job.output.read_bytes() for job in jobs if job.output.exists()}
    return sorted((Path(o.input).name, o.status, o.reason) for o in outcomes), written


@pytest.mark.parametrize("policy", ["reference", "identity", "raise"])
@pytest.mark.parametrize(("pixels", "workers"), [(1, 1), (5000, 3), (1 << 24, 2)])
def test_batches_give_what_single_files_give(jobs, monkeypatch, policy, pixels, workers):
    monkeypatch.setattr(module, "BATCH_PIXELS", pixels)
    normalizer = MacenkoNormalizer(on_degenerate=policy, layout="CHW")
    single, batched = jobs("single"), jobs("batched")
    expected = normalize_files(single, normalizer, overwrite=False, workers=1)
    advanced = []
    found = normalize_batches(
        batched, normalizer, overwrite=False, workers=workers, advance=lambda: advanced.append(threading.get_ident())
    )
    assert seen(batched, found) == seen(single, expected)
    assert {status for _, status, _ in seen(batched, found)[0]} >= {"normalised", "skipped", "failed"}
    assert len(advanced) == len(batched) and set(advanced) == {threading.get_ident()}


def test_a_full_disk_ends_everything(jobs, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device", "x.png")

    monkeypatch.setattr(module, "finish", full)
    monkeypatch.setattr(module, "BATCH_PIXELS", 1)
    before = threading.active_count()
    with pytest.raises(OSError, match="No space left"):
        normalize_batches(jobs("out"), MacenkoNormalizer(layout="CHW"), overwrite=True, workers=2)
    assert threading.active_count() == before


def test_nothing_to_do(jobs):
    assert normalize_batches([], MacenkoNormalizer(layout="CHW"), overwrite=True, workers=2) == []


@pytest.mark.gpu
def test_the_command_on_a_gpu_writes_the_same_images(call, jobs, tmp_path):
    listed = jobs("cpu")
    options = ("--format", "png", "--overwrite", "--json")
    for device in ("cpu", "cuda"):
        assert call("normalize", tmp_path / "in", tmp_path / device, "--device", device, *options).code == 1
    for job in listed:
        if job.output.exists():
            pair = [
                np.asarray(Image.open(tmp_path / device / job.output.name)).astype(int) for device in ("cpu", "cuda")
            ]
            assert np.abs(pair[0] - pair[1]).max() <= 1 and (pair[0] != pair[1]).mean() <= 5e-4
    assert torch.cuda.is_available()
