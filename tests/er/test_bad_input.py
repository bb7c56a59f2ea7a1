"""What does not fit is refused with the argument's name, before anything is computed or moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ernet_fast
from ernet_fast import ERShortcut, ERStage
from ernet_fast.reference import er_shortcut_sum as reference

X = torch.randn(2, 6, 3, 3)
W = torch.ones(2, 6)
MEAN, VAR = torch.zeros(2, 6), torch.ones(2, 6)
SHARED = torch.ones(6)

RUNNING = [
    ({"running_mean": 3.0, "running_var": VAR}, TypeError, r"running_mean is a float; expected 2 tensors of"),
    ({"running_mean": MEAN, "running_var": iter(VAR)}, TypeError, "running_var is a .*iterator; expected 2 tensors"),
    ({"running_mean": [[0.0] * 6] * 2, "running_var": VAR}, TypeError, r"running_mean\[0\] is a list; expected"),
    ({"running_mean": MEAN, "running_var": [VAR[0], None]}, TypeError, r"running_var\[1\] is a NoneType; expected a"),
    ({"running_mean": MEAN.int(), "running_var": VAR}, TypeError, r"running_mean\[0\] is torch.int32; expected"),
    ({"running_mean": MEAN, "running_var": VAR.to("meta")}, ValueError, r"running_var\[0\] is on meta but the maps on"),
    ({"running_mean": MEAN, "running_var": VAR[:1].expand(2, 6)}, ValueError, "running_var share memory"),
    ({"running_mean": MEAN[:, :1].expand(2, 6), "running_var": VAR}, ValueError, "running_var share memory"),
    ({"running_mean": MEAN, "running_var": [SHARED, SHARED]}, ValueError, "running_var share memory"),
    ({"training": "no"}, TypeError, "training is .no.; expected True or False"),
    ({"relu": "no"}, TypeError, "relu is .no.; expected True or False"),
    ({"running_mean": [SHARED] * 2, "running_var": VAR}, ValueError, "running_var share memory"),
]
OPTIONS = [
    ({"momentum": "0.1"}, TypeError, "momentum is a str; expected a number from 0 to 1"),
    ({"momentum": None}, TypeError, "momentum is a NoneType; expected a number"),
    ({"momentum": 1.5}, ValueError, "momentum is 1.5; expected a number from 0 to 1"),
    ({"momentum": float("nan")}, ValueError, "momentum is nan; expected"),
    ({"eps": "small"}, TypeError, "eps is a str; expected a number > 0"),
    ({"eps": 0.0}, ValueError, "eps is 0.0; expected a finite number > 0"),
    ({"eps": float("nan")}, ValueError, "eps is nan; expected a finite number > 0"),
    ({"eps": float("inf")}, ValueError, "eps is inf; expected a finite number > 0"),
    ({"eps": True}, TypeError, "eps is a bool; expected a number > 0"),
    ({"norm": "group", "num_groups": 2.0}, TypeError, "num_groups is 2.0; expected an int"),
    ({"norm": "group", "num_groups": 0}, ValueError, "num_groups=0 does not divide"),
    ({"norm": None}, ValueError, "norm is None; expected 'batch' or 'group'"),
]
MAPS = [
    (lambda: (x for x in [X, X, X]), TypeError, "xs must be a sequence of maps"),
    (lambda: [X.to_sparse()] * 3, TypeError, r"xs\[0\] has layout torch.sparse_coo; expected a dense tensor"),
    (lambda: [X.to_mkldnn()] * 3, TypeError, r"xs\[0\] has layout torch._mkldnn; expected a dense tensor"),
    (lambda: [X.to(torch.complex64)] * 3, TypeError, r"xs\[0\] is torch.complex64; expected float32"),
    (lambda: [X.to(torch.float8_e4m3fn)] * 3, TypeError, r"xs\[0\] is torch.float8_e4m3fn; expected float32"),
    (lambda: [X.bool()] * 3, TypeError, r"xs\[0\] is torch.bool; expected float32"),
    (lambda: [X, X, X.to("meta")], ValueError, r"xs\[2\] is on meta but xs\[0\] on cpu"),
    (lambda: [X, X, X.transpose(1, 2)], ValueError, r"xs\[2\] has shape \(2, 3, 6, 3\) but xs\[0\] \(2, 6, 3, 3\)"),
]


@pytest.mark.parametrize("function", [ernet_fast.er_shortcut_sum, reference])
@pytest.mark.parametrize(("options", "error", "message"), RUNNING + OPTIONS)
def test_options_of_the_function(function, options, error, message):
    with pytest.raises(error, match=message):
        function([X, X, X], W, **options)


@pytest.mark.parametrize("function", [ernet_fast.er_shortcut_sum, reference])
@pytest.mark.parametrize(("maps", "error", "message"), MAPS)
def test_maps_of_the_function(function, maps, error, message):
    mean, var = MEAN.clone(), VAR.clone()
    with pytest.raises(error, match=message):
        function(maps(), W, running_mean=mean, running_var=var)
    assert torch.equal(mean, MEAN) and torch.equal(var, VAR)


def test_shared_running_statistics_are_fine_where_they_are_only_read():
    y = ernet_fast.er_shortcut_sum([X] * 3, W, running_mean=[SHARED] * 2, running_var=[SHARED] * 2, training=False)
    expected = reference([X] * 3, W, running_mean=[SHARED] * 2, running_var=[SHARED] * 2, training=False)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(("maps", "error", "message"), [*MAPS, (lambda: [], ValueError, "xs is empty")])
def test_maps_of_the_module(maps, error, message, momentum, fused):
    module = ERShortcut(6, 2, momentum=momentum, fused=fused)
    with pytest.raises(error, match=message):
        module(maps())
    assert int(module.num_batches_tracked) == 0
    assert not bool(module.running_mean.any()) and bool((module.running_var == 1).all())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"channels": 6.0}, TypeError, "channels is 6.0; expected an int"),
        ({"num_maps": "2"}, TypeError, "num_maps is '2'; expected an int"),
        ({"channels": 0}, ValueError, "channels=0 and num_maps=2 must both be at least 1"),
        *((options, error, message) for options, error, message in OPTIONS if options != {"momentum": None}),
    ],
)
def test_arguments_of_the_module(options, error, message):
    with pytest.raises(error, match=message):
        ERShortcut(**({"channels": 6, "num_maps": 2} | options))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([X], TypeError, "x is list; expected a floating tensor"),
        (X.int(), TypeError, "x is torch.int32; expected a floating tensor"),
        (X[0], ValueError, r"x has shape \(6, 3, 3\); expected \[N, 6, H, W\]"),
        (X[:, :5], ValueError, r"x has shape \(2, 5, 3, 3\); expected \[N, 6, H, W\]"),
    ],
)
def test_input_of_a_stage(x, error, message, fused):
    with pytest.raises(error, match=message):
        ERStage(6, 8, 3, fused=fused)(x)


def wrong_size(stage: ERStage) -> None:
    stage[2].conv2 = nn.Conv2d(8, 8, 3, bias=False)


def wrong_channels(stage: ERStage) -> None:
    stage[2].conv2, stage[2].bn2 = nn.Conv2d(8, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)


def wrong_dtype(stage: ERStage) -> None:
    stage[2].double().register_forward_pre_hook(lambda _, args: (args[0].double(), *args[1:]))


def wrong_device(stage: ERStage) -> None:
    stage[2].to("meta").register_forward_pre_hook(lambda _, args: (args[0].to("meta"), *args[1:]))


def too_many_weights(stage: ERStage) -> None:
    stage[2].shortcut = ERShortcut(8, 3)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("norm", "groups"), [("batch", None), ("group", 2)])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (wrong_size, ValueError, r"a map of shape \(2, 8, 1, 1\); the maps of this stage have \(2, 8, 3, 3\)"),
        (wrong_channels, ValueError, r"branch gave a map of shape \(2, 4, 3, 3\); the maps of this stage have"),
        (wrong_dtype, TypeError, "branch gave a map of torch.float64; the maps of this stage are torch.float32"),
        (wrong_device, ValueError, "branch gave a map on meta; the maps of this stage are on cpu"),
        (too_many_weights, ValueError, "weights for 3 earlier maps of 8 channels; got 2 maps of 8 channels"),
    ],
)
def test_blocks_that_do_not_fit_their_stage(change: Callable[[ERStage], Any], error, message, norm, groups, fused):
    """The block that does not fit has not moved any of its statistics."""
    stage = ERStage(6, 8, 3, block="basic", norm=norm, num_groups=groups, fused=fused)
    change(stage)
    parts: list[nn.Module] = [stage[2].bn2, stage[2].shortcut]
    before: list[Tensor] = [b.clone() for part in parts for b in part.buffers()]
    with pytest.raises(error, match=message):
        stage(X)
    if change is not wrong_device:  # meta tensors have no values
        after = [b for part in parts for b in part.buffers()]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_numbers_of_numpy_are_numbers():
    expected = ernet_fast.er_shortcut_sum([X, X, X], W, eps=float(np.float32(1e-3)))
    assert torch.equal(ernet_fast.er_shortcut_sum([X, X, X], W, eps=np.float32(1e-3)), expected)
    assert torch.equal(ERShortcut(6, 2, eps=np.float32(1e-3), relu=False)([X, X, X]), expected)
