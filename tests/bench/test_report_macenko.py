"""The page and the picture say what the record says."""

from __future__ import annotations

import pytest
import report_macenko
from record import Record, Row

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


def test_page_and_picture(record, tmp_path):
    pytest.importorskip("matplotlib")
    docs = tmp_path / "docs"
    docs.mkdir()
    assert report_macenko.main([str(record.path), str(docs)]) == 0
    page = (docs / "macenko-benchmarks.md").read_text()
    assert "commit `012345678`: Some CPU, 2 cores" in page and "![Images per second" in page
    assert "| ms (median; times slower) | 64x64 | 224x224 |" in page
    assert "| torchstain torch | 0.205 (25 ×) | 2.51 (25 ×) |" in page
    assert "| tiatoolbox | not installed | not installed |" in page
    assert "| normalize 224x224 ernet_fast | ratio_torchstain_torch >= 30 | 25 | **no** |" in page
    assert "| tiny, 21 images | linear: torchstain numpy | 99.987 % | 100.000 % | 1 |" in page
    assert "The same 21 images of tiny by other packages" in page and "| tiatoolbox | 2.000 % | 205 |" in page
    assert "| ernet_fast, ns a pixel | 2 | 2 |" in page
    assert "unrelated" not in page and "Whole slides" not in page
    assert (docs / "macenko_speed.png").stat().st_size > 10_000


def test_records_of_something_else_are_refused(tmp_path, capsys):
    other = Record.of(MACHINE, tmp_path)
    other.add(Row("another_bench", "row", "x", {}, 1, 1, 1, "ms"))
    assert report_macenko.main([str(other.path), str(tmp_path)]) == 1
    assert "no rows of bench_macenko" in capsys.readouterr().err
    assert report_macenko.main([]) == 2
