"""`python3 dev.py compat`: the tests of the binary at hand under another torch, with the real torchvision and timm.

Makes an environment with that torch (once; with CUDA libraries it takes some 5.5 GB), loads the library that was built
beside the usual torch, and runs the tests. `--record` enters the outcome in the table of docs/building.md.
Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "ernet_fast" / "libernet.so"
PAGE = ROOT / "docs" / "building.md"
BEGIN, END = "<!-- compat: written by dev.py compat --record -->", "<!-- end of compat -->"
HEAD = (
    "| torch | built with | torchvision | timm | Python | date | tests | outcome |\n|---|---|---|---|---|---|---|---|\n"
)
PROBE = """
import json, platform, sys
import torch, torchvision, timm
from ernet_fast import _backend
assert _backend.extension_available(), _backend.why_unavailable()
print(json.dumps({"torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__,
                  "python": platform.python_version(), "built with": _backend.build_info()["torch_headers"]}))
"""


def torchvision_of(torch: str) -> str:
    """The torchvision that goes with a torch: 0.29.1 with 2.14.1."""
    _, minor, patch = torch.split(".")
    return f"0.{int(minor) + 15}.{patch}"


def make_environment(folder: Path, torch: str, python: str) -> Path:
    """An environment with this torch and everything that tests use; returns its Python."""
    inside = folder / "bin" / "python"
    stamp, wanted = folder / "compat.txt", f"torch=={torch}\ntorchvision=={torchvision_of(torch)}\n"
    if stamp.exists() and stamp.read_text() == wanted:
        return inside
    print(f"Making {folder} with torch {torch} (with CUDA libraries some 5.5 GB)", flush=True)
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    others = folder / "others.txt"
    lines = [line for part in ("demo", "dev") for line in (ROOT / f"requirements-{part}.txt").read_text().splitlines()]
    others.write_text("\n".join(line for line in lines if not re.match("torch==|triton==|-r ", line)))
    constraints = folder / "constraints.txt"
    constraints.write_text(wanted)
    pip = [str(inside), "-m", "pip", "install", "--disable-pip-version-check", "-c", str(constraints)]
    subprocess.run([*pip, "torch", "torchvision", "timm"], check=True)
    subprocess.run([*pip, "-r", str(others)], check=True)
    stamp.write_text(wanted)
    return inside


def outcome_of(report: Path) -> tuple[str, str]:
    """How many tests ran, and what became of them, from pytest's report."""
    counts: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        found = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        counts[{"failure": "failed", "error": "failed"}.get(found, found)] += 1
    ran = counts["passed"] + counts["failed"]
    return str(ran), f"{counts['failed']} failed, {counts['skipped']} skipped" if counts["failed"] else (
        f"all passed, {counts['skipped']} skipped"
    )


def table_with(text: str, row: str) -> str:
    """The page with a row more in its table; one that begins alike (same versions, same tests) is replaced."""
    before, _, rest = text.partition(BEGIN)
    table, _, after = rest.partition(END)
    key = [cell.strip() for cell in row.split("|")]
    kept = [line for line in table.splitlines() if re.match(r"\| \d", line)]
    kept = [line for line in kept if not _same([cell.strip() for cell in line.split("|")], key)]
    return f"{before}{BEGIN}\n\n{HEAD}" + "\n".join(sorted([*kept, row])) + f"\n\n{END}{after}"


def _same(left: list[str], right: list[str]) -> bool:
    """Whether two rows are of the same versions and the same tests."""
    return left[1:6] == right[1:6] and left[7].split(": ")[0] == right[7].split(": ")[0]


def main(arguments: Sequence[str]) -> int:
    """Run the tests under another torch; returns pytest's exit code."""
    parser = argparse.ArgumentParser(prog="dev.py compat", description=__doc__.split("\n\n")[0])
    parser.add_argument("--torch", default="2.14.1", help="its version (default %(default)s)")
    parser.add_argument("--env", type=Path, help="an environment that is there, with torch, torchvision and timm")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of a new environment (default this)")
    parser.add_argument("--record", action="store_true", help="enter the outcome in docs/building.md")
    parser.add_argument("tests", nargs="*", default=["tests"], help="for pytest (default all tests)")
    options = parser.parse_args(arguments)
    if not LIBRARY.exists():
        parser.error(f"{LIBRARY.relative_to(ROOT)} is not there; build it first: python3 dev.py build")
    if options.env is not None:
        python = options.env.resolve() / "bin" / "python"
    else:
        python = make_environment(ROOT / f".venv-torch-{options.torch}", options.torch, options.python)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    probe = subprocess.run([python, "-c", PROBE], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    versions = json.loads(probe.stdout)
    digest = hashlib.sha256(LIBRARY.read_bytes()).hexdigest()
    print(f"libernet.so {digest[:12]}, built with torch {versions['built with']}, under torch {versions['torch']}")
    report = ROOT / "build" / "compat.xml"
    report.parent.mkdir(exist_ok=True)
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *options.tests]
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    ran, outcome = outcome_of(report)
    tests = " ".join(sorted(options.tests))
    cells = [versions[key] for key in ("torch", "built with", "torchvision", "timm", "python")]
    row = f"| {' | '.join(cells)} | {datetime.now(timezone.utc):%Y-%m-%d} | {tests}: {ran} | {outcome} |"
    print(row)
    if options.record:
        PAGE.write_text(table_with(PAGE.read_text(), row))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
