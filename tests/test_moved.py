"""Old module paths: imports and pickles that name them still work, with a warning that names the new one."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys

import pytest

from ernet_fast import _moved


@pytest.mark.parametrize("old", _moved.MOVED)
def test_an_old_path_is_the_new_module(old):
    new = importlib.import_module(_moved.MOVED[old])
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} has moved to {new.__name__}"):
        found = importlib.import_module(old)
    assert found is new and new.__spec__.name == new.__name__


def test_a_pickle_that_names_an_old_path():
    text = pickle.dumps(importlib.import_module("ernet_fast.er.shortcut").FoldedShortcut, protocol=0)
    old = text.replace(b"ernet_fast.er.shortcut", b"ernet_fast.er.folded")
    assert old != text
    with pytest.warns(DeprecationWarning):
        sys.modules.pop("ernet_fast.er.folded", None)
        assert pickle.loads(old).__name__ == "FoldedShortcut"


def test_a_module_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("ernet_fast.er.no_such_module")


def test_importing_the_package_warns_of_nothing():
    code = "import warnings; warnings.simplefilter('error', DeprecationWarning); import ernet_fast"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, timeout=120)
