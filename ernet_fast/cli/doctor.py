"""``ernet-fast doctor``: what is installed, what is compiled in, and which implementation each operator uses here."""

from __future__ import annotations

import argparse
from typing import Any

from ernet_fast.cli.json_output import print_json
from ernet_fast.console.tables import format_table
from ernet_fast.diagnosis import diagnose


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
    else:
        _print(found)
    return 0


def _print(found: dict[str, Any]) -> None:
    machine, extension = found["machine"], found["extension"]
    print(f"ernet_fast {found['version']}, Python {machine['python']}, {machine['system']}")
    print(f"{machine['processor']}, {machine['cores']} cores, torch uses {machine['threads']} threads\n")
    rows = [[p["name"], p["version"] or "missing", p["extra"], p["note"]] for p in found["packages"]]
    print(format_table(["package", "version", "extra", "note"], rows, right_from=9))
    print()
    if extension["available"]:
        build = extension["build"]
        print(f"compiled operators: yes, compiler {build['compiler']}, headers of torch {build['torch_headers']}")
        print(f"  CPU instruction sets: {', '.join(build['isa_variants'])}; in use: {build['isa']}")
        print(f"  CUDA architectures: {', '.join(build['cuda_archs']) or 'none (built without nvcc)'}")
    else:
        print(f"compiled operators: no. {extension['reason']}")
    if found["cuda"]["devices"]:
        for device in found["cuda"]["devices"]:
            print(
                f"CUDA device {device['index']}: {device['name']}, compute capability {device['capability']}, "
                f"{device['memory_gib']} GiB"
            )
    else:
        print(f"CUDA devices: none ({found['cuda']['reason']})")
    print()
    rows = [[o["operator"], o["device"], o["backend"], o["why"]] for o in found["operators"]]
    print(format_table(["operator", "on", "uses", "why"], rows, right_from=9))
    print()
    rows = [[s["stage"], s["device"], s["path"], s["why"]] for s in found["stages"]]
    print(format_table(["ER stage", "on", "computed by", "why"], rows, right_from=9))
