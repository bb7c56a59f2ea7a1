"""A folder of normalised images has one kind of them."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
from PIL import Image

from ernet_fast import __version__
from ernet_fast.data.synthetic import generate_patch
from ernet_fast.scale import run, run_folder
from ernet_fast.scale.encode import decoder
from ernet_fast.scale.inputs import plan
from ernet_fast.scale.run_folder import NAME, claim, one_run, settings_of
from ernet_fast.scale.target import make_method
from ernet_fast.stain import MacenkoNormalizer
from ernet_fast.stain.options import Options


def write_patch(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = generate_patch("DC", size=(32, 32), seed=seed).image
    Image.fromarray(np.ascontiguousarray(np.transpose(pixels, (1, 2, 0)))).save(path)
    return path


@pytest.fixture
def images(tmp_path):
    for number in range(3):
        write_patch(tmp_path / "in" / f"{number}.png", number)
    return tmp_path / "in"


def pixels(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*.png")}


def test_the_record_says_how_the_images_were_made(call, images, tmp_path):
    target = write_patch(tmp_path / "target.png", 9)
    assert call("normalize", images, tmp_path / "out", "--target", target, "--beta", 0.2).code == 0
    found = json.loads((tmp_path / "out" / NAME).read_text())
    fitted = MacenkoNormalizer(beta=0.2, layout="CHW")
    from ernet_fast.data import read_image

    fitted.fit(read_image(target))
    assert found == {
        "ernet_fast": __version__, "method": "macenko", "Io": 240.0, "alpha": 1.0, "beta": 0.2, "percentile": "linear",
        "on_degenerate": "reference", "fit": "per-image", "source": None, "format": "keep", "quality": None,
        "transparent": "refuse", "decoder": decoder(), "target_image": str(target),
        "target": {"HERef": fitted.HERef.tolist(), "maxCRef": fitted.maxCRef.tolist()},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (["--target", "{target}"], "target was 'published', now "),
        (["--Io", "235"], "Io was 240.0, now 235.0"),
        (["--alpha", "2"], "alpha was 1.0, now 2.0"),
        (["--beta", "0.2"], "beta was 0.15, now 0.2"),
        (["--percentile", "nearest"], "percentile was 'linear', now 'nearest'"),
        (["--on-degenerate", "identity"], "on_degenerate was 'reference', now 'identity'"),
    ],
)
def test_other_settings_do_not_keep_old_pixels(call, images, tmp_path, options, difference):
    target = write_patch(tmp_path / "target.png", 9)
    options = [option.format(target=target) for option in options]
    assert call("normalize", images, tmp_path / "out").code == 0
    before = pixels(tmp_path / "out")
    called = call("normalize", images, tmp_path / "out", *options)
    assert called.code == 2 and difference in called.err and "--overwrite" in called.err
    assert pixels(tmp_path / "out") == before
    assert call("normalize", images, tmp_path / "fresh", *options).code == 0
    assert call("normalize", images, tmp_path / "out", *options, "--overwrite").code == 0
    assert pixels(tmp_path / "out") == pixels(tmp_path / "fresh")
    assert (tmp_path / "out" / NAME).read_bytes() == (tmp_path / "fresh" / NAME).read_bytes()


def test_another_version_counts_as_another_setting(call, images, tmp_path, monkeypatch):
    assert call("normalize", images, tmp_path / "out").code == 0
    monkeypatch.setattr(run_folder, "__version__", "99")
    called = call("normalize", images, tmp_path / "out")
    assert called.code == 2 and f"ernet_fast was '{__version__}', now '99'" in called.err


def test_more_images_of_the_same_settings_join(call, images, tmp_path):
    assert call("normalize", images / "0.png", tmp_path / "out").code == 0
    called = call("normalize", images, tmp_path / "out")
    assert called.code == 0 and "2 normalised, 1 done before" in called.out


def test_images_of_unknown_settings_are_not_taken_for_ours(call, images, tmp_path):
    write_patch(tmp_path / "out" / "1.png", 5)
    called = call("normalize", images, tmp_path / "out")
    assert called.code == 2 and "1 of the images" in called.err and "nothing says" in called.err
    assert call("normalize", images, tmp_path / "out", "--overwrite").code == 0
    (tmp_path / "out" / NAME).write_text("{")
    assert call("normalize", images, tmp_path / "out").code == 2


def test_overwriting_some_images_does_not_relabel_the_others(call, images, tmp_path):
    assert call("normalize", images, tmp_path / "out").code == 0
    called = call("normalize", images / "0.png", tmp_path / "out", "--beta", 0.2, "--overwrite")
    assert called.code == 2 and "2 images" in called.err and "would not be redone" in called.err


def test_an_interrupted_change_of_settings_leaves_no_old_pixels(call, images, tmp_path, monkeypatch):
    """Otherwise the next run, under the new record, would skip images of the old settings."""
    assert call("normalize", images, tmp_path / "out").code == 0

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "normalize_each", interrupt)
        called = call("normalize", images, tmp_path / "out", "--beta", 0.2, "--overwrite")
        assert called.code == 1 and "stopped after 0 of 3 files" in called.err
    assert pixels(tmp_path / "out") == {}
    assert call("normalize", images, tmp_path / "out", "--beta", 0.2).code == 0
    assert call("normalize", images, tmp_path / "fresh", "--beta", 0.2).code == 0
    assert pixels(tmp_path / "out") == pixels(tmp_path / "fresh")


def test_of_two_runs_that_begin_at_once_one_is_refused(images, tmp_path):
    (tmp_path / "out").mkdir()
    jobs = plan([images], tmp_path / "out").jobs
    outcomes, start = [], threading.Barrier(2)

    def run(beta):
        start.wait()
        try:
            settings = settings_of(make_method("published", "macenko", Options(beta=beta)), "published")
            claim(tmp_path / "out", jobs, settings, overwrite=False)
            outcomes.append(beta)
        except ValueError:
            outcomes.append("refused")

    threads = [threading.Thread(target=run, args=(beta,)) for beta in (0.1, 0.2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (kept,) = [outcome for outcome in outcomes if outcome != "refused"]
    assert json.loads((tmp_path / "out" / NAME).read_text())["beta"] == kept


class TestOneFile:
    """`normalize a.png out.png` writes a file."""

    def test_is_written(self, call, images, tmp_path):
        for name in ("deep/out.png", "out.tif", "out.jpg"):
            called = call("normalize", images / "0.png", tmp_path / name)
            assert called.code == 0 and (tmp_path / name).is_file() and str(tmp_path / name) in called.out
        assert call("normalize", images / "0.png", tmp_path / "folder").code == 0
        expected = (tmp_path / "folder" / "0.png").read_bytes()
        assert (tmp_path / "deep" / "out.png").read_bytes() == expected
        assert not (tmp_path / "deep" / NAME).exists()

    def test_that_exists_is_kept(self, call, images, tmp_path):
        (tmp_path / "out.png").write_bytes(b"precious")
        called = call("normalize", images / "0.png", tmp_path / "out.png")
        assert called.code == 2 and "--overwrite" in called.err
        assert (tmp_path / "out.png").read_bytes() == b"precious"
        assert call("normalize", images / "0.png", tmp_path / "out.png", "--overwrite").code == 0

    def test_that_is_the_input_is_refused(self, call, images):
        called = call("normalize", images / "0.png", images / "0.png", "--overwrite")
        assert called.code == 2 and "would overwrite the input" in called.err

    def test_contradictions(self, call, images, tmp_path):
        called = call("normalize", images / "0.png", tmp_path / "out.jpg", "--format", "png")
        assert called.code == 2 and "drop one" in called.err
        called = call("normalize", images, tmp_path / "out.png")
        assert called.code == 2 and "expected a folder" in called.err

    def test_a_folder_of_that_name_is_a_folder(self, call, images, tmp_path):
        (tmp_path / "out.png").mkdir()
        assert call("normalize", images / "0.png", tmp_path / "out.png").code == 0
        assert (tmp_path / "out.png" / "0.png").is_file()


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_a_second_run_is_refused_while_one_writes(call, images, tmp_path, options):
    assert call("normalize", images, tmp_path / "out").code == 0
    before = pixels(tmp_path / "out")
    with one_run(tmp_path / "out"):
        called = call("normalize", images, tmp_path / "out", *options)
        assert called.code == 1 and "another run is writing to" in called.err
    assert pixels(tmp_path / "out") == before
    assert call("normalize", images, tmp_path / "out", *options).code == 0
