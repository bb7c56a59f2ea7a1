"""Other data sets, stains by slide, packed images, balanced epochs, logs."""

from __future__ import annotations

import csv
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from same_state import assert_same, final_state

from ernet_fast.data import BreakHis, ImageReadError, read_image
from ernet_fast.data.packed import PackedImages, write_pack
from ernet_fast.stain import MacenkoNormalizer, ReinhardNormalizer, macenko_fit
from ernet_fast.train import evaluate, fit, load_checkpoint
from ernet_fast.train.images import EpochSampler, ImageSet
from ernet_fast.train.pack import pack_images
from ernet_fast.train.stain_choice import SlideNormalization, StainNormalization, plain_state, read_state


@pytest.mark.parametrize("layout", ["folders", "csv"])
def test_any_data_set_trains_and_is_evaluated(make_config, quiet, tiny_breakhis, tmp_path, layout):
    data, lines = tmp_path / "set", ["image,label,patient"]
    for sample in BreakHis(tiny_breakhis, "all").samples:
        path = data / sample.subtype / sample.patient / f"{sample.path.stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sample.path, path)
        lines.append(f"{path.relative_to(tmp_path)},{'ill' if sample.malignant else 'well'},{sample.patient}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    where = tmp_path / "list.csv" if layout == "csv" else _two_classes(data)
    config = make_config(data=str(where), epochs=2, layout="auto")
    fit(config, stop_after=1, reporter=quiet)
    result = fit(config, resume=True, reporter=quiet)
    assert result.finished and result.history[0]["val_by_magnification"] == {}
    found = evaluate(result.folder, reporter=quiet)
    assert found.predictions.classes == (("ill", "well") if layout == "csv" else ("benign", "malignant"))
    assert found.seen_patients == 0 and len(found.predictions) > 5
    assert evaluate(result.folder, split="train", reporter=quiet).seen_images > 0


def _two_classes(data):
    root = data.with_name("classes")
    for folder in sorted(data.iterdir()):
        label = "malignant" if folder.name in ("DC", "LC", "MC", "PC") else "benign"
        shutil.copytree(folder, root / label, dirs_exist_ok=True)
    return root


def test_stains_by_slide(make_config, quiet, monkeypatch):
    config = make_config(epochs=2, stain_fit="slide")
    fit(config, stop_after=1, reporter=quiet)
    state = load_checkpoint(config.folder / "last.pt")
    stain = StainNormalization.from_state(state["stain"])
    assert isinstance(stain, SlideNormalization)
    train = BreakHis(config.data, "train").samples
    slide = train[0].slide
    whole = torch.cat([read_image(s.path) for s in train if s.slide == slide], dim=2)
    assert torch.equal(stain.slides[slide].stain_matrix, macenko_fit(whole, layout="CHW").stain_matrix)
    expected = MacenkoNormalizer(layout="CHW")
    expected.load_state_dict(state["stain"]["normalizer"])
    image = read_image(train[0].path)
    found = stain.of_slide(image, train[0])
    assert torch.equal(found, expected(image, source=stain.slides[slide]))
    from ernet_fast.train import stain_choice

    with monkeypatch.context() as patch:  # slides that the checkpoint knows are not fitted again
        patch.setattr(stain_choice, "ColourCounts", None)
        result = fit(config, resume=True, reporter=quiet)
    again = evaluate(result.best_checkpoint, split="val", reporter=quiet).figures()
    assert again["overall"] == result.best["val"]
    assert len(evaluate(result.folder, reporter=quiet).predictions)


def test_reinhards_method(make_config, quiet, tiny_breakhis):
    """The target is the image that Macenko's would be; it is kept, applied, and the same in evaluation."""
    result = fit(make_config(epochs=1, stain="reinhard"), reporter=quiet)
    stain = StainNormalization.from_state(load_checkpoint(result.best_checkpoint)["stain"])
    macenko = fit(make_config("macenko", epochs=1), reporter=quiet)
    assert stain.source == load_checkpoint(macenko.best_checkpoint)["stain"]["source"]
    samples = BreakHis(tiny_breakhis, "train").samples
    target = next(sample.path for sample in samples if sample.path.name == stain.source)
    image = read_image(samples[1].path)
    expected = ReinhardNormalizer(layout="CHW").fit(read_image(target))
    assert torch.equal(stain(image), expected(image)) and not torch.equal(stain(image), image)
    again = evaluate(result.best_checkpoint, split="val", reporter=quiet).figures()
    assert again["overall"] == result.best["val"]


def test_a_slide_without_stains_has_the_targets(tmp_path, tiny_breakhis):
    samples = BreakHis(tiny_breakhis, "train").samples[:1]
    from PIL import Image

    Image.new("RGB", (32, 32), "white").save(tmp_path / "white.png")
    stain = StainNormalization(MacenkoNormalizer(layout="CHW"), "x").by_slide()
    sample = samples[0]._replace(path=tmp_path / "white.png")
    stain.prepare([sample])
    assert stain.of_slide(read_image(sample.path), sample).shape == (3, 32, 32)
    assert read_state(plain_state(stain))["slides"].keys() == {sample.slide}


@pytest.mark.parametrize("settings", [None, {"stain_fit": "slide"}, {"stain": "reinhard"}],
                         ids=["full-size", "by-slide", "reinhard"])  # fmt: skip
def test_training_on_packed_images_is_training_on_the_files(make_config, quiet, tiny_breakhis, tmp_path, settings):
    target = str(BreakHis(tiny_breakhis, "train").samples[3].path)
    options = {} if settings is None else {"image_size": 32, "stain_target": target, **settings}
    packed = pack_images(tiny_breakhis, tmp_path / "pack", reporter=quiet, **options)
    assert len(packed) == 64 and packed.damaged() == []
    settings = {"epochs": 1, **(settings or {})}
    files = make_config("files", stain_target=target, **settings)
    packs = make_config("packs", stain_target=target, packed=str(packed.folder), **settings)
    fit(files, reporter=quiet)
    fit(packs, reporter=quiet)
    expected, found = final_state(files), final_state(packs)
    for state in (expected, found):
        del state["config"]["packed"], state["stain"]  # that of the pack knows the slides of the test set too
    assert_same(found, expected)


def test_packed_images_that_would_give_other_pixels_are_refused(make_config, quiet, tiny_breakhis, tmp_path):
    resized = pack_images(tiny_breakhis, tmp_path / "resized", image_size=32, reporter=quiet)
    target = str(BreakHis(tiny_breakhis, "train").samples[3].path)
    normal = pack_images(tiny_breakhis, tmp_path / "normal", image_size=32, stain_target=target, reporter=quiet)
    for folder, changes, match in (
        (resized, {}, "images are normalised before they are resized"),
        (resized, {"stain": "none", "image_size": 48}, "was resized to 32 pixels, 'shorter'; the run wants 48"),
        (normal, {"stain": "none"}, "the run has stain='none'"),
        (normal, {"stain_fit": "slide"}, "another stain_fit"),
        (normal, {"stain": "reinhard"}, "normalised by macenko; the run has stain='reinhard'"),
        (normal, {"stain_target": str(BreakHis(tiny_breakhis, "train").samples[9].path)}, "is normalised to SOB"),
    ):
        with pytest.raises(ValueError, match=match):
            fit(make_config(packed=str(folder.folder), **changes), reporter=quiet)
    fit(make_config(packed=str(normal.folder), epochs=1), reporter=quiet)
    (tmp_path / "few").mkdir()
    few = write_pack(tmp_path / "few", [], {"image_size": None, "stain": None})
    with pytest.raises(ValueError, match="lacks .* of the images"):
        fit(make_config("none", packed=str(few.folder)), reporter=quiet)
    with pytest.raises(FileNotFoundError, match="ernet-fast pack"):
        fit(make_config("none", packed=str(tmp_path / "nowhere")), reporter=quiet)


def test_packs_have_checksums_and_shards(tmp_path):
    images = {f"i{k}": torch.randint(0, 256, (3, 4 + k, 5), dtype=torch.uint8) for k in range(5)}
    packed = write_pack(tmp_path / "pack", images.items(), {"stain": None}, shard_bytes=100)
    assert len(packed.shards) > 1 and all(torch.equal(packed.read(name), image) for name, image in images.items())
    with pytest.raises(FileExistsError):
        write_pack(tmp_path / "pack", images.items(), {})
    shard = tmp_path / "pack" / packed.shards[1][0]
    data = bytearray(shard.read_bytes())
    data[7] ^= 1
    shard.write_bytes(data)
    assert PackedImages(tmp_path / "pack").damaged() == [shard.name]
    shard.write_bytes(data[:-1])
    with pytest.raises(ValueError, match="its index says"):
        PackedImages(tmp_path / "pack")
    with pytest.raises(ValueError, match="occurs twice"):
        write_pack(tmp_path / "twice", [("a", images["i0"])] * 2, {})
    assert not (tmp_path / "twice" / "pack.json").exists()


def test_balanced_epochs_have_every_class_equally_often():
    labels = [0] * 20 + [1] * 5 + [2] * 2
    sampler = EpochSampler(len(labels), shuffle=True, seed=3, labels=labels)
    sampler.epoch = 1
    order = [position for _, position in sampler]
    assert Counter(labels[k] for k in order) == {0: 9, 1: 9, 2: 9}
    times = Counter(order)
    assert max(times[k] for k in range(20)) == 1 and {times[k] for k in range(20, 25)} == {1, 2}
    assert sorted(times[k] for k in (25, 26)) == [4, 5]
    assert order == [position for _, position in sampler]
    sampler.epoch = 2
    assert order != [position for _, position in sampler]
    sampler.epoch, sampler.start = 1, 10
    assert [position for _, position in sampler] == order[10:]


def test_an_unreadable_image_gives_way_to_one_of_its_class(tiny_breakhis):
    samples = BreakHis(tiny_breakhis, "train").samples
    bad = samples[0]._replace(path=Path("/nowhere.png"))
    images = ImageSet([bad, *samples[1:]], 32, training=True, on_error="skip")
    _, label, taken, problem = images[1, 0]
    assert taken > 0 and label == bad.label == samples[taken].label and problem.startswith("/nowhere.png: ")
    assert images[1, 1][2:] == (1, "")
    only = ImageSet([bad], 32, training=True, on_error="skip")
    with pytest.raises(ImageReadError, match=r"no image of class 0 can be read any more.*nowhere"):
        only[1, 0]


def test_steps_are_logged(make_config, quiet, monkeypatch):
    pytest.importorskip("tensorboardX")
    config = make_config(epochs=2, stain="none", log_steps=2, tensorboard=True)
    fit(config, stop_after=1, reporter=quiet)
    with open(config.folder / "steps.csv", "a") as file:
        file.write("999,9,1,1,1,1\ntorn")  # of a run that was killed
    result = fit(config, resume=True, reporter=quiet)
    with open(config.folder / "steps.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    total = load_checkpoint(config.folder / "last.pt")["step"]
    assert [int(row["step"]) for row in rows] == list(range(2, total + 1, 2))
    assert all(0 <= float(row["data_wait"]) <= 1 and float(row["images_per_second"]) > 0 for row in rows)
    events = b"".join(path.read_bytes() for path in (config.folder / "tensorboard").glob("events*"))
    assert b"train/loss" in events and b"epoch/val.accuracy" in events
    assert all(0 <= record["data_wait"] <= 1 for record in result.history)
