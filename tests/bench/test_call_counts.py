"""call_counts.py counts what a small package does, and a pass of a stage stays within what it once took."""

from __future__ import annotations

import importlib
import sys

import call_counts
import pytest

from ernet_fast import _backend

# Python calls and changes of file at most, a little above those of today; lower them when the path gets shorter.
AT_MOST = {
    "forward of a stage of 3 blocks, contiguous": (150, 110),
    "backward of a stage of 3 blocks, contiguous": (76, 48),
    # three more for each of ten convolutions, whose weight gradients are by our operator; backward two
    "forward of a stage of 3 blocks, channels-last": (185, 145),
    "backward of a stage of 3 blocks, channels-last": (95, 75),
    "MacenkoNormalizer.normalize of one image": (110, 46),
}


def test_counts_of_a_known_package(tmp_path, monkeypatch):
    package = tmp_path / "counted"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text("def leaf():\n    return sorted([2, 1])\n")
    (package / "outer.py").write_text(
        "from counted import inner\n\ndef twice():\n    inner.leaf()\n    inner.leaf()\n    return own()\n\n"
        "def own():\n    return sum(n for n in (1, 2))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    outer = importlib.import_module("counted.outer")
    try:
        count = call_counts.count_calls(outer.twice, package)
    finally:
        for name in ("counted.outer", "counted.inner", "counted"):
            sys.modules.pop(name, None)
    # the generator is entered once for each of its two values and once for its end
    assert count.functions == {"outer.py:twice": 1, "inner.py:leaf": 2, "outer.py:own": 1, "outer.py:<genexpr>": 3}
    assert count.calls == 7
    assert count.file_changes == 2  # twice -> leaf, leaf -> own


def test_profile_function_is_restored():
    before = sys.getprofile()
    with pytest.raises(ZeroDivisionError):
        call_counts.count_calls(lambda: 1 / 0)
    assert sys.getprofile() is before


def test_counts_stay_within_their_limits(monkeypatch, capsys):
    if not _backend.extension_available():
        pytest.skip("counts of the compiled path; ernet_fast is not compiled here")
    counts = call_counts.all_counts()
    assert counts.keys() == AT_MOST.keys()
    over = {
        name: (count.calls, count.file_changes)
        for name, count in counts.items()
        if count.calls > AT_MOST[name][0] or count.file_changes > AT_MOST[name][1]
    }
    assert not over
    assert all(count.calls > 0 for count in counts.values())
    monkeypatch.setattr(sys, "argv", ["call_counts.py"])
    monkeypatch.setattr(call_counts, "all_counts", lambda: counts)
    call_counts.main()
    printed = capsys.readouterr().out
    assert all(name in printed for name in AT_MOST)
