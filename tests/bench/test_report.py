"""Tables of the documents: taken from records, never from memory, and a document out of step is found."""

from __future__ import annotations

import er_tables
import macenko_tables
import pictures
import pytest
import record_tables
import target_tables
from gpu_case import GpuCase
from record import Record, Row, without_figures
from record_tables import rows_of
from records import Records
from report import filled, update, update_pictures
from target_tables import by_group, targets_cpu, targets_gpu

MACHINE = {
    "kind": "cpu", "name": "cpu-2-cores", "cpu": "Some CPU", "cores": 2, "packages": {"torch": "2.13.0"},
    "python": "3.11.7", "commit": "012345678", "dirty": False, "sources": "feed", "time": "2026-11-23T12:00:00+00:00",
    "clocks": [],
}  # fmt: skip
LATER = {**MACHINE, "commit": "999999999", "time": "2026-11-24T12:00:00+00:00"}
GPU = {**LATER, "kind": "gpu", "name": "Some GPU"}


def row(name, p50, bench="bench_macenko", **info):
    return Row(bench, name, "normalise", {}, p50, p50, p50, "ms", 5, info)


@pytest.fixture
def folder(tmp_path):
    results = tmp_path / "results"
    slow, fast = (
        row("a", 4.0, peer="naive", peer_p50=8.0, target="ratio >= 3"),
        row("a", 2.0, peer_p50=8.0, target="ratio >= 3"),
    )
    Record.of(MACHINE, results).add(slow, row("only before", 1.0), row("gone", 1.0, bench="bench_that_was_removed"))
    Record.of(LATER, results).add(fast, row("b", 7.0, target="ratio >= 3"))
    return results


def test_each_row_is_of_the_newest_record_that_has_it(folder):
    rows = {one.name: one.p50 for one in Records(folder).rows("cpu")}
    assert rows == {"a": 2.0, "b": 7.0, "only before": 1.0}


def test_bars_of_the_cpu(folder):
    lines = targets_cpu(Records(folder)).splitlines()
    assert lines[0] == "1 of 2 targets met."
    assert lines[-2:] == [
        "| normalise: a | `ratio >= 3` | 4 | – | met |", "| normalise: b | `ratio >= 3` | – | – | not measured |",
    ]  # fmt: skip


def test_what_no_gpu_has_measured_is_called_so(folder, monkeypatch):
    case = GpuCase("k", lambda _: row("k", 1), targets=["share_of_copy >= 0.9"])
    monkeypatch.setattr(target_tables, "gpu_cases", lambda: [("bench_er_gpu", case)])
    assert targets_gpu(Records(folder)).splitlines()[-1] == (
        "| k | `share_of_copy >= 0.9` | not yet measured on a GPU |  |"
    )
    found = row("k", 2.0, bench="bench_er_gpu", copy_time=1.0, target=["share_of_copy >= 0.9"])
    Record.of(GPU, folder).add(found)
    assert targets_gpu(Records(folder)).splitlines()[-1] == "| k | `share_of_copy >= 0.9` | 0.5 | MISSED |"
    assert rows_of("gpu")(Records(folder)).startswith("**normalise**")


def test_speeds_beside_failing_checks_are_not_reported(folder, monkeypatch):
    case = GpuCase("k", lambda _: row("k", 1), targets=["share_of_copy >= 0.9"])
    monkeypatch.setattr(target_tables, "gpu_cases", lambda: [("bench_er_gpu", case)])
    found = row("k", 2.0, bench="bench_er_gpu", copy_time=1.9, target=["share_of_copy >= 0.9"])
    Record.of(GPU, folder).add(found, without_figures("agreement_gpu", "weighted_sum", "FAIL", "wrong"))
    records = Records(folder)
    assert targets_gpu(records).splitlines()[-1].endswith("| not reported | 1 correctness checks fail |")
    assert records.rows("gpu") == [] and "not reported, 1 correctness checks fail" in rows_of("gpu")(records)


def test_no_gpu_record_is_said_in_words(folder):
    assert rows_of("gpu")(Records(folder)) == "Not yet measured on a GPU."


def test_documents_are_brought_into_step_and_found_out_of_step(folder, tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    before = "# Speed\n<!-- table targets-cpu -->\nold\n<!-- end of targets-cpu -->\nafter\n"
    (tmp_path / "README.md").write_text(before)
    (tmp_path / "docs" / "x.md").write_text("no table\n")
    records = Records(folder)
    assert update(tmp_path, records, check=True) == [tmp_path / "README.md"]
    assert (tmp_path / "README.md").read_text() == before
    update(tmp_path, records, check=False)
    text = (tmp_path / "README.md").read_text()
    assert (
        "1 of 2 targets met" in text and "old" not in text and text.endswith("\n\n<!-- end of targets-cpu -->\nafter\n")
    )
    assert update(tmp_path, records, check=True) == []
    Record.of(LATER, folder).add(row("b", 5.0, ratio=4.0, target="ratio >= 3"))
    assert update(tmp_path, Records(folder), check=True) == [tmp_path / "README.md"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<!-- table nothing -->\n<!-- end of nothing -->\n", "wants a table 'nothing'; there are targets-cpu"),
        ("<!-- table targets-cpu -->\nno end\n", "1 tables begin and 0 have their line"),
    ],
)
def test_documents_that_cannot_be_filled(text, words):
    with pytest.raises(ValueError, match=words):
        filled(text, {"targets-cpu": "x"}, "README.md")


def test_links_lead_from_where_the_document_is(folder, tmp_path):
    (tmp_path / "docs").mkdir()
    for path in (tmp_path / "README.md", tmp_path / "docs" / "x.md"):
        path.write_text("<!-- table source -->\n<!-- end of source -->\n")
    update(tmp_path, Records(folder), check=False)
    name = "cpu-2-cores-20261124-999999999.json"
    assert f"](bench/results/{name})" in (tmp_path / "README.md").read_text()
    assert f"](../bench/results/{name})" in (tmp_path / "docs" / "x.md").read_text()


def test_pictures_are_drawn_and_only_have_to_be_there(tmp_path, monkeypatch):
    class Figure:
        def savefig(self, path, **options):
            path.write_bytes(b"a picture")

    monkeypatch.setattr(pictures, "PICTURES", {"a.png": lambda records: Figure()})
    records, path = Records(tmp_path), tmp_path / "a.png"
    assert update_pictures(tmp_path, records, check=True) == [path] and not path.exists()
    assert update_pictures(tmp_path, records, check=False) == [path]
    assert update_pictures(tmp_path, records, check=False) == []
    path.write_bytes(b"the same, drawn by another version")
    assert update_pictures(tmp_path, records, check=True) == []


def test_the_cpu_is_named_by_its_numbers(folder, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("<!-- table source -->\n<!-- end of source -->\n")
    cpu = {"name": "Some CPU", "vendor": "AuthenticAMD", "family": 25, "model": 1, "stepping": 1,
           "caches": {"L2": 524288}, "instruction_sets": ["portable", "avx2"]}  # fmt: skip
    assert "(Some CPU, family not recorded; torch" in rows_source(folder)
    Record.of({**LATER, "time": "2026-11-25T12:00:00+00:00", "processor": cpu}, folder).add(row("a", 1.0))
    assert "(Some CPU, family 25 model 1 (Zen 3), AVX2; caches L2 512 KiB; torch" in rows_source(folder)
    assert [one.p50 for one in Records(folder).rows("cpu")] == [1.0], "the earlier records may be of another family"
    assert [len(group) for group in Records(folder).cpus()] == [1, 2]


def rows_source(folder):
    return record_tables.source(Records(folder))


def test_rows_over_images_show_the_worst(tmp_path):
    info = {"images": 64, "p99": 3.0, "max": 4.0, "peer": "torchstain torch", "peer_p50": 60.0, "ratio": 29.0}
    Record.of(MACHINE, tmp_path).add(row("a", 2.0, worst_ratio_torchstain_torch=14.0, **info))
    assert "| 3, 4 of 64 | torchstain torch 60 ms | 29, worst 14 |" in rows_of("cpu")(Records(tmp_path))


def test_rows_of_another_machine_are_left_out(folder):
    Record.of({**MACHINE, "cpu": "Another", "commit": "777777777"}, folder).add(row("elsewhere", 1.0))
    assert "elsewhere" not in {one.name for one in Records(folder).rows("cpu")}


def test_earlier_records_speak_of_tails(tmp_path):
    before = Row("bench_er_stage", "stage_tails[a]", "ER stage tails", {}, 1, 1, 1, "ms", 5, {"title": "the tails"})
    Record.of(MACHINE, tmp_path).add(before)
    (found,) = Records(tmp_path).rows("cpu", "bench_er_stage", "stage_epilogues")
    assert (found.name, found.group) == ("stage_epilogues[a]", "ER stage epilogues")
    assert found.extra_info["title"] == "the epilogues"


def macenko_row(who, p50):
    where = {"operation": "normalize", "size": "224x224", "pixels": 50176, "who": who, "threads": 1}
    return Row("bench_macenko", f"normalize 224x224 {who}", "normalise", where, p50, p50, p50, "ms", 5)


def test_ratios_of_the_readme_are_within_one_record(tmp_path):
    """A peer that only an earlier record has is compared with what the library took in that record."""
    Record.of(MACHINE, tmp_path).add(macenko_row("ernet_fast", 2.0), macenko_row("stainx", 50.0))
    Record.of(LATER, tmp_path).add(macenko_row("ernet_fast", 1.0), macenko_row("torchstain torch", 30.0))
    text = macenko_tables.speed("normalize")(Records(tmp_path))
    assert "| **1 ms**; not recorded |" in text
    assert "| 50 ms: 25x; not recorded * |" in text and "| 30 ms: 30x; not recorded |" in text


def test_means_are_no_stages_of_the_readme(tmp_path):
    where = {"batch": 8, "layout": "channels-last", "threads": 1}
    found = {"naive_ms": 12.0, "ratio_naive": 6.0, "share_of_copy": 0.5}
    stage = Row("bench_er_stage", "stage_epilogues[a]", "g", {"stage": "resnet50-1", **where}, 2, 2, 2, "ms", 5, found)
    mean = Row("bench_er_stage", "mean", "g", where, 2, 2, 2, "ms", 5, {"ratio_naive": 6.0})
    Record.of(MACHINE, tmp_path).add(stage, mean)
    assert "| **2 ms** | 12 ms | 6x | 6x (channels-last, 1 thread) | 50 % |" in er_tables.readme_stages(
        Records(tmp_path)
    )


def test_the_readme_shows_the_worst_and_times_of_few_repeats_as_such(tmp_path):
    where = {"stage": "resnet50-1", "batch": 8}
    found = {"naive_ms": 12.0, "ratio_naive": 6.0, "share_of_copy": 1.31}
    typical = Row(
        "bench_er_stage",
        "stage_epilogues[a]",
        "g",
        where | {"layout": "channels-last", "threads": 1},
        2,
        2,
        2,
        "ms",
        1,
        found,
    )
    worst = Row(
        "bench_er_stage", "stage_epilogues[b]", "g", where | {"layout": "contiguous", "threads": 2}, 4, 4, 4, "ms", 4,
        found | {"ratio_naive": 3.0},
    )  # fmt: skip
    Record.of(MACHINE, tmp_path).add(typical, worst)
    line = er_tables.readme_stages(Records(tmp_path)).splitlines()[-1]
    assert line.endswith("| **2 ms** (1 repeat) | 12 ms | 6x | 3x (contiguous, 2 threads) (4 repeats) | 131 % |")


def test_missed_targets_are_told_with_the_worst(tmp_path):
    rows = [row(name, 1.0, bench="bench_er_stage", ratio_naive=value, target="ratio_naive >= 3")
            for name, value in (("a", 2.5), ("b", 4.0), ("c", 1.5))]  # fmt: skip
    Record.of(MACHINE, tmp_path).add(*rows)
    (line,) = by_group(missed=True)(Records(tmp_path)).splitlines()[2:]
    assert line == "| normalise | `ratio_naive >= 3` | 1 of 3 | 1.5: c |"
    Record.of(MACHINE, tmp_path / "met").add(rows[1])
    assert by_group(missed=True)(Records(tmp_path / "met")) == "Every target is met."
