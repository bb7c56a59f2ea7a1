"""Files normalised in batches: the pixels and outcomes of single files, and clean failures."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from PIL import Image

from ernet_fast.console.atomic_file import PendingFile
from ernet_fast.data.synthetic import generate_patch
from ernet_fast.scale import batches as module
from ernet_fast.scale.batches import normalize_batches
from ernet_fast.scale.inputs import plan
from ernet_fast.scale.pipeline import Work, normalize_each
from ernet_fast.scale.target import make_method
from ernet_fast.stain.options import Options


@pytest.fixture
def jobs(tmp_path):
    """Images of three sizes, a white one, a damaged one."""
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
        return plan([folder], out).jobs

    return make


def seen(jobs, done):
    """What became of each input, and the bytes written."""
    written = {job.name: job.output.read_bytes() for job in jobs if job.output.exists()}
    found = {job.name: (status.status, status.reason, status.stains, status.sha256) for job, status in done}
    assert len(found) == len(jobs)
    return found, written


def work(policy="reference", **options):
    return Work(make_method("published", "macenko", Options(on_degenerate=policy)), **options)


@pytest.mark.parametrize("policy", ["reference", "identity", "raise"])
@pytest.mark.parametrize(("pixels", "workers"), [(1, 1), (5000, 3), (1 << 24, 2)])
def test_batches_give_what_single_files_give(jobs, monkeypatch, policy, pixels, workers):
    monkeypatch.setattr(module, "BATCH_PIXELS", pixels)
    single, batched = jobs("single"), jobs("batched")
    expected = seen(single, normalize_each(single, work(policy)))
    assert seen(batched, normalize_batches(batched, work(policy, workers=workers), "cpu")) == expected
    assert {status for status, *_ in expected[0].values()} >= {"ok", "error"}
    assert expected[0]["2-white.png"][0] == ("error" if policy == "raise" else "degenerate")


def test_known_stains_split_batches(jobs):
    stains = {"0.png": (0.6, 0.7, 0.4, 0.2, 0.9, 0.3, 2.0, 1.0), "1.png": ()}
    known = {"sources": lambda job: stains.get(job.name)}
    single, batched = jobs("single"), jobs("batched")
    expected = seen(single, normalize_each(single, work(**known)))
    assert seen(batched, normalize_batches(batched, work(**known), "cpu")) == expected
    assert expected[0]["0.png"][2] == stains["0.png"] and expected[0]["1.png"][0] == "degenerate"


@pytest.mark.parametrize("run", [normalize_each, lambda jobs, work: normalize_batches(jobs, work, "cpu")])
def test_a_full_disk_ends_everything(jobs, monkeypatch, run):
    def full(self):
        raise OSError(28, "No space left on device", "x.png")

    monkeypatch.setattr(PendingFile, "commit", full)
    monkeypatch.setattr(module, "BATCH_PIXELS", 1)
    before, listed = threading.active_count(), jobs("out")
    with pytest.raises(OSError, match="No space left"):
        list(run(listed, work(workers=2)))
    assert threading.active_count() == before
    assert not list(listed[0].output.parent.iterdir()), "no temporary file is left"


def test_nothing_to_do():
    assert list(normalize_each([], work())) == list(normalize_batches([], work(workers=2), "cpu")) == []
