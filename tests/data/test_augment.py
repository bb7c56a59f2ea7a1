"""Transforms: exact where they claim to be, random where they should be, never without being asked."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F

from ernet_fast.data import PatchTransform
from ernet_fast.data.augment import IMAGENET_MEAN, IMAGENET_STD, affine_matrix, warp_affine


def image(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def scaled(pixels: torch.Tensor) -> torch.Tensor:
    """The documented formula, in float64."""
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels.double() / 255 - mean) / std


# A float32 result of size up to 2.7 with a few roundings of 2^-24 each.
CLOSE = {"rtol": 0, "atol": 8 * 2.7 * 2**-24, "check_dtype": False}


def inverse(output: torch.Tensor) -> torch.Tensor:
    """Grey levels, unrounded, behind a transform's output."""
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (output.double() * std + mean) * 255


def test_evaluation_scales_and_crops_the_centre() -> None:
    x = image(32, 47)
    before = x.clone()
    out = PatchTransform(32)(x)
    assert out.dtype == torch.float32 and out.shape == (3, 32, 32) and out.is_contiguous()
    torch.testing.assert_close(out, scaled(x[:, :, 7:39]), **CLOSE)
    assert torch.equal(x, before)
    assert torch.equal(PatchTransform(32)(x), out)
    own = PatchTransform(32, mean=(0, 0, 0), std=(1, 1, 1))(x)
    torch.testing.assert_close(own, x[:, :, 7:39] / 255, rtol=0, atol=2**-23)


@pytest.mark.parametrize(
    ("resize", "shape", "size", "expected"),
    [
        ("shorter", (460, 700), (224, 224), (224, 341)),
        ("shorter", (100, 60), (224, 224), (373, 224)),
        ("shorter", (50, 80), (40, 20), (40, 64)),
        ("squeeze", (460, 700), (224, 224), (224, 224)),
    ],
)
def test_resizing(resize: str, shape: tuple[int, int], size: tuple[int, int], expected: tuple[int, int]) -> None:
    x = image(*shape)
    resized = F.interpolate(x[None].double(), size=expected, mode="bilinear", antialias=True)[0]
    top, left = (expected[0] - size[0]) // 2, (expected[1] - size[1]) // 2
    out = inverse(PatchTransform(size, resize=resize)(x))
    assert out.shape == (3, *size)
    # The uint8 resampling rounds once or twice (separable passes) and works with weights of 2^-7 at worst.
    assert (out - resized[:, top : top + size[0], left : left + size[1]]).abs().max() <= 2.0


def test_no_resizing_on_request() -> None:
    x = image(40, 50)
    torch.testing.assert_close(PatchTransform((20, 30), resize="none")(x), scaled(x[:, 10:30, 10:40]), **CLOSE)
    with pytest.raises(ValueError, match=r"40x50 pixels, smaller than size 64x64"):
        PatchTransform(64, resize="none")(x)


def test_flips_turns_and_crops_move_pixels_exactly() -> None:
    x = image(9, 12)
    transform = PatchTransform(8, train=True, resize="none", rotation=0, translation=0, zoom=(1, 1))
    torch.manual_seed(0)
    seen = set()
    crops = {}
    for top in range(2):
        for left in range(5):
            crop = x[:, top : top + 8, left : left + 8]
            for turn in range(4):
                for flip in (False, True):
                    moved = torch.rot90(crop.flip(2) if flip else crop, turn, (1, 2)).contiguous()
                    crops[moved.numpy().tobytes()] = (top, left, turn, flip)
    for _ in range(1200):
        pixels = inverse(transform(x)).round().to(torch.uint8)
        seen.add(crops[pixels.contiguous().numpy().tobytes()])
    assert len(seen) == 2 * 5 * 8  # every one of them, 15 times on average: missing one has chance 80 e^-15


def test_parts_can_be_switched_off() -> None:
    x = image(16, 16)
    still = PatchTransform(16, train=True, flips=False, quarter_turns=False, rotation=0, translation=0, zoom=(1, 1))
    torch.testing.assert_close(still(x), scaled(x), **CLOSE)
    oblong = PatchTransform((8, 16), train=True, rotation=0, translation=0, zoom=(1, 1))
    assert oblong(image(8, 16)).shape == (3, 8, 16)  # no quarter turns, which would not fit


def test_training_is_random_and_follows_torchs_generator() -> None:
    x, transform = image(40, 60), PatchTransform(32, train=True)
    torch.manual_seed(1)
    first, second = transform(x), transform(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(transform(x), first) and torch.equal(transform(x), second)
    low, high = scaled(torch.tensor([0, 255])[None, :, None].expand(3, 2, 1)).unbind(1)
    assert (first >= low[..., None] - 1e-5).all() and (
        first <= high[..., None] + 1e-5
    ).all()  # interpolation, no black corners


def smooth_picture(height: int, width: int) -> torch.Tensor:
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    return torch.stack([0.02 * x, 0.03 * y, 0.01 * (x - 2 * y)])


@pytest.mark.parametrize("rotation", [0.0, 17.0, -90.0])
@pytest.mark.parametrize("zoom", [0.8, 1.0, 1.3])
@pytest.mark.parametrize("translation", [(0.0, 0.0), (0.1, -0.05)])
def test_affine_maps_every_pixel_where_it_says(rotation: float, zoom: float, translation: tuple[float, float]) -> None:
    """On a linear picture bilinear interpolation is exact, so the value of a pixel tells where it came from."""
    height, width = 30, 44
    out = warp_affine(
        smooth_picture(height, width),
        affine_matrix((height, width), rotation=rotation, translation=translation, zoom=zoom).double(),
    )
    centre = torch.tensor([(width - 1) / 2, (height - 1) / 2], dtype=torch.float64)
    angle = torch.deg2rad(torch.tensor(rotation, dtype=torch.float64))
    # On a screen y points down: counter-clockwise takes (dx, dy) to (c dx + s dy, -s dx + c dy).
    turn = torch.stack([torch.stack([angle.cos(), angle.sin()]), torch.stack([-angle.sin(), angle.cos()])])
    shift = torch.tensor([translation[0] * width, translation[1] * height], dtype=torch.float64)
    checked = 0
    for y in range(0, height, 3):
        for x in range(0, width, 3):
            target = torch.tensor([x, y], dtype=torch.float64)
            source = turn.T @ (target - shift - centre) / zoom + centre
            if (source < 0).any() or source[0] > width - 1 or source[1] > height - 1:
                continue
            expected = torch.stack([0.02 * source[0], 0.03 * source[1], 0.01 * (source[0] - 2 * source[1])])
            # The matrix is float32: coordinates of size up to 44 pixels carry 2^-24 relative error in each of its
            # terms.
            torch.testing.assert_close(out[:, y, x], expected, rtol=0, atol=0.03 * 44 * 4 * 2**-24)
            checked += 1
    assert checked > 20


def test_affine_agrees_with_kornia() -> None:
    kornia = pytest.importorskip("kornia", reason="kornia is not installed")
    size = (33, 47)
    picture = torch.rand(1, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = affine_matrix(size, rotation=12.0, translation=(0.04, -0.03), zoom=1.1).double()
    centre = torch.tensor([[(size[1] - 1) / 2, (size[0] - 1) / 2]], dtype=torch.float64)
    forward = kornia.geometry.transform.get_rotation_matrix2d(
        centre, torch.tensor([12.0], dtype=torch.float64), torch.full((1, 2), 1.1, dtype=torch.float64)
    )
    forward[0, :, 2] += torch.tensor([0.04 * size[1], -0.03 * size[0]], dtype=torch.float64)
    expected = kornia.geometry.transform.warp_affine(
        picture, forward, size, padding_mode="reflection", align_corners=True
    )[0]
    inside = (slice(None), slice(6, -6), slice(6, -6))  # the two mirror at different lines
    torch.testing.assert_close(warp_affine(picture[0], matrix)[inside], expected[inside], rtol=0, atol=47 * 8 * 2**-24)


def test_normalizer_sees_the_whole_image_first() -> None:
    shapes = []

    def darker(x: torch.Tensor) -> torch.Tensor:
        shapes.append((tuple(x.shape), x.dtype))
        return x // 2

    x = image(20, 30)
    out = PatchTransform(16, resize="none", normalizer=darker)(x)
    assert shapes == [((3, 20, 30), torch.uint8)]
    torch.testing.assert_close(out, scaled((x // 2)[:, 2:18, 7:23]), **CLOSE)
    with pytest.raises(TypeError, match=r"what normalizer returned is torch.float32"):
        PatchTransform(16, normalizer=lambda x: x.float())(x)
    with pytest.raises(ValueError, match=r"what normalizer returned has shape \(30, 20, 3\)"):
        PatchTransform(16, normalizer=lambda x: x.permute(2, 1, 0))(x)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"size": 0}, "size=0"),
        ({"size": (3, 4, 5)}, "size="),
        ({"resize": "longer"}, "resize='longer'"),
        ({"rotation": 181}, "rotation=181"),
        ({"translation": 1}, "translation=1"),
        ({"zoom": (1.1, 0.9)}, "zoom="),
        ({"zoom": (0, 1)}, "zoom="),
        ({"std": (1, 1, 0)}, "std="),
        ({"mean": (0.5,)}, "mean="),
    ],
)
def test_arguments_are_checked(arguments: dict[str, object], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        PatchTransform(**arguments)


def test_wrong_images_are_refused() -> None:
    transform = PatchTransform(8)
    with pytest.raises(TypeError, match=r"torch.float32; expected a torch.uint8"):
        transform(torch.zeros(3, 8, 8))
    with pytest.raises(TypeError, match="ndarray"):
        transform(torch.zeros(3, 8, 8).numpy())
    for shape in ((8, 8, 3), (1, 3, 8, 8), (3, 0, 8)):
        with pytest.raises(ValueError, match="expected \\[3, H, W\\]"):
            transform(torch.zeros(shape, dtype=torch.uint8))


def test_pickles() -> None:
    transform = PatchTransform((8, 9), train=False, zoom=(0.5, 2))
    copy = pickle.loads(pickle.dumps(transform))
    assert torch.equal(copy(image(8, 9)), transform(image(8, 9)))
    assert "size=(8, 9)" in repr(copy)


@pytest.mark.parametrize("train", [False, True])
def test_torchs_default_device_and_dtype_change_nothing(train):
    image = torch.randint(0, 256, (3, 40, 36), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = PatchTransform(32, train=train, rotation=10.0)
    torch.manual_seed(1)
    expected = transform(image)
    for default in (lambda: torch.set_default_device("meta"), lambda: torch.set_default_dtype(torch.float64)):
        torch.manual_seed(1)
        try:
            default()
            found = transform(image)
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)
        assert found.device == expected.device and found.dtype == torch.float32 and torch.equal(found, expected)
