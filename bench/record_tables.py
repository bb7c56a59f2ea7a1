"""Tables of all rows, and of the records that they are from."""

from __future__ import annotations

from collections.abc import Callable

from record import LEAST_REPEATS, Row
from records import Records
from tables import NOT_MEASURED, SHARE, SPREAD, Column, figure, markdown, number, table
from target_tables import NOTHING_ON_GPU


def with_unit(value: float, unit: str) -> str:
    return f"{number(value)} {unit}".strip()


def peer(row: Row) -> str:
    """Whom the row is compared with."""
    info = row.extra_info
    return f"{info.get('peer', 'peer')} {with_unit(info['peer_p50'], row.unit)}" if "peer_p50" in info else ""


ROWS = (
    Column("", lambda row: str(row.extra_info.get("title") or row.name)),
    Column("p50", lambda row: with_unit(row.p50, row.unit) + row.few),
    SPREAD._replace(head="p20 to p80"), Column("peer", peer), figure("ratio", "ratio"), SHARE,
)  # fmt: skip


def rows_of(kind: str) -> Callable[[Records], str]:
    def made(records: Records) -> str:
        groups: dict[str, list[Row]] = {}
        for row in records.rows(kind):
            groups.setdefault(row.group, []).append(row)
        red = [one for one in records.of(kind) if one.failures]
        parts = [f"{one.path.name}: not reported, {len(one.failures)} correctness checks fail." for one in red]
        parts += [f"**{group}**\n\n{table(rows, ROWS)}" for group, rows in sorted(groups.items())]
        return "\n\n".join(parts) or (NOTHING_ON_GPU if kind == "gpu" else NOT_MEASURED)

    return made


def link(name: str) -> str:
    return f"[{name}](bench/results/{name})"


def used(records: Records) -> str:
    """Which files the tables are from, and the machines."""
    lines = []
    for path, machine in sorted(
        {one.path: one.machine for kind in ("cpu", "gpu") for _, one in records.newest(kind).values()}.items()
    ):
        packages = machine["packages"]
        versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "triton") if name in packages)
        device = machine["name"] if machine["kind"] == "gpu" else f"{machine['cpu']}, {machine['cores']} cores"
        changed = " (changed)" if machine["dirty"] else ""
        lines.append([link(path.name), device, versions, f"{machine['commit']}{changed}", machine["time"][:10]])
    return markdown(["record", "measured on", "with", "commit", "on"], lines) if lines else NOT_MEASURED


def source(records: Records) -> str:
    """Where the CPU's figures are from."""
    found = records.of("cpu")
    if not found:
        return NOT_MEASURED
    machine = found[0].machine
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return (
        f"Medians of {LEAST_REPEATS} repeats or more, where a row does not say otherwise, within one run on "
        f"{machine['cores']} cores ({machine['cpu']}; {packages}; float32), {machine['time'][:10]}: "
        f"{', '.join(link(one.path.name) for one in found[:3])}."
    )


TABLES: dict[str, Callable[[Records], str]] = {
    "rows-cpu": rows_of("cpu"),
    "rows-gpu": rows_of("gpu"),
    "records": used,
    "source": source,
}
