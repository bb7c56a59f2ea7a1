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
    assert "| **Some CPU, family not recorded**, 2026-11-23 |  |  |  |  |  |" in found["macenko-fit"]
    assert "| images | one | not recorded | one | not recorded | not recorded |" in found["macenko-fit"]
    peer = ["0.205 ms: 25x; not recorded", "not recorded", "2.51 ms: 25x; not recorded", "not recorded", "not recorded"]
    assert f"| torchstain torch | {' | '.join(peer)} |" in found["macenko-fit"]
    assert "tiatoolbox" not in found["macenko-fit"]
    assert "| tiny | 21 | linear | torchstain numpy | 99.987 % | 100.000 % | 1 |" in found["macenko-parity"]
    assert found["macenko-others"].endswith("| tiatoolbox | 2.000 % | 205 |")
    assert found["macenko-slides"] == found["macenko-threads"] == "Not measured."
    assert "| normalize 224x224 | `ratio_torchstain_torch >= 30` | 0 of 1 |" in by_group(missed=True)(records)
    pictures.macenko(records).savefig(tmp_path / "macenko_speed.png")
    assert (tmp_path / "macenko_speed.png").stat().st_size > 10_000


def test_pixels_and_bytes_stand_below(record):
    record.add(one_image("fit", "1024x1024", 1048576, "ernet_fast", 1048576 / 5e5))
    lines = TABLES["macenko-fit"](Records(record.path.parent)).splitlines()
    assert lines[-2:] == [
        "| bytes / copy bandwidth | 0.01 ms | not recorded | 0.01 ms | not recorded | 0.01 ms |",
        "| ernet_fast, ns a pixel | 2 | not recorded | 2 | not recorded | 2 |"
    ]  # fmt: skip


ZEN_4 = {
    "name": "Some CPU", "vendor": "AuthenticAMD", "family": 25, "model": 17, "stepping": 1, "caches": {"L2": 1 << 20},
    "instruction_sets": ["portable", "avx2", "avx512", "avx512vbmi"],
}  # fmt: skip


@pytest.fixture
def two_cpus(record, tmp_path):
    """A later record of many images on another CPU of the same name."""
    later = {**MACHINE, "processor": ZEN_4, "commit": "999999999", "time": "2026-11-25T12:00:00+00:00"}
    found = Record.of(later, tmp_path)
    own = {"images": 128, "max": 0.25, "p90": 0.2, "p99": 0.22, "isa": "avx512", "ratio_torchstain_torch": 31.0,
           "worst_ratio_torchstain_torch": 19.0, "images_from": "real: 128 of a set"}  # fmt: skip
    found.add(
        one_image("normalize", "224x224", 50176, "ernet_fast", 0.17, **own),
        one_image("normalize", "224x224", 50176, "torchstain torch", 5.0, images=16),
        Row("bench_macenko", "normalize 224x224 ISA avx2", "g", {"isa": "avx2"}, 1, 1, 1, "ms", 5,
            {**own, "target": "ratio_torchstain_torch >= 20"}),
        Row("bench_macenko", "normalize 224x224 adversarial noise", "g", {"adversarial": "noise"}, 1, 1, 1, "ms", 5,
            {"max": 1.5, "max_of_common": 3.5, "peer_p50": 0.4, "target": "max_of_common <= 3"}),
        Row("bench_macenko", "normalize 224x224 float64", "g", {"dtype": "float64"}, 1, 1, 1, "ms", 5,
            {"max": 1.5, "times_uint8": 4.5, "worst_times_uint8": 6.0, "target": "times_uint8 <= 5"}),
    )  # fmt: skip
    return Records(tmp_path)


def test_records_of_two_cpus_stand_below_each_other_with_the_worst(two_cpus):
    for table in ("readme-macenko", "macenko-normalize"):
        lines = TABLES[table](two_cpus).splitlines()
        first = lines.index("| **Some CPU, family 25 model 17 (Zen 4), AVX-512**, 2026-11-25 |  |  |  |  |  |")
        second = lines.index("| **Some CPU, family not recorded**, 2026-11-23 |  |  |  |  |  |")
        assert first < second
        new, old = lines[first:second], lines[second:]
        assert "| images | not recorded | not recorded | 128 real | not recorded | not recorded |" in new
        assert any("| **0.17 ms**; 0.25 ms |" in line for line in new), "the median and the worst image"
        assert any("31x; 19x" in line for line in new), "the ratios of the images, not 5 / 0.17"
        assert any("| **0.1 ms**; not recorded |" in line for line in old) and any(
            "25x; not recorded" in line for line in old
        )
    assert "| 5 ms: 31x; 19x (16 images) |" in TABLES["macenko-normalize"](two_cpus)


def test_tables_over_images(two_cpus):
    (line,) = TABLES["macenko-isa"](two_cpus).splitlines()[2:]
    assert line == (
        "| Some CPU, family 25 model 17 (Zen 4), AVX2, 128 images | 1 ms | 0.2 ms | 0.22 ms | 0.25 ms | 31; 19 | "
        "ratio_torchstain_torch >= 20 met |"
    )
    (line,) = TABLES["macenko-adversarial"](two_cpus).splitlines()[2:]
    assert line == "| noise | 1 | 1.5 | 0.4 | 3.5 | max_of_common <= 3 MISSED |"
    (line,) = TABLES["macenko-dtypes"](two_cpus).splitlines()[2:]
    assert line == "| float64 | 1 | 1.5 | 4.5 | 6 | times_uint8 <= 5 met |"
