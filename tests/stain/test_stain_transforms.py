"""Transforms: as plain callables, in worker processes, and as torchvision v2 transforms."""

from __future__ import annotations

import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from stain_images import batch, synthetic_tissue

from ernet_fast.stain import MacenkoNormalizer, ReinhardNormalizer, StainAugment, StainNormalize, as_v2, macenko_augment

IMAGES = batch(*(synthetic_tissue(40, 56, seed) for seed in range(6)))


class Tiles(torch.utils.data.Dataset):
    """Images with a transform, as users write it."""

    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        return self.transform(IMAGES[index]), index


@pytest.mark.parametrize("kind", [MacenkoNormalizer, ReinhardNormalizer])
def test_normalize_is_the_normalizer_and_survives_pickling(kind):
    normalizer = kind().fit(IMAGES[5])
    transform = pickle.loads(pickle.dumps(StainNormalize(normalizer)))
    assert torch.equal(transform(IMAGES[0]), normalizer(IMAGES[0]))
    array = IMAGES[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(transform(array), normalizer(array))
    assert kind.__name__ in repr(transform)
    with pytest.raises(TypeError, match="normalizer is a int"):
        StainNormalize(3)


def test_augment_draws_from_torchs_generator():
    transform = pickle.loads(pickle.dumps(StainAugment(gain=0.1, shift=0.3)))
    torch.manual_seed(4)
    found = transform(IMAGES[0])
    torch.manual_seed(4)
    assert torch.equal(found, macenko_augment(IMAGES[0], gain=0.1, shift=0.3))
    assert torch.equal(StainAugment(p=0)(IMAGES[0]), IMAGES[0])
    torch.manual_seed(0)
    half = StainAugment(p=0.5)
    changed = sum(not torch.equal(half(IMAGES[0]), IMAGES[0]) for _ in range(60))
    assert 10 < changed < 50  # five standard deviations around 30
    assert repr(StainAugment(range=1)) == "StainAugment(p=1.0, gain=0.2, shift=0.2, range=1)"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"p": 1.5}, ValueError, "p=1.5"),
        ({"gain": 2}, ValueError, "gain=2"),
        ({"shift": -1}, ValueError, "shift=-1"),
        ({"generator": None}, TypeError, "generator"),
        ({"on_degenerate": "skip"}, ValueError, "skip"),
    ],
)
def test_augment_checks_its_arguments(options, error, message):
    with pytest.raises(error, match=message):
        StainAugment(**options)


def test_worker_processes_give_the_same_images():
    normalizer = MacenkoNormalizer().fit(IMAGES[5])
    transform = StainNormalize(normalizer)
    loader = torch.utils.data.DataLoader(Tiles(transform), batch_size=2, num_workers=2)
    found = torch.cat([images for images, _ in loader])
    assert torch.equal(found, normalizer(IMAGES))


def test_augmentation_in_workers_is_seeded_and_differs_between_images():
    def run():
        torch.manual_seed(11)
        loader = torch.utils.data.DataLoader(Tiles(StainAugment()), batch_size=3, num_workers=2)
        return torch.cat([images for images, _ in loader])

    first = run()
    assert torch.equal(first, run())
    assert all(not torch.equal(a, b) for a, b in zip(first, IMAGES, strict=True))


def test_torchvision_is_not_imported_with_the_package():
    code = "import sys, ernet_fast, ernet_fast.stain; sys.exit('torchvision' in sys.modules or 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_without_torchvision_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.delitem(sys.modules, "ernet_fast.stain.v2_transform", raising=False)
    with pytest.raises(ImportError, match="use the transform as it is"):
        as_v2(StainAugment())


class TaggedImage(torch.Tensor):
    """What stands for tv_tensors.Image where torchvision does not import."""


class Mask(torch.Tensor):
    """Another tv_tensor."""


@pytest.fixture
def v2_like(monkeypatch):
    """The names that v2_transform takes from torchvision, with the documented behaviour, or torchvision itself."""
    pytest.importorskip("PIL.Image", reason="torchvision needs Pillow")
    try:
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        yield tv_tensors.Image, tv_tensors.Mask
        return
    except (ImportError, RuntimeError):
        pass

    class Transform(torch.nn.Module):
        def forward(self, *inputs):
            return tuple(self.transform(one, {}) for one in inputs)

    torchvision, transforms, v2, tv_tensors = (
        types.ModuleType(name)
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2", "torchvision.tv_tensors")
    )
    v2.Transform, transforms.v2, torchvision.tv_tensors = Transform, v2, tv_tensors
    tv_tensors.Image, tv_tensors.wrap = TaggedImage, lambda tensor, like: tensor.as_subclass(type(like))
    for module in (torchvision, transforms, v2, tv_tensors):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "ernet_fast.stain.v2_transform", raising=False)
    yield TaggedImage, Mask
    sys.modules.pop("ernet_fast.stain.v2_transform", None)


def test_v2_transform_finds_the_images_of_a_sample(v2_like):
    image_type, mask_type = v2_like
    normalizer = MacenkoNormalizer().fit(IMAGES[5])
    transform = as_v2(StainNormalize(normalizer))
    expected = normalizer(IMAGES[0])
    mask = torch.zeros((1, 40, 56), dtype=torch.uint8).as_subclass(mask_type)
    image, same_mask, label = transform(IMAGES[0].as_subclass(image_type), mask, 3)
    assert type(image) is image_type and torch.equal(image.as_subclass(torch.Tensor), expected)
    assert same_mask is mask and label == 3
    from PIL import Image

    (picture, _) = transform(Image.fromarray(IMAGES[0].permute(1, 2, 0).numpy()), 3)
    np.testing.assert_array_equal(np.asarray(picture), expected.permute(1, 2, 0).numpy())
    (plain, _) = transform(IMAGES[0], 3)
    assert torch.equal(plain, expected)
