"""No speed is reported of a tree whose correctness tests fail: which tests, and a stamp once they pass."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from machine import ROOT, sources_hash, version

# half a minute: every operator, the stage, and Macenko, against the references
QUICK = (
    "tests/er/test_operators.py",
    "tests/er/test_stage_maps.py",
    "tests/er/test_shortcut_sum.py",
    "tests/er/test_norm_relu.py",
    "tests/models/test_paths_agree.py",
    "tests/stain/test_macenko_operators.py",
    "tests/stain/test_macenko_parity.py",
)


class NotReported(Exception):
    """Why the speed of a tree is not reported."""


def environment_of(root: Path) -> dict[str, str]:
    """The environment in which the package of the tree `root` is found first."""
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def stamp_of(root: Path) -> Path:
    """The file that says that these very sources passed, with this torch and Python."""
    with_what = f"torch{version('torch')}-{sys.implementation.cache_tag}"
    return root / "build" / "green" / f"{sources_hash(root)}-{with_what}"


def require_green(root: Path = ROOT, tests: tuple[str, ...] = QUICK) -> None:
    """Run the tests of the tree unless they are known to pass; raises NotReported if one fails."""
    stamp = stamp_of(root)
    if stamp.exists():
        return
    present = [test for test in tests if (root / test).exists()]
    if not present:
        raise NotReported(f"not reported: {root} has none of the tests {', '.join(tests)}.")
    if importlib.util.find_spec("pytest") is None:
        raise NotReported("not reported: the correctness tests cannot run, pytest is not installed.")
    print(f"correctness first: {len(present)} test files of {root.name}", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *present]
    done = subprocess.run(command, cwd=root, env=environment_of(root), capture_output=True, text=True, check=False)
    if done.returncode:
        end = "\n".join(done.stdout.strip().splitlines()[-12:])
        raise NotReported(f"{end}\nnot reported: the correctness tests of {root} fail (exit code {done.returncode}).")
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text("".join(f"{test}\n" for test in present))
