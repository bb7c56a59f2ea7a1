"""The tables and the picture say what the record says."""

from __future__ import annotations

import pictures
import pytest
from macenko_tables import TABLES
from record import Record, Row
from records import Records
from target_tables import by_group

MACHINE = {
    "kind": "cpu", "name": "cpu-2-cores", "cpu": "Some CPU", "cores": 2, "system": "Linux", "python": "3.11.7",
    "packages": {"torch": "2.13.0"}, "commit": "012345678", "dirty": False, "sources": "feedbeef",
    "time": "2026-11-23T12:00:00+00:00", "clocks": [],
}  # fmt: skip


def one_image(operation, size, pixels, who, milliseconds, **info):
    params = {"operation": operation, "size": size, "pixels": pixels, "who": who, "threads": 1}
    name = f"{operation} {size} {who}"
    info = {"copy_time": 0.01, "copy_why": "bytes", **info}
    figures = milliseconds, milliseconds, milliseconds
    return Row("bench_macenko", name, f"{operation} {size}", params, *figures, "ms", 15, info)


@pytest.fixture
def record(tmp_path):
    found = Record.of(MACHINE, tmp_path)
    for operation in ("normalize", "fit"):
        for size, pixels in (("224x224", 50176), ("64x64", 4096)):
            own = pixels / 5e5
            info = {"ratio_torchstain_torch": 25.0, "target": "ratio_torchstain_torch >= 30"} if pixels > 5000 else {}
            found.add(one_image(operation, size, pixels, "ernet_fast", own, **info))
            found.add(one_image(operation, size, pixels, "torchstain torch", 25 * own))
    found.add(
        Row(
            "bench_macenko_parity", "tiny linear", "identical values", {"images": "tiny", "percentile": "linear"},
            99.99, 100, 100, "%", 21, {"peer": "torchstain numpy", "worst": 99.987, "largest_difference": 1},
        ),
        Row(
            "bench_macenko_parity", "tiny tiatoolbox", "other packages", {"images": "tiny", "other": "tiatoolbox"},
            1, 2, 3, "%", 21, {"peer": "tiatoolbox", "worst": 0.04, "largest_difference": 205},
        ),
        Row("another_bench", "unrelated row", "x", {}, 1, 1, 1, "ms"),
    )  # fmt: skip
    return found


def test_tables_and_picture(record, tmp_path):
    pytest.importorskip("matplotlib")
    records = Records(record.path.parent)
    found = {name: made(records) for name, made in TABLES.items()}
    assert "| torchstain torch | 0.205 ms (25x) | 2.51 ms (25x) | not recorded | not recorded |" in found["macenko-fit"]
    assert "tiatoolbox" not in found["macenko-fit"]
    assert "| tiny | 21 | linear | torchstain numpy | 99.987 % | 100.000 % | 1 |" in found["macenko-parity"]
    assert found["macenko-others"].endswith("| tiatoolbox | 2.000 % | 205 |")
    assert found["macenko-slides"] == found["macenko-threads"] == "Not measured."
    assert "| normalize 224x224 | `ratio_torchstain_torch >= 30` | 0 of 1 |" in by_group(missed=True)(records)
    pictures.macenko(records).savefig(tmp_path / "macenko_speed.png")
    assert (tmp_path / "macenko_speed.png").stat().st_size > 10_000


def test_pixels_and_bytes_stand_below_where_every_size_is_there(record):
    for size, pixels in (("700x460", 322000), ("1024x1024", 1048576)):
        record.add(one_image("fit", size, pixels, "ernet_fast", pixels / 5e5))
    lines = TABLES["macenko-fit"](Records(record.path.parent)).splitlines()
    assert lines[-2:] == [
        "| bytes / copy bandwidth | 0.01 ms | 0.01 ms | 0.01 ms | 0.01 ms |",
        "| ernet_fast, ns a pixel | 2 | 2 | 2 | 2 |"
    ]  # fmt: skip
