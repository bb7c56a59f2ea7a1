"""Two revisions, built beside each other: the same benches interleaved, A B A B, and the ratio of every row.

The benches are those of this tree for both, so that both answer the same question. One round runs them once on the
other revision and once on this tree; a row's ratio is taken within each round, so that a slow hour of the machine falls
on both. Contestants that are interleaved elsewhere are timed alone here: `-k fused` leaves out the package's peers.
"""

from __future__ import annotations

import functools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from green import environment_of, require_green
from machine import ROOT, output_of
from record import MORE_IS_BETTER, Row, read
from tables import columns

ADDOPTS = "addopts=--import-mode=importlib --strict-markers -ra --benchmark-disable-gc"


def run_benches(root: Path, folder: Path, selection: Sequence[str], log: Path | None = None) -> int:
    """Run this tree's benches on the package of the tree `root`, rows into `folder`; returns pytest's exit code.

    The output goes to `log`; of a run that failed its end is shown.
    """
    command = [
        sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-o", ADDOPTS,
        "-p", "no:cacheprovider", str(ROOT / "bench"), "--record", str(folder.resolve()), *selection,
    ]  # fmt: skip
    # NumPy's matrix products on one thread: its library reads the variable when it loads, so no bench can set it.
    environment = {"OPENBLAS_NUM_THREADS": "1", **environment_of(root)}
    if log is None:
        return subprocess.run(command, cwd=root, env=environment, check=False).returncode
    command += ["-q", "--benchmark-quiet", "--continue-on-collection-errors"]
    with log.open("w") as file:
        code = subprocess.run(command, cwd=root, env=environment, stdout=file, stderr=file, check=False).returncode
    if code:
        print("\n".join(log.read_text(errors="replace").strip().splitlines()[-15:]), file=sys.stderr)
    return code


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """The revision, checked out and built in a folder of its own, which is removed afterwards."""
    commit = output_of("git", "rev-parse", "--verify", "--short=9", f"{revision}^{{commit}}")
    if not commit:
        raise ValueError(f"--compare {revision}: no such revision.")
    with tempfile.TemporaryDirectory(prefix="ernet-bench-") as parent:
        root = Path(parent) / commit
        run = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=False)
        added = run(["git", "worktree", "add", "--detach", str(root), commit])
        if added.returncode:
            raise ValueError(f"--compare {revision}: git worktree add: {added.stderr.strip()}")
        try:
            # what is compared runs on the CPU, and the CUDA code takes minutes
            build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            built = run(build, cwd=root, env={**os.environ, "ERNET_CUDA": "0"})
            if built.returncode:
                raise ValueError(f"--compare {revision}: it does not build: {built.stderr.strip()[-400:]}")
            yield root
        finally:
            run(["git", "worktree", "remove", "--force", str(root)])


@dataclass(frozen=True)
class Change:
    """A row in both: how many times better it is now, in every round."""

    row: Row
    before: float
    now: float
    ratios: list[float]

    @property
    def ratio(self) -> float:
        """Median over the rounds; above 1 is better than before."""
        return statistics.median(self.ratios)

    def regressed(self, share: float) -> bool:
        """True if it is worse by more than `share`, and worse in every round."""
        return 1 / self.ratio > 1 + share and max(self.ratios) < 1


def changes(
    before: Sequence[Mapping[tuple[str, str], Row]], now: Sequence[Mapping[tuple[str, str], Row]]
) -> list[Change]:
    """The rows that every round of both has."""
    found = []
    for key, row in now[-1].items():
        if not all(key in rows for rows in (*before, *now)) or row.status != "measured":
            continue
        pairs = [(old[key].p50, new[key].p50) for old, new in zip(before, now, strict=True)]
        if all(value > 0 for pair in pairs for value in pair):
            more = row.unit in MORE_IS_BETTER
            ratios = [new / old if more else old / new for old, new in pairs]
            found.append(Change(row, *(statistics.median(side) for side in zip(*pairs, strict=True)), ratios))
    return found


def table(found: Sequence[Change], revision: str, share: float | None) -> str:
    lines = [["row", revision, "this tree", "", "times better", "over the rounds", ""]]
    for change in sorted(found, key=lambda one: one.ratio):
        least, most = min(change.ratios), max(change.ratios)
        said = "" if share is None else "REGRESSED" if change.regressed(share) else "ok"
        lines.append([
            change.row.name, f"{change.before:.4g}", f"{change.now:.4g}", change.row.unit,
            f"{change.ratio:.3f}", f"{least:.3f} to {most:.3f}", said,
        ])  # fmt: skip
    return "\n".join(columns(lines))


def rows_in(folder: Path) -> dict[tuple[str, str], Row]:
    """The rows of the one record in a folder; none if nothing was measured."""
    return {row.key: row for path in folder.glob("*.json") for row in read(path)[1]}


def compare(revision: str, selection: Sequence[str], rounds: int, share: float | None) -> int:
    """Measure both interleaved and print the table; exit code 1 if a row regressed by more than `share`."""
    with worktree(revision) as other, tempfile.TemporaryDirectory() as made:
        require_green(ROOT)
        require_green(other)
        measured: dict[str, list[dict[tuple[str, str], Row]]] = {"before": [], "now": []}
        for number in range(rounds):
            for side, root in (("before", other), ("now", ROOT)):
                print(f"round {number + 1} of {rounds}: {revision if side == 'before' else 'this tree'}", flush=True)
                folder = Path(made) / f"{side}{number}"
                run_benches(root, folder, ["--alone", *selection], Path(made) / f"{side}{number}.log")
                measured[side].append(rows_in(folder))
        found = changes(measured["before"], measured["now"])
        missing = [key[1] for key in measured["now"][-1] if key not in measured["before"][-1]]
    if not found:
        print("no row was measured in both; look at what the selection runs", file=sys.stderr)
        return 1
    print(f"\n{table(found, revision, share)}")
    if missing:
        print(f"only in this tree: {', '.join(missing)}")
    return 1 if share is not None and any(change.regressed(share) for change in found) else 0
