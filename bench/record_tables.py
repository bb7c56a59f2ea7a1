"""Tables of all rows, and of the records that they are from."""

from __future__ import annotations

from collections.abc import Callable

from measured import key_of
from record import LEAST_REPEATS, Row
from records import Records, newest_of
from tables import NONE, NOT_MEASURED, SHARE, SPREAD, Column, cpu_name, markdown, number, table
from target_tables import NOTHING_ON_GPU
from this_tree import processor


def with_unit(value: float, unit: str) -> str:
    return f"{number(value)} {unit}".strip()


def peer(row: Row) -> str:
    """Whom the row is compared with."""
    info = row.extra_info
    return f"{info.get('peer', 'peer')} {with_unit(info['peer_p50'], row.unit)}" if "peer_p50" in info else ""


def spread(row: Row) -> str:
    """Of a row over images the 99th percentile and the worst image, and how many there are."""
    info = row.extra_info
    if "p99" not in info:
        return NONE
    return f"{number(info['p99'])}, {number(info['max'])} of {info['images']}"


def ratio(row: Row) -> str:
    """The ratio to the peer, of a row over images with the worst."""
    worst = row.extra_info.get(f"worst_ratio_{key_of(row.extra_info.get('peer', ''))}")
    return number(row.extra_info.get("ratio")) + (f", worst {number(worst)}" if worst is not None else "")


ROWS = (
    Column("", lambda row: str(row.extra_info.get("title") or row.name)),
    Column("p50", lambda row: with_unit(row.p50, row.unit) + row.few),
    SPREAD._replace(head="p20 to p80"), Column("p99, worst image", spread), Column("peer", peer),
    Column("ratio", ratio), SHARE,
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
    groups = (*records.cpus(), records.of("gpu"))
    for path, machine in sorted(
        {one.path: one.machine for group in groups for _, one in newest_of(group).values()}.items()
    ):
        packages = machine["packages"]
        versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "triton") if name in packages)
        device = machine["name"] if machine["kind"] == "gpu" else f"{cpu_name(machine)}, {machine['cores']} cores"
        changed = " (changed)" if machine["dirty"] else ""
        lines.append([link(path.name), device, versions, f"{machine['commit']}{changed}", machine["time"][:10]])
    return markdown(["record", "measured on", "with", "commit", "on"], lines) if lines else NOT_MEASURED


def source(records: Records) -> str:
    """Where the CPU's figures are from."""
    found = records.of("cpu")
    if not found:
        return NOT_MEASURED
    machine = found[0].machine
    caches = processor.caches_text(machine.get("processor") or {})
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return (
        f"Medians of {LEAST_REPEATS} repeats or more, where a row does not say otherwise, within one run on "
        f"{machine['cores']} cores ({cpu_name(machine)}{caches and f'; {caches}'}; {packages}; float32), "
        f"{machine['time'][:10]}: "
        f"{', '.join(link(one.path.name) for one in found[:3])}."
    )


TABLES: dict[str, Callable[[Records], str]] = {
    "rows-cpu": rows_of("cpu"),
    "rows-gpu": rows_of("gpu"),
    "records": used,
    "source": source,
}
