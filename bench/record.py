"""Boil the JSON of pytest-benchmark down to a record for bench/results/: machine, versions, commit, one row a bench.

python3 dev.py bench --benchmark-json=/tmp/all.json
python bench/record.py /tmp/all.json [FOLDER]
"""

from __future__ import annotations

import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "torchstain", "triton")


def version(package: str) -> str | None:
    """Installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def boil_down(full: dict[str, Any]) -> dict[str, Any]:
    """Medians and what each bench says besides; no raw timings, no name of the machine."""
    cpu = full["machine_info"].get("cpu", {})
    commit = full["commit_info"]
    return {
        "machine": {
            "cpu": cpu.get("brand_raw"),
            "cores": cpu.get("count"),
            "python": platform.python_version(),
            "packages": {package: version(package) for package in PACKAGES},
            "commit": (commit.get("id") or "unknown")[:9],
            "dirty": commit.get("dirty"),
            "time": full["datetime"][:19],
        },
        "rows": [
            {
                "name": bench["name"],
                "milliseconds": {
                    "median": round(bench["stats"]["median"] * 1e3, 4),
                    "q1": round(bench["stats"]["q1"] * 1e3, 4),
                    "q3": round(bench["stats"]["q3"] * 1e3, 4),
                },
                **{k: round(v, 4) if isinstance(v, float) else v for k, v in bench["extra_info"].items()},
            }
            for bench in full["benchmarks"]
        ],
    }


def main() -> int:
    """Write one record."""
    if len(sys.argv) not in (2, 3):
        print(__doc__.strip(), file=sys.stderr)
        return 2
    record = boil_down(json.loads(Path(sys.argv[1]).read_text()))
    folder = Path(sys.argv[2]) if len(sys.argv) == 3 else ROOT / "bench" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    machine = record["machine"]
    path = folder / f"cpu-{machine['time'][:10].replace('-', '')}-{machine['commit']}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
