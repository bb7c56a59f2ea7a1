"""The resident and the cluster plan of CUDA, run on the CPU in several schedules, against the streaming plan."""

from __future__ import annotations

import numpy as np
import pytest
from emulator import H200, PLANS, Device, Emulator, Network, Plan
from kernel_images import channels_last, degenerate, stack, tissue
from stain_images import load, real_parameters

from ernet_fast.stain import MacenkoNormalizer
from ernet_fast.stain.augment import draw_changes

TARGET = MacenkoNormalizer().target
STAINS = TARGET.stain_matrix.numpy(), TARGET.max_concentration.numpy()
CLUSTERS = [("resident", 1), ("cluster", 2), ("cluster", 8), ("cluster", 16)]


def assert_same(found, expected):
    for part, other in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        np.testing.assert_array_equal(part, other)


@pytest.mark.parametrize("size", [(1, 1, 3), (1, 15, 2), (7, 11, 3), (17, 16, 2), (33, 65, 3)])
def test_every_plan_gives_the_same_bits(simt_library, size):
    images = tissue(*size)
    for laid_out in (images, channels_last(images)):
        expected = Emulator(simt_library, 1).normalize(laid_out, target=STAINS)
        for seed, (kind, blocks) in enumerate(CLUSTERS[:3]):
            emulator = Emulator(simt_library, seed)
            plan = emulator.choose_plan(laid_out, kind, blocks)
            assert (plan.kind, plan.blocks) == (PLANS[kind], blocks)
            assert_same(emulator.normalize(laid_out, plan, STAINS), expected)


@pytest.mark.parametrize("parameter", real_parameters()[:4])
def test_real_crops_give_the_same_bits(simt_library, parameter):
    image = load(parameter)
    images = stack(image[:60, :71], image[-60:, -71:])
    expected = Emulator(simt_library, 1).normalize(images, target=STAINS)
    for seed, (kind, blocks) in enumerate(CLUSTERS[:3]):
        emulator = Emulator(simt_library, 20 + seed)
        assert_same(emulator.normalize(images, emulator.choose_plan(images, kind, blocks), STAINS), expected)


@pytest.mark.parametrize(("kind", "blocks"), [CLUSTERS[0], CLUSTERS[1], CLUSTERS[3]])
@pytest.mark.parametrize("identity", [False, True])
def test_degenerate_images_give_the_same_bits(simt_library, kind, blocks, identity):
    images = degenerate()
    expected = Emulator(simt_library, 1).normalize(images, target=STAINS, identity=identity)
    emulator = Emulator(simt_library, 7)
    plan = emulator.choose_plan(images, kind, blocks)
    assert_same(emulator.normalize(images, plan, STAINS, identity=identity), expected)
    assert set(expected[1].status.tolist()) == {0, 1, 2}


def test_a_persistent_grid_serves_every_image(simt_library):
    """Fewer blocks than images, and blocks that take several."""
    images = np.concatenate([tissue(9, 14, 3), tissue(9, 14, 2)[::-1]])
    expected = Emulator(simt_library, 1).normalize(images, target=STAINS)
    for multiprocessors in (1, 2, 4):
        emulator = Emulator(simt_library, multiprocessors)
        for kind, blocks in CLUSTERS[:2]:
            plan = emulator.choose_plan(images, kind, blocks)
            found = emulator.normalize(images, plan, STAINS, multiprocessors=multiprocessors * blocks)
            assert_same(found, expected)


def test_clusters_that_the_device_cannot_hold_are_refused(simt_library):
    images = tissue(9, 14, 1)
    emulator = Emulator(simt_library, 1)
    plan = emulator.choose_plan(images, "cluster", 4)
    with pytest.raises(RuntimeError, match="CUDA error 9"):  # cudaErrorInvalidConfiguration
        emulator.normalize(images, plan, STAINS, multiprocessors=3)
    assert emulator.normalize(images, plan, STAINS, multiprocessors=4)[1].status.tolist() == [0]


def test_a_repeated_table_changes_nothing(simt_library):
    images = tissue(40, 50, 1)
    emulator = Emulator(simt_library, 2)
    plan = emulator.choose_plan(images, "resident")
    expected = emulator.normalize(images, plan, STAINS)
    for shift in (1, 3, 5):
        wider = plan._replace(table_shift=shift, shared_bytes=plan.shared_bytes + (1024 << shift) - 1024)
        assert_same(emulator.normalize(images, wider, STAINS), expected)


def test_a_fit_alone_writes_no_image(simt_library):
    images = tissue(12, 18, 2)
    emulator = Emulator(simt_library, 1)
    expected = emulator.fit(images)
    for kind, blocks in CLUSTERS[:2]:
        found = emulator.fit(images, plan=emulator.choose_plan(images, kind, blocks))
        for part, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(part, other)


KINDS = [(np.float32, 1, 4), (np.uint16, 2, 2), (np.float16, 3, 2)]  # dtype (uint16: bits of bfloat16), number, bytes


@pytest.mark.parametrize(("dtype", "kind", "size"), KINDS)
def test_network_input_is_the_scaled_image(simt_library, dtype, kind, size):
    import torch

    mean, std = (0.7, 0.5, 0.6), (0.2, 0.25, 0.3)
    network = Network(dtype, mean, std, kind)
    images = tissue(7, 23, 3)
    images[1] = 255
    for laid_out in (images, channels_last(images)):
        emulator = Emulator(simt_library, 3)
        levels, _ = emulator.normalize(laid_out, target=STAINS)
        scaled = (levels.transpose(0, 2, 3, 1) / 255 - np.array(mean)) / np.array(std)
        torch_dtype = {1: torch.float32, 2: torch.bfloat16, 3: torch.float16}[kind]
        expected = torch.from_numpy(scaled).float().to(torch_dtype)
        for plan in (None, emulator.choose_plan(images, "resident", network=True)):
            found, _ = emulator.normalize(laid_out, plan, STAINS, network=network)
            as_torch = torch.from_numpy(found).view(torch_dtype) if kind == 2 else torch.from_numpy(found)
            assert torch.equal(as_torch, expected)


@pytest.mark.parametrize("identity", [False, True])
def test_augmentation_equals_the_cpu(simt_library, identity):
    """In every plan, with stains that are found and with stains that are known."""
    import torch

    from ernet_fast.stain import macenko_augment

    images = np.concatenate([tissue(24, 20, 3), degenerate()[:2]])
    policy = "identity" if identity else "reference"
    expected, status = macenko_augment(
        torch.from_numpy(images), generator=torch.Generator().manual_seed(3), on_degenerate=policy, return_status=True
    )
    gain, shift = draw_changes(len(images), 0.2, 0.2, torch.Generator().manual_seed(3))
    changes = gain.numpy(), shift.numpy()
    for laid_out in (images, channels_last(images)):
        emulator = Emulator(simt_library, 2)
        first = emulator.normalize(laid_out, target=STAINS, changes=changes, identity=identity)
        np.testing.assert_array_equal(first[1].status, status.numpy())
        # Light and tint are rounded to float32 on the CPU: at a whole level either of two may come out.
        difference = np.abs(first[0].astype(int) - expected.numpy())
        assert difference.max() <= 1 and (difference != 0).sum() <= 5e-4 * difference.size
        for kind, blocks in CLUSTERS[:3]:
            plan = emulator.choose_plan(laid_out, kind, blocks)
            found = emulator.normalize(laid_out, plan, STAINS, changes=changes, identity=identity)
            assert_same(found, first)
        known = first[1].stain[:3].copy(), first[1].maximum[:3].copy()
        again = emulator.reconstruct(laid_out[:3], known, known, changes=(changes[0][:3], changes[1][:3]))
        np.testing.assert_array_equal(again, first[0][:3])


def sized(count, height, width, dtype=np.uint8):
    return np.broadcast_to(np.zeros((), dtype), (count, 3, height, width)).copy()


A100 = Device(8, 108, 166912, 40 << 20)
A6000 = Device(8, 84, 101376, 6 << 20)
T4 = Device(7, 40, 65536, 4 << 20)
RTX_5090 = Device(12, 170, 101376, 96 << 20)


@pytest.mark.parametrize(
    ("device", "size", "expected"),
    [
        (H200, (256, 224, 224), ("resident", 1)),
        (H200, (256, 256, 256), ("resident", 1)),
        (H200, (64, 299, 299), ("cluster", 2)),
        (H200, (64, 460, 700), ("cluster", 8)),
        (H200, (64, 512, 512), ("cluster", 4)),
        (H200, (16, 512, 512), ("cluster", 8)),
        (H200, (1, 224, 224), ("cluster", 8)),
        (H200, (1, 1100, 1100), ("streaming", 1)),
        (A100, (256, 224, 224), ("resident", 1)),
        (A100, (1, 224, 224), ("streaming", 1)),
        (A100, (256, 256, 256), ("streaming", 1)),
        (A6000, (256, 128, 128), ("resident", 1)),
        (A6000, (256, 224, 224), ("streaming", 1)),
        (T4, (256, 96, 96), ("resident", 1)),
        (T4, (256, 224, 224), ("streaming", 1)),
        (RTX_5090, (256, 224, 224), ("cluster", 2)),
        (RTX_5090, (64, 460, 700), ("streaming", 1)),
    ],
)
def test_the_plan_follows_size_and_device(simt_library, device, size, expected):
    images = sized(*size)
    emulator = Emulator(simt_library)
    for network in (False, True):
        plan = emulator.choose_plan(images, device=device, network=network)
        assert plan.shared_bytes <= device.block_shared_bytes
        if not network:
            assert (plan.kind, plan.blocks) == (PLANS[expected[0]], expected[1])


@pytest.mark.parametrize(
    ("device", "size", "wanted", "together", "threads"),
    [
        (H200, (4096, 64, 64), "automatic", 4, 128),
        (H200, (4096, 96, 96), "automatic", 3, 160),
        (H200, (4096, 128, 128), "automatic", 2, 256),
        (H200, (4096, 224, 224), "automatic", 1, 512),
        (H200, (4096, 224, 224), "cluster2", 2, 256),
        (H200, (132, 96, 96), "resident", 1, 512),
        (A100, (4096, 96, 96), "automatic", 3, 160),
        (A6000, (4096, 128, 128), "automatic", 1, 512),
        (T4, (4096, 64, 64), "automatic", 2, 256),
    ],
)
def test_many_small_images_share_a_multiprocessor(simt_library, device, size, wanted, together, threads):
    """By count: 65,536 registers, 128 a thread; shared memory, of which each block takes 1 KB beside its own."""
    kind = wanted.rstrip("2")
    plan = Emulator(simt_library).choose_plan(sized(*size), kind, 2 if kind == "cluster" else 0, device=device)
    assert plan.threads == threads
    of_memory = (device.block_shared_bytes + 1024) // (plan.shared_bytes + 1024)
    assert min(65536 // (128 * plan.threads), of_memory) == together


def test_blocks_that_share_a_multiprocessor_have_the_same_bits_and_lists_that_suffice(simt_library):
    images = tissue(96, 96, 3)
    expected = Emulator(simt_library, 1).normalize(images, target=STAINS)
    crowded = Device(9, 1, H200.block_shared_bytes, H200.cache_bytes)
    emulator = Emulator(simt_library, 2)
    plan = emulator.choose_plan(images, device=crowded)
    assert plan.threads == 160
    assert_same(emulator.normalize(images, plan, STAINS, multiprocessors=1), expected)
    lists = emulator.lists()
    assert lists.rounds == 2 * len(images) and lists.missed == 0


def test_plans_that_cannot_serve_are_refused(simt_library):
    emulator = Emulator(simt_library)
    refused = Plan(PLANS["automatic"], 0, 0, 0, 0, 0)
    assert emulator.choose_plan(sized(1, 8, 8), "cluster", 3) == refused
    assert emulator.choose_plan(sized(1, 8, 8), "cluster", 32) == refused
    assert emulator.choose_plan(sized(1, 8, 8), "cluster", 2, device=A100) == refused
    assert emulator.choose_plan(sized(1, 400, 400), "resident") == refused
    assert emulator.choose_plan(sized(1, 8, 8, np.float32), "resident") == refused
    assert emulator.choose_plan(sized(1, 8, 8, np.float32)).kind == PLANS["streaming"]
