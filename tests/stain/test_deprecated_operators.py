"""Programs and state dicts of version 0.1.0 load and give what they gave.

The files in tests/data_before were written with that version, on the CPU:

- macenko_operators.pt2: `torch.export.export` and `torch.export.save` of a module whose forward pass calls
  macenko_moments, macenko_normalize, macenko_reconstruct, macenko_reconstruct_scaled (to float32) and
  macenko_normalize_scaled (to bfloat16) of torch.ops.ernet on uint8 images [2, 3, 16, 20] with the published stains.
- macenko_operators.pt: those images, and the eight results of that module.
- macenko_normalizer.pt: the state dict of `MacenkoNormalizer(Io=250).fit` of the first image.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from ernet_fast import _backend
from ernet_fast.stain import MacenkoNormalizer

FOLDER = Path(__file__).resolve().parents[1] / "data_before"
compiled = pytest.mark.skipif(not _backend.extension_available(), reason="the compiled operators are not built")


@compiled
def test_an_exported_program_gives_what_it_gave():
    saved = torch.load(FOLDER / "macenko_operators.pt", weights_only=True)
    program = torch.export.load(FOLDER / "macenko_operators.pt2")
    with pytest.warns(DeprecationWarning, match="macenko_reconstruct takes dtype"):
        results = program.module()(saved["images"])
    moments, image, stain, maximum, status, again, scaled, whole = results
    before = saved["results"]
    # Integer sums, rounded once; the rest may differ by what instruction sets fuse.
    torch.testing.assert_close(moments, before[0], rtol=2.0**-52, atol=0)
    torch.testing.assert_close((stain, maximum, status), tuple(before[2:5]), rtol=1e-12, atol=1e-14)
    for found, expected in ((image, before[1]), (again, before[5])):
        assert (found.int() - expected.int()).abs().max() <= 1
    for found, expected in ((scaled, before[6]), (whole, before[7])):
        assert found.shape == expected.shape == (2, 16, 20, 3) and found.dtype == expected.dtype
        assert (found.float() - expected.float()).abs().max() <= 1.01 / 255 / 0.2 + 2.0**-8 * 4


@compiled
def test_each_old_operator_equals_its_successor():
    images = torch.load(FOLDER / "macenko_operators.pt", weights_only=True)["images"]
    target = MacenkoNormalizer().target
    stains = target.stain_matrix, target.max_concentration
    mean, std = torch.tensor([[0.7, 0.5, 0.6], [0.2, 0.25, 0.3]], dtype=torch.float64)
    ops, scaling = torch.ops.ernet, {"dtype": torch.float16, "mean": mean, "std": std}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = ops.macenko_reconstruct_scaled(images, *stains, *stains, mean, std, 240.0, torch.float16)
        whole = ops.macenko_normalize_scaled(
            images, *stains, mean, std, 240.0, 1.0, 0.15, False, True, torch.float16, 255.0
        )
    assert torch.equal(found, ops.macenko_reconstruct(images, *stains, *stains, 240.0, **scaling))
    for a, b in zip(
        whole, ops.macenko_normalize(images, *stains, 240.0, 1.0, 0.15, False, True, **scaling), strict=True
    ):
        assert torch.equal(a, b)


def test_a_state_dict_without_settings_leaves_those_of_the_module():
    state = torch.load(FOLDER / "macenko_normalizer.pt", weights_only=True)
    normalizer = MacenkoNormalizer(Io=250)
    assert normalizer.load_state_dict(state) == ([], [])
    assert torch.equal(normalizer.HERef, state["HERef"]) and normalizer.Io == 250
