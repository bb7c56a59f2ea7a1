"""`ernet-fast bench model`: every network is measured, and nothing is reported of a wrong one."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import nn

from ernet_fast.benchmark import model, networks
from ernet_fast.benchmark.model import ModelBenchConfig, run_model_bench
from ernet_fast.benchmark.networks import folded, random_batch
from ernet_fast.benchmark.show_model import model_picture, model_text
from ernet_fast.console.progress import Reporter
from ernet_fast.reference.rival_networks import DenseNet121, PlainResNet

QUIET = Reporter(mute=True)
SMALL = ModelBenchConfig("er_resnet18", batch=2, size=32, seconds=0.01, device="cpu", compiled=False)
KEYS = ["plain", "naive", "compiled", "er", "lean"]


@pytest.fixture(autouse=True)
def narrow_networks(monkeypatch):
    """Networks of a quarter of the width, and no DenseNet-121, which has one width only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = functools.partial(networks.networks, base_channels=16)
    monkeypatch.setattr(model, "networks", lambda *asked: [one for one in made(*asked) if one.key != "densenet"])
    yield
    torch.set_num_threads(threads)


def test_every_network_is_measured(tmp_path, monkeypatch):
    """The naive one under torch.compile too, here by a backend that compiles no C++."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **options: compiler(network, backend="eager", **options))
    figures = run_model_bench(dataclasses.replace(SMALL, compiled=True), QUIET)
    assert [row["key"] for row in figures["networks"]] == KEYS and figures["missing"] == []
    rows = dict(zip(KEYS, figures["networks"], strict=True))
    for row in rows.values():
        step = row["step"]
        assert step["repeats"] >= 5 and 0 < step["p20_ms"] <= step["p50_ms"] <= step["p80_ms"]
        assert row["step_images_per_second"] == pytest.approx(2e3 / step["p50_ms"])
        # three times the parameters: they, their gradients, the momentum
        assert row["peak_bytes"] > 12 * row["parameters"] and row["activation_bytes"] > 0
    assert [key for key in KEYS if "inference" in rows[key]] == ["plain", "naive", "compiled", "er"]
    assert rows["er"]["parameters"] == rows["naive"]["parameters"] > rows["plain"]["parameters"]
    assert {"model": "er_resnet18", "batch": 2, "size": 32}.items() <= figures.items()
    text = model_text(figures)
    assert "2 images of 32 x 32, float32, channels-last, 1 thread" in text and "ER-ResNet-18, memory lean" in text
    pytest.importorskip("matplotlib")
    model_picture(figures, tmp_path / "model.png")
    assert (tmp_path / "model.png").read_bytes().startswith(b"\x89PNG")


def test_who_fails_is_named_and_the_others_are_measured(monkeypatch):
    class Failing(nn.Linear):
        def forward(self, x):
            raise RuntimeError("no compiler here")

    def with_failing(*asked):
        found = networks.networks(*asked, base_channels=16)
        failing = networks.Network("compiled", "compiled", Failing(1, 1), nn.Module.eval, twin=True, compiled=True)
        return [found[0], failing, *found[1:3]]

    monkeypatch.setattr(model, "networks", with_failing)
    figures = run_model_bench(SMALL, QUIET)
    assert [row["key"] for row in figures["networks"]] == ["plain", "naive", "er"]
    assert figures["missing"] == [{"name": "compiled", "reason": "RuntimeError: no compiler here"}]
    assert "not measured: compiled: RuntimeError: no compiler here" in model_text(figures)


def test_nothing_is_reported_of_a_wrong_result(monkeypatch):
    right = model.networks

    def wrong(*asked):
        found = right(*asked)
        nn.init.constant_(found[2].model.layer1[1].shortcut.weight, 2.0)
        return found

    monkeypatch.setattr(model, "networks", wrong)
    with pytest.raises(RuntimeError, match="the result of 'er' is wrong, so no speed is reported: relative difference"):
        run_model_bench(SMALL, QUIET)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "resnet50"}, r"model='resnet50'; expected one of er_resnet18, "),
        ({"batch": 1}, "batch=1; expected 2 to 4096 images"),
        ({"size": 16}, "size=16; expected 32 to 4096 pixels"),
        ({"seconds": 0}, "seconds=0; expected more than 0"),
    ],
)
def test_settings_out_of_range(given, message):
    with pytest.raises(ValueError, match=message):
        ModelBenchConfig(**given)


@pytest.mark.parametrize("build", [functools.partial(PlainResNet, 18, 5, base_channels=8), lambda: DenseNet121(5)])
def test_rivals_are_folded(build):
    """For inference their BatchNorms behind convolutions are gone, and they compute the same."""
    torch.manual_seed(0)
    network, x = build(), random_batch(2, 32, torch.device("cpu"))[0]
    network(x)  # running statistics of something
    ready = folded(network)
    left = [name for name, module in ready.named_modules() if isinstance(module, nn.BatchNorm2d)]
    # in a DenseNet most stand before their convolution: one in each layer and transition, and the last
    assert len(left) == (58 + 3 + 1 if isinstance(network, DenseNet121) else 0)
    with torch.no_grad():
        torch.testing.assert_close(ready(x), network.eval()(x), rtol=1e-4, atol=1e-4)


def test_sizes_of_the_rivals():
    """Parameters as published by torchvision; a depth that there is not is refused."""
    with torch.device("meta"):
        counted = {
            str(network): sum(p.numel() for p in build.parameters())
            for network, build in {18: PlainResNet(18), 50: PlainResNet(50), "dense": DenseNet121()}.items()
        }
        assert DenseNet121(7)(torch.empty(2, 3, 64, 64)).shape == (2, 7)
        assert PlainResNet(50, 7)(torch.empty(2, 3, 64, 64)).shape == (2, 7)
    assert counted == {"18": 11_689_512, "50": 25_557_032, "dense": 7_978_856}
    with pytest.raises(ValueError, match=r"depth must be one of \[18, 34, 50, 101, 152\], got 20"):
        PlainResNet(20)
