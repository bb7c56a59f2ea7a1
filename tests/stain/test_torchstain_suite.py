"""torchstain's own tests, run on this library's normalisers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Its tests of the colour conversion, the covariance and the percentile call its own functions, and test_tf.py needs
# TensorFlow, one of its backends that this library does not have. A class of its own for several targets is an argument
# of `fit` here.
SUITE = """
import sys, pytest, torchstain
from ernet_fast.stain import MacenkoNormalizer, ReinhardNormalizer

class MultiMacenkoNormalizer(MacenkoNormalizer):
    def __init__(self, backend="torch", norm_mode="avg-post"):
        super().__init__(backend)
        self.targets = {"avg-post": "avg", "concat": "concat"}[norm_mode]

    def fit(self, Is, *numbers):
        return super().fit(Is, *numbers, targets=self.targets)

for ours in (MacenkoNormalizer, MultiMacenkoNormalizer, ReinhardNormalizer):
    assert hasattr(torchstain.normalizers, ours.__name__)
    setattr(torchstain.normalizers, ours.__name__, ours)
arguments = ["-q", "-p", "no:cacheprovider", "-W", "ignore", f"{sys.argv[1]}/test_torch.py"]
sys.exit(pytest.main([*arguments, "-k", "macenko or reinhard"]))
"""


@pytest.mark.slow
def test_torchstains_own_suite():
    """tests/ of torchstain's repository, unchanged, beside its data/."""
    suite = os.environ.get("TORCHSTAIN_TESTS")
    if suite is None:
        pytest.skip("set TORCHSTAIN_TESTS to the folder tests/ of torchstain's repository")
    for package in ("torchstain", "cv2", "torchvision"):
        pytest.importorskip(package, exc_type=ImportError)
    command = [sys.executable, "-c", SUITE, suite]
    run = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert run.returncode == 0 and "3 passed" in run.stdout, run.stdout[-4000:]
