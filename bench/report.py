"""Brings tables, pages and pictures into step with bench/results/: `python3 dev.py report [--check]`.

A document (README.md, docs/*.md) says where a table goes; everything between the two lines is written by this command:

    <!-- table NAME -->
    <!-- end of NAME -->

Tables come from here (`targets-cpu`, `targets-gpu`, `rows-cpu`, `rows-gpu`, `records`) and from the modules
bench/report_*.py, which define one or both of

    tables(records: Records) -> dict[str, str]                   Markdown by name
    BENCHES: names of bench modules, main([RECORD, FOLDER])      which writes pages and pictures from one record

Each row is taken from the newest record that has it. Speeds of a record in which a correctness check failed are not
reported. What no record of a GPU has is listed as "not yet measured on a
GPU". `--check` writes nothing and fails where something is out of step
(pictures, which differ from one version of matplotlib to the next, need only be there).
"""

from __future__ import annotations

import argparse
import importlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_case import GpuCase, cases_of, modules
from gpu_table import number, verdict
from record import RESULTS, ROOT, Row, Target, read

FOLDER = Path(__file__).resolve().parent
NOT_MEASURED = "not yet measured on a GPU"
CORRECTNESS = ("agreement_gpu", "tests")
_BLOCK = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end of \2 -->)", re.S)


@dataclass(frozen=True)
class Loaded:
    """A record and the file that it is from."""

    path: Path
    machine: dict[str, Any]
    rows: list[Row]

    @property
    def failures(self) -> list[str]:
        """What of the correctness of this tree failed on this machine: its speeds are not reported."""
        return [row.name for row in self.rows if row.status == "FAIL" and row.bench in CORRECTNESS]


class Records:
    """All records, the newest first."""

    def __init__(self, folder: Path = RESULTS) -> None:
        loaded = [Loaded(path, *read(path)) for path in sorted(folder.glob("*.json"))]
        self.all = sorted(loaded, key=lambda one: (one.machine["time"], one.path.name), reverse=True)

    def of(self, kind: str) -> list[Loaded]:
        """Those measured on a "cpu" or a "gpu"."""
        return [one for one in self.all if one.machine["kind"] == kind]

    def newest(self, kind: str) -> dict[tuple[str, str], tuple[Row, Loaded]]:
        """(bench, name) -> the row in the newest record that has it; rows of benches that are gone are left out."""
        found: dict[tuple[str, str], tuple[Row, Loaded]] = {}
        for one in self.of(kind):
            for row in one.rows:
                if row.bench not in ("tests", "gpu_steps") and not (FOLDER / f"{row.bench}.py").exists():
                    continue
                found.setdefault(row.key, (row, one))
        return found

    def rows(self, kind: str, bench: str = "", group: str = "") -> list[Row]:
        """The newest rows of a bench, or of a group, with figures."""
        return [
            row
            for row, one in self.newest(kind).values()
            if row.status == "measured" and not one.failures and bench in ("", row.bench) and group in ("", row.group)
        ]


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns of figures need no alignment to be read."""
    rule = "|".join("---" for _ in head)
    rows = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in (head, *lines)]
    return "\n".join([f"| {rows[0]} |", f"|{rule}|", *(f"| {row} |" for row in rows[1:])])


def title_of(row: Row) -> str:
    """What tables call a row."""
    return str(row.extra_info.get("title") or f"{row.group}: {row.name}")


def with_unit(value: float, unit: str) -> str:
    """A figure with three digits and its unit."""
    return f"{number(value)} {unit}".strip()


def targets_cpu(records: Records) -> str:
    """Every target of the CPU, and whether it is met."""
    lines = []
    for row, _ in records.newest("cpu").values():
        for target, value in row.targets():
            lines.append([title_of(row), f"`{target}`", number(value), _share(row), verdict(row, target, value)])
    if not lines:
        return "No row of a CPU record has a target."
    met = sum(line[-1] == "met" for line in lines)
    return f"{met} of {len(lines)} targets met.\n\n" + markdown(
        ["what", "target", "measured", "share of copy bandwidth", "verdict"], lines
    )


def targets_gpu_lines(records: Records) -> Iterator[tuple[str, GpuCase, list[str]]]:
    """A line a target of a GPU bench, with the module and the case it is of."""
    newest = records.newest("gpu")
    for module, case in gpu_cases():
        row, one = newest.get((module, case.name), (None, None))
        for text in case.targets:
            target = Target.parse(text)
            value = dict((str(b), v) for b, v in row.targets()).get(str(target)) if row is not None else None
            shown = number(value) if value is not None else NOT_MEASURED
            said = verdict(row, target, value) if row is not None else ""
            if one is not None and one.failures:
                shown, said = "not reported", f"{len(one.failures)} correctness checks fail"
            yield module, case, [case.title or case.name, f"`{target}`", shown, said]


def targets_gpu(records: Records) -> str:
    """Every target of the GPU benches: measured, or not yet."""
    lines = [line for _, _, line in targets_gpu_lines(records)]
    if not lines:
        return "No GPU bench has a target."
    return markdown(["what", "target", "measured", "verdict"], lines)


def gpu_cases() -> list[tuple[str, GpuCase]]:
    """Every case that `python3 dev.py gpu` would time."""
    return [(module, case) for module in modules() for case in cases_of(module)]


def rows_of(kind: str) -> Callable[[Records], str]:
    """The table of all rows, group by group."""

    def table(records: Records) -> str:
        groups: dict[str, list[Row]] = {}
        for row in records.rows(kind):
            groups.setdefault(row.group, []).append(row)
        red = [one for one in records.of(kind) if one.failures]
        parts = [f"{one.path.name}: not reported, {len(one.failures)} correctness checks fail." for one in red]
        parts += [f"**{group}**\n\n{_rows(rows)}" for group, rows in sorted(groups.items())]
        return "\n\n".join(parts) or (
            f"{NOT_MEASURED[0].upper()}{NOT_MEASURED[1:]}." if kind == "gpu" else "No record."
        )

    return table


def _rows(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        info = row.extra_info
        peer = ""
        if "peer_p50" in info:
            peer = f"{info.get('peer', 'peer')} {with_unit(info['peer_p50'], row.unit)}"
        ratio = f"{number(info['ratio'])}x" if "ratio" in info else ""
        spread = f"{number(row.p20)} to {number(row.p80)}"
        name = str(info.get("title") or row.name)
        lines.append([name, with_unit(row.p50, row.unit) + row.few, spread, peer, ratio, _share(row, "")])
    return markdown(["", "p50", "p20 to p80", "peer", "ratio", "share of copy bandwidth"], lines)


def _share(row: Row, missing: str = "-") -> str:
    share = row.extra_info.get("share_of_copy")
    return missing if share is None else f"{100 * share:.0f} %"


def records_used(records: Records) -> str:
    """Which files the tables are from, and the machines."""
    used = {one.path: one for kind in ("cpu", "gpu") for _, one in records.newest(kind).values()}
    lines = []
    for path in sorted(used):
        machine = used[path].machine
        packages = machine["packages"]
        versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "triton") if name in packages)
        device = machine["name"] if machine["kind"] == "gpu" else f"{machine['cpu']}, {machine['cores']} cores"
        changed = " (changed)" if machine["dirty"] else ""
        link = f"[{path.name}](../bench/results/{path.name})"
        lines.append([link, device, versions, f"{machine['commit']}{changed}", machine["time"][:10]])
    return markdown(["record", "measured on", "with", "commit", "on"], lines) if lines else "No record."


TABLES: dict[str, Callable[[Records], str]] = {
    "targets-cpu": targets_cpu,
    "targets-gpu": targets_gpu,
    "rows-cpu": rows_of("cpu"),
    "rows-gpu": rows_of("gpu"),
    "records": records_used,
}


def providers() -> list[Any]:
    """The modules bench/report_*.py."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    return [importlib.import_module(path.stem) for path in sorted(FOLDER.glob("report_*.py"))]


def all_tables(records: Records) -> dict[str, str]:
    """Every table there is."""
    found = {name: table(records) for name, table in TABLES.items()}
    for module in providers():
        for name, text in module.tables(records).items() if hasattr(module, "tables") else ():
            if name in found:
                raise ValueError(f"{module.__name__} makes the table {name!r}, which is there already.")
            found[name] = text
    return found


def filled(text: str, tables: dict[str, str], where: str) -> str:
    """The document with its tables replaced."""

    def replace(match: re.Match[str]) -> str:
        if match[2] not in tables:
            raise ValueError(f"{where} wants a table {match[2]!r}; there are {', '.join(sorted(tables))}.")
        return f"{match[1]}\n{tables[match[2]].strip()}\n\n{match[3]}"

    begun, whole = len(re.findall(r"<!-- table [\w-]+ -->", text)), len(_BLOCK.findall(text))
    if begun != whole:
        raise ValueError(f'{where}: {begun} tables begin and {whole} have their line "<!-- end of NAME -->".')
    return _BLOCK.sub(replace, text)


def documents(root: Path) -> list[Path]:
    """Where tables may be."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def update(root: Path, records: Records, check: bool) -> list[Path]:
    """Write the documents, or with `check` only compare; returns those that were out of step."""
    tables = all_tables(records)
    stale = []
    for path in documents(root):
        before = path.read_text()
        after = filled(before, tables, path.name)
        if after != before:
            stale.append(path)
            if not check:
                path.write_text(after)
    return stale


def write_pages(records: Records, folder: Path) -> None:
    """The pages and pictures of the modules that make them, each from the newest record with rows of its benches."""
    for module in providers():
        if not hasattr(module, "main"):
            continue
        for one in records.of("cpu"):
            if any(row.bench in module.BENCHES for row in one.rows) and module.main([str(one.path), str(folder)]) == 0:
                break


def update_pages(root: Path, records: Records, check: bool) -> list[Path]:
    """Write the pages into docs/, or with `check` only compare; returns those that were out of step."""
    stale = []
    with tempfile.TemporaryDirectory() as made:
        write_pages(records, Path(made))
        for path in sorted(Path(made).rglob("*")):
            target = root / "docs" / path.relative_to(made)
            if path.is_dir() or (target.exists() and (path.suffix == ".png" and check)):
                continue
            if target.exists() and target.read_bytes() == path.read_bytes():
                continue
            stale.append(target)
            if not check:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    return stale


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 if --check finds something out of step."""
    parser = argparse.ArgumentParser(prog="dev.py report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a document is out of step")
    options = parser.parse_args(arguments)
    records = Records()
    stale = [*update_pages(ROOT, records, options.check), *update(ROOT, records, options.check)]
    names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
    if options.check and stale:
        print(f"out of step with bench/results/: {names}. Run: python3 dev.py report", file=sys.stderr)
        return 1
    print(f"written: {names}" if names else "everything is in step with bench/results/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
