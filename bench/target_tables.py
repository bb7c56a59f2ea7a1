"""Tables of targets: of every bench, what it is to reach and what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gpu_case import GpuCase, cases_of, modules
from record import Row, Target
from records import Records
from tables import NOT_MEASURED, SHARE, markdown, number, title_of, verdict

NOT_ON_GPU = "not yet measured on a GPU"
NOTHING_ON_GPU = "Not yet measured on a GPU."


def targets_cpu(records: Records) -> str:
    lines = [
        [title_of(row), f"`{target}`", number(value), SHARE.cell(row), verdict(row, target, value)]
        for row, _ in records.newest("cpu").values()
        for target, value in row.targets()
    ]
    met = sum(line[-1] == "met" for line in lines)
    head = ["what", "target", "measured", "share of copy bandwidth", "verdict"]
    return f"{met} of {len(lines)} targets met.\n\n{markdown(head, lines)}"


def by_group(missed: bool, bench: str = "") -> Callable[[Records], str]:
    """Targets by what they are asked of, or those `missed` by some row: how many rows reach each, and the worst."""

    def made(records: Records) -> str:
        found: dict[tuple[str, str], list[tuple[float, Target, Row]]] = {}
        for row, _ in records.newest("cpu").values():
            for target, value in row.targets():
                if value is not None and row.bench.startswith(bench):
                    found.setdefault((row.group, str(target)), []).append((value, target, row))
        lines = []
        for (group, text), rows in sorted(found.items()):
            reached = sum(target.met(value) for value, target, _ in rows)
            value, _, row = (max if "<=" in text else min)(rows, key=lambda entry: entry[0])
            if reached < len(rows) or not missed:
                lines.append([group, f"`{text}`", f"{reached} of {len(rows)}", f"{number(value)}: {row.name}"])
        if not lines:
            return "Every target is met." if missed else NOT_MEASURED
        return markdown(["what", "target", "rows that reach it", "the worst"], lines)

    return made


def gpu_cases() -> list[tuple[str, GpuCase]]:
    """Every case that `python3 dev.py gpu` would time."""
    return [(module, case) for module in modules() for case in cases_of(module)]


def gpu_lines(records: Records) -> Iterator[tuple[str, list[str]]]:
    """Every target of a GPU bench, measured or not yet, and the group that it is of."""
    newest = records.newest("gpu")
    for module, case in gpu_cases():
        row, one = newest.get((module, case.name), (None, None))
        values = {str(target): value for target, value in row.targets()} if row else {}
        for target in map(Target.parse, case.targets):
            value = values.get(str(target))
            shown, said = (NOT_ON_GPU if value is None else number(value), row and verdict(row, target, value))
            if one and one.failures:
                shown, said = "not reported", f"{len(one.failures)} correctness checks fail"
            yield case.group or module, [case.title or case.name, f"`{target}`", shown, said or ""]


def targets_gpu(records: Records) -> str:
    return markdown(["what", "target", "measured", "verdict"], [line for _, line in gpu_lines(records)])


def readme_gpu(records: Records) -> str:
    """One target of each group of GPU benches."""
    first: dict[str, list[str]] = {}
    for group, line in gpu_lines(records):
        first.setdefault(group, line)
    device = next((one.machine["name"] for one in records.of("gpu")), None)
    said = f"Measured on {device}." if device else NOTHING_ON_GPU
    return f"{said}\n\n{markdown(['what', 'target', 'measured', 'verdict'], list(first.values()))}"


TABLES: dict[str, Callable[[Records], str]] = {
    "targets-cpu": targets_cpu,
    "targets-gpu": targets_gpu,
    "er-targets": by_group(missed=False, bench="bench_er_"),
    "macenko-targets": by_group(missed=False, bench="bench_macenko"),
    "readme-missed": by_group(missed=True),
    "readme-gpu": readme_gpu,
}
