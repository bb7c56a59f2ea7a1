from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ernet_fast.models
from ernet_fast.models import ERResNet, er_resnet18, load_torchvision_state_dict, read_weights
from ernet_fast.models.depths import LAYERS

Shapes = Callable[[int], dict[str, tuple[int, ...]]]


def small(**kw: object) -> ERResNet:
    return ERResNet("basic", (2, 2, 1, 1), **({"num_classes": 5, "base_channels": 8} | kw))


@pytest.mark.parametrize("depth", LAYERS)
def test_names_and_shapes_are_torchvisions(depth: int, torchvision_shapes: Shapes) -> None:
    with torch.device("meta"):
        model = getattr(ernet_fast.models, f"er_resnet{depth}")()
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    plain = {name: shape for name, shape in own.items() if ".shortcut." not in name}
    assert plain == torchvision_shapes(depth)
    assert list(plain) == list(torchvision_shapes(depth))
    assert own.keys() - plain.keys() == {
        f"layer{k + 1}.{index}.shortcut.{name}"
        for k, num_blocks in enumerate(LAYERS[depth])
        for index in range(1, num_blocks)
        for name in ("weight", "running_mean", "running_var", "num_batches_tracked")
    }


def test_torchvision_state_dict_loads_every_tensor(torchvision_shapes: Shapes, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.tensor(7) if shape == () else torch.randn(shape, generator=generator)
        for name, shape in torchvision_shapes(18).items()
    }
    path = tmp_path / "resnet18.pth"
    torch.save(state, path)
    model = er_resnet18(weights=path)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    for name, tensor in loaded.items():
        if name.endswith("shortcut.weight"):
            assert torch.equal(tensor, torch.ones_like(tensor)), name


def test_the_plain_part_computes_what_the_plain_network_does(plain_resnet: Callable[..., nn.Module]) -> None:
    """With one block a stage there are no shortcuts, and the networks are the same function."""
    torch.manual_seed(0)
    plain = plain_resnet((1, 1, 1, 1)).double().eval()
    model = ERResNet("basic", (1, 1, 1, 1), 5, base_channels=8).double().eval()
    load_torchvision_state_dict(model, plain.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)


def test_with_zero_er_weights_a_deeper_network_has_the_plain_branches(plain_resnet: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    plain = plain_resnet((1, 2, 1, 1)).double().eval()
    model = ERResNet("basic", (1, 2, 1, 1), 5, base_channels=8).double().eval()
    load_torchvision_state_dict(model, plain.state_dict())
    nn.init.zeros_(model.layer2[1].shortcut.weight)
    y = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    block = plain.layer2[1]
    branch = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(block_input := plain.layer2[0](y[:, :8]))))))
    assert block_input.shape[1] == 16
    torch.testing.assert_close(model.layer2(y[:, :8]), torch.relu(branch), rtol=1e-12, atol=1e-12)


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    trained = small()
    safetensors.save_file(trained.state_dict(), str(tmp_path / "own.safetensors"))
    state = read_weights(tmp_path / "own.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.state_dict().items())


def test_damaged_safetensors(tmp_path: Path) -> None:
    pytest.importorskip("safetensors.torch")
    (tmp_path / "bad.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match=r"weights: cannot read .*bad\.safetensors"):
        read_weights(tmp_path / "bad.safetensors")


def test_missing_safetensors_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "own.safetensors").write_bytes(b"")
    with pytest.raises(ImportError, match="safetensors is needed for reading"):
        read_weights(tmp_path / "own.safetensors")


def test_old_checkpoints_without_batch_counts_load() -> None:
    trained = small()
    state = {name: t for name, t in trained.state_dict().items() if "num_batches_tracked" not in name}
    model = small()
    load_torchvision_state_dict(model, state)
    assert torch.equal(model.layer1[1].conv2.weight, trained.layer1[1].conv2.weight)


def test_weights_are_cast() -> None:
    model = small().double()
    load_torchvision_state_dict(model, small().state_dict())
    assert model.conv1.weight.dtype == torch.float64


def without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: t for name, t in state.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"fc.weight": torch.zeros(1000, 64), "fc.bias": torch.zeros(1000)},
         r"are for 1000 classes and the model has num_classes=5\. Build it with num_classes=1000, then call "
         r"model\.reset_classifier\(5\)"),
        (lambda s: without(s, "fc.bias"), r"the weights is another \(fc\.weight; expected fc\.weight, fc\.bias"),
        (lambda s: s | {"fc.2.weight": torch.zeros(5, 64)}, r"(?s)classifier of the weights is another .*python -c"),
        (lambda s: s | {"conv1.weight": torch.zeros(8, 1, 7, 7)},
         r"conv1\.weight is \[8, 1, 7, 7\], expected \[8, 3, 7, 7\]"),
        (lambda s: without(s, "layer2.0.bn1.bias"), r"missing layer2\.0\.bn1\.bias; not in the model none"),
        (lambda s: without(s, "layer2.1.shortcut.weight"), r"missing layer2\.1\.shortcut\.weight"),
        (lambda s: s | {f"layer4.{i}.x": torch.zeros(1) for i in range(7)}, r"layer4\.4\.x and 2 more"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit(change: Callable, message: str) -> None:
    model = small()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_torchvision_state_dict(model, change(small().state_dict()))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_unreadable_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file 'DEFAULT'"):
        er_resnet18(weights="DEFAULT")
    with pytest.raises(TypeError, match="weights must be a path, a state dict or None, got int"):
        er_resnet18(weights=3)
    with pytest.raises(TypeError, match="these entries are none: epoch, 0"):
        read_weights({"epoch": 3, 0: torch.zeros(1)})
    (tmp_path / "empty.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot read .*empty\.pth"):
        read_weights(tmp_path / "empty.pth")
    (tmp_path / "bad.pth").write_bytes(b"\x80\x02junk")
    with pytest.raises(ValueError, match=r"cannot read .*bad\.pth"):
        read_weights(tmp_path / "bad.pth")
    torch.save(nn.Linear(1, 1), tmp_path / "model.pth")
    with pytest.raises(
        ValueError, match=r"(?s)holds more than tensors \(torch\.nn\.modules\.linear\.Linear.*python -c"
    ):
        read_weights(tmp_path / "model.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list, expected a state dict"):
        read_weights(tmp_path / "list.pth")


def test_a_file_of_another_kind_is_one_sentence_without_advice_to_load_unsafely(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"epoch": 1}')
    with pytest.raises(
        ValueError, match=r"cannot read '.*a\.json': it is no file of torch\.save .* or safeten"
    ) as caught:
        er_resnet18(weights=tmp_path / "a.json")
    assert "weights_only" not in str(caught.value) and len(str(caught.value).splitlines()) == 1
