"""The demo, made small, and the report it writes."""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser

import pytest

from ernet_fast import demo
from ernet_fast.cli import demo as demo_command
from ernet_fast.demo import nuclei_tour, timing
from ernet_fast.demo.pace import affordable_epochs
from ernet_fast.train import TrainConfig, report


class Collector(HTMLParser):
    """Addresses, text and nesting of a page."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self):
        super().__init__()
        self.addresses, self.text, self.open, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def assert_self_contained(html: str) -> Collector:
    page = Collector()
    page.feed(html)
    assert page.open == []
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    without_pictures = re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)
    assert not re.search(r"https?:|//|@import|url\(", without_pictures)
    return page


@pytest.fixture(scope="module")
def small_demo(tiny_breakhis, tmp_path_factory):
    """A demo on the tiny set, with small networks and one repeat."""
    out = tmp_path_factory.mktemp("demo")
    patch = pytest.MonkeyPatch()
    patch.setattr(demo.run, "time_training_step", lambda device: timing.time_training_step(device, 0.0, 32))
    patch.setattr(demo.run, "time_shortcuts", lambda device: timing.time_shortcuts(device, 0.0))
    config = demo.DemoConfig(
        data=str(tiny_breakhis), out=str(out), epochs=1, image_size=32, max_images=24, device="cpu"
    )
    result = demo.run_demo(config, demo_command.Reporter(quiet=True))
    patch.undo()
    return result


def test_report_is_one_file(small_demo):
    page = assert_self_contained(small_demo.report.read_text(encoding="utf-8"))
    text = " ".join(page.text)
    for part in (
        "accuracy",
        "recall",
        "F1",
        "AUC",
        "100X",
        "200X",
        "Not for diagnostic use",
        "torch 2",
        "Speed",
        "Nuclei",
        "one thread",
        "bootstrap resamples of patients",
    ):
        assert part in text, part
    pictures = 7 + bool(small_demo.figures["evaluation"]["mistakes"])
    assert page.tags.count("img") == pictures, (
        "before and after, nuclei of both classes, history, confusion matrix, ROC, its bands, mistakes"
    )


def test_demo_leaves_pictures_and_figures(small_demo):
    folder = small_demo.report.parent
    for name in ("before_after.png", "evaluation/confusion_matrix.png", "evaluation/roc.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "demo.json").read_text()) == small_demo.figures
    assert {"ernet_fast", "PyTorch"} == set(small_demo.figures["timings"][0]["median_seconds"])
    assert len(small_demo.timing_lines) == 3


@pytest.mark.slow
def test_synthetic_demo_command(call, tmp_path, monkeypatch):
    monkeypatch.setitem(demo.run._SYNTHETIC, "patients", 16)
    monkeypatch.setitem(demo.run._SYNTHETIC, "patches_per_patient", 1)
    monkeypatch.setitem(demo.run._SYNTHETIC, "size", [48, 48])
    made_up = timing.Timing("step", {"fused": 1.0, "naive": 2.0}, 1)
    monkeypatch.setattr(demo.run, "time_training_step", lambda device: made_up)
    monkeypatch.setattr(demo.run, "time_shortcuts", lambda device: made_up)
    arguments = (
        "demo",
        "--out",
        tmp_path / "demo",
        "--epochs",
        1,
        "--image-size",
        32,
        "--max-images",
        16,
        "--device",
        "cpu",
    )
    first = call(*arguments, "--json")
    assert first.code == 0 and first.json["synthetic"] is True and "6/6" in first.err
    page = assert_self_contained((tmp_path / "demo" / "report.html").read_text(encoding="utf-8"))
    assert "say nothing about diagnostic performance" in " ".join(page.text)
    second = call(*arguments)  # over the first: the images are found again
    assert second.code == 0 and "found in" in second.err
    assert "step: fused 1 s, naive 2 s (2.0x)" in second.out and "report.html" in second.out
    other = call(*arguments, "--seed", 1)
    assert other.code == 2 and "holds other images" in other.err


def test_without_other_packages_the_demo_says_so(monkeypatch):
    import torch

    from ernet_fast.benchmark import stain_questions
    from ernet_fast.data.synthetic import generate_patch

    monkeypatch.setattr(stain_questions, "peers_on", lambda device: [])
    found = timing.time_macenko(torch.from_numpy(generate_patch("A", size=(40, 40), seed=1).image), 0.0)
    assert list(found.seconds) == ["ernet_fast"] and "No other package is installed" in found.line
    assert found.repeats == 5 and "one 40x40 image, one thread" in found.task


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, 2), (1e6, 8)])
def test_epochs_follow_the_time_there_is(seconds, expected):
    settings = TrainConfig(data="d", out="o", base_channels=16, image_size=32, batch_size=8, device="cpu")
    assert affordable_epochs(settings, 64, seconds) == expected


def test_the_demo_stops_training_when_time_runs_out():
    record = {"epoch": 2, "train_seconds": 30.0}
    long_ago = time.perf_counter() - 100
    assert demo.run._out_of_time(demo.DemoConfig(), record, long_ago)
    assert not demo.run._out_of_time(demo.DemoConfig(), record, time.perf_counter())
    assert not demo.run._out_of_time(demo.DemoConfig(), record | {"epoch": 1}, long_ago)
    assert not demo.run._out_of_time(demo.DemoConfig(epochs=5), record, long_ago), "asked for, so done"


def test_report_escapes_everything(tmp_path):
    nasty = '<script>alert("x")</script>'
    blocks = [
        report.section(nasty, report.paragraph(nasty), report.note(nasty), report.command(nasty)),
        report.cards([(nasty, nasty, nasty)]),
        report.table([nasty, nasty], [[nasty, nasty]], caption=nasty),
        report.pictures([(b"png", nasty, nasty)]),
        report.bars([(nasty, [(nasty, 1.0, nasty)])]),
    ]
    path = report.write_report(tmp_path / "deep" / "r.html", title=nasty, subtitle=nasty, blocks=blocks, footer=nasty)
    page = assert_self_contained(path.read_text(encoding="utf-8"))
    assert "script" not in page.tags and " ".join(page.text).count(nasty) >= 15


def test_without_scikit_image_the_report_says_why_there_are_no_nuclei(monkeypatch):
    def missing(module, **_):
        raise ImportError(f"{module.split('.')[0]} is needed")

    monkeypatch.setattr(nuclei_tour, "require", missing)
    tour = nuclei_tour.show_nuclei([])
    assert tour.reason == "skimage is needed" and not tour.rows and not tour.pictures
