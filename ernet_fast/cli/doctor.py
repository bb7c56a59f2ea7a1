"""``ernet-fast doctor``: what is installed, what is compiled in, and which implementation each operator uses here."""

from __future__ import annotations

import argparse
from typing import Any

from ernet_fast.cli.streams import print_json
from ernet_fast.console.tables import format_table
from ernet_fast.diagnosis import diagnose
from ernet_fast.processor import caches_text, processor_text


def add_parser(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "doctor",
        parents=parents,
        help="show what is installed and which implementation each operator uses",
        description="Show what is installed, what is compiled in, which implementation each operator uses here, and "
        "why not another.",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Diagnose; returns 0 whatever is found."""
    found = diagnose()
    if arguments.json:
        print_json(found)
        return 0
    machine, extension = found["machine"], found["extension"]
    print(f"ernet_fast {found['version']}, Python {machine['python']}, {machine['system']}")
    cpu = ", ".join(filter(None, (processor_text(machine["cpu"]), caches_text(machine["cpu"]))))
    print(f"{cpu}, {machine['cores']} cores, torch uses {machine['threads']} threads\n")
    packages = [{**package, "version": package["version"] or "missing"} for package in found["packages"]]
    _print_table(packages, name="package", version="version", extra="extra", note="note")
    if extension["available"]:
        build = extension["build"]
        print(f"compiled operators: yes, compiler {build['compiler']}, headers of torch {build['torch_headers']}")
        print(f"  CPU instruction sets: {', '.join(build['isa_variants'])}; in use: {build['isa']}")
        print(f"  {_caches(extension['caches'])}")
        print(f"  {_streaming(extension['streaming'])}")
        print(f"  memory of freed results: at most {extension['kept_memory_limit'] >> 20} MiB kept for later ones")
        print(f"  CUDA architectures: {', '.join(build['cuda_archs']) or 'none (built without nvcc)'}")
    else:
        print(f"compiled operators: no. {extension['reason']}")
    for device in found["cuda"]["devices"]:
        name = f"CUDA device {device['index']}: {device['name']}"
        print(f"{name}, compute capability {device['capability']}, {device['memory_gib']} GiB")
    if not found["cuda"]["devices"]:
        print(f"CUDA devices: none ({found['cuda']['reason']})")
    print()
    _print_table(found["operators"], operator="operator", device="on", backend="uses", why="why")
    _print_table(found["stages"], stage="ER stage", device="on", path="computed by", why="why")
    return 0


def _caches(found: dict[str, Any]) -> str:
    """The data caches, and what the ER operators make of them."""
    kib = {name: f"{size >> 10} KiB" for name, size in found.items() if isinstance(size, int)}
    return (
        f"CPU caches: {kib['first']}, {kib['second']}, {kib['last']} of the last for each CPU ({found['source']}); "
        f"channel tiles of {kib['channel_tile']}"
    )


def _streaming(found: dict[str, Any]) -> str:
    """How maps that no cache holds are read and written."""
    kib = found["stores"] >> 10
    past = "results never bypass the caches" if kib == (2**63 - 1) >> 10 else f"results from {kib} KiB on bypass them"
    return f"CPU maps: read {found['fetch_ahead']} bytes ahead, {past} ({found['source']})"


def _print_table(rows: list[dict[str, str]], **columns: str) -> None:
    """Rows as a table and an empty line; `columns`: key and title of each."""
    cells = [[row[key] for key in columns] for row in rows]
    print(format_table(list(columns.values()), cells, right_from=len(columns)), end="\n\n")
