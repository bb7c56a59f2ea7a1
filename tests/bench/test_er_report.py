"""The report of the ER benches: computed from rows alone, and honest about what is missing."""

from __future__ import annotations

import re

import er_tables
import pytest
import report_er
import report_readme
from er_means import STAGES_50, geometric_mean, record_means
from record import Record, Row
from report import Records

MACHINE = {
    "kind": "cpu", "name": "cpu-2-cores", "cpu": "Some CPU", "cores": 2, "packages": {"torch": "2.13.0"},
    "python": "3.11.7", "commit": "012345678", "dirty": False, "sources": "feed", "time": "2026-11-23T12:00:00+00:00",
    "clocks": [],
}  # fmt: skip
PARAMS = {"batch": 8, "layout": "channels-last", "threads": 2}


def tail_row(stage, fused, naive, test="stage_tails", bench="bench_er_stage", **info):
    figures = {
        "naive_ms": naive, "fused_ms": fused, "ratio_naive": naive / fused, "copy_time": 0.6 * fused,
        "must_move": 3.3e8,
        "share_of_copy_cached": 0.5, "map_accesses": 33, "moved_naive": 7.7e8, "moved_fused": 3.4e8,
        "faults_naive": 0, "faults_fused": 0, **info,
    }  # fmt: skip
    name = f"{test}[{stage}-8-channels-last-2]"
    return Row(bench, name, "tails", {"stage": stage, **PARAMS}, fused, fused, fused, "ms", 5, figures)


def kernels_row(stage, blocks):
    info = {"blocks": blocks, "map_bytes": 1e7, "naive_map_kernels": 16 * blocks, "naive_vector_kernels": 3}
    info |= {"fused_map_kernels": 5 * blocks, "fused_vector_kernels": 2 * blocks}
    return Row("bench_er_stage", f"kernels[{stage}]", "kernels", {"stage": stage}, 7, 7, 7, "kernels", 1, info)


@pytest.fixture
def record(tmp_path):
    record = Record.of(MACHINE, tmp_path / "results")
    for stage, naive in zip(STAGES_50, (2.0, 4.0, 8.0, 16.0), strict=True):
        record.add(tail_row(stage, 1.0, naive))
    return record


def test_geometric_mean_needs_all_four_stages(record):
    rows = record.rows()
    assert geometric_mean(rows, "ratio_naive") == pytest.approx(1024 ** (1 / 4))
    assert geometric_mean(rows[:3], "ratio_naive") is None
    assert geometric_mean(rows, "ratio_compiled") is None


def test_means_become_rows_with_the_bars_that_can_be_judged(record):
    def write(group, *, name, params, p20, p50, p80, unit, repeats, **info):
        row = Row("bench_er_stage", name, group, params, p20, p50, p80, unit, repeats, info)
        record.add(row)
        return row

    (row,) = record_means(record, write, "bench_er_stage", "stage_tails")
    assert row.name == "mean of stage_tails[8-channels-last-2]" and row.p50 == 1
    assert [(str(target), value) for target, value in row.targets()] == [("ratio_naive >= 5", pytest.approx(5.6569))]
    record.add(tail_row("resnet50-1", 1.0, 2.0, ratio_compiled=1.5))
    assert record_means(record, write, "bench_er_stage", "shortcut_sum") == []


def test_report_of_a_whole_and_of_a_partial_record(record, tmp_path):
    pytest.importorskip("matplotlib")
    record.add(kernels_row("resnet50-1", 2), tail_row("resnet101-3", 10.0, 70.0))
    assert report_er.main([str(record.path), str(tmp_path / "docs")]) == 0
    page = (tmp_path / "docs" / "er-benchmarks.md").read_text()
    assert "5.66 (reaches 5)" in page and "not measured" in page and "7.00 (reaches 6)" in page
    assert re.search(r"\| resnet50-1 \| 2 \| 16\.0 \| 1\.5 \| – \| – \| 5\.0 \| 2\.0 \|", page)
    assert "all cores; the plain ResNet is one of torch modules.\n\nNot measured." in page
    assert "do not edit.\n" in page  # one record alone
    assert (tmp_path / "docs" / "er_speed.png").read_bytes().startswith(b"\x89PNG")
    source = report_er.Source(record.path, MACHINE, 0)
    assert report_er.report([], [source]).count("Not measured.") == len(report_er.sections([]))


def test_rows_that_only_older_records_have_are_marked(record):
    contiguous = Record.of({**MACHINE, "commit": "abcdef", "time": "2026-11-20T12:00:00+00:00"}, record.path.parent)
    contiguous.add(tail_row("resnet101-3", 1.0, 9.0), tail_row("resnet50-1", 1.0, 99.0))
    other = Record.of({**MACHINE, "cpu": "Another", "time": "2026-11-19T12:00:00+00:00"}, record.path.parent)
    other.add(kernels_row("resnet50-1", 2))
    newer = Record.of({**MACHINE, "commit": "fedcba", "time": "2026-11-24T12:00:00+00:00"}, record.path.parent)
    newer.add(kernels_row("resnet50-2", 3))
    rows, sources = report_er.gather(record.path)
    assert [(source.path, source.count) for source in sources] == [(record.path, 4), (contiguous.path, 1)]
    assert {row.params["stage"]: row.extra_info.get("older", False) for row in rows} == {
        **dict.fromkeys(STAGES_50, False), "resnet101-3": True
    }  # fmt: skip
    page = report_er.report(rows, sources)
    assert (
        "| resnet101-3, 8, channels-last, 2 * | 9.0 |" in page and "| resnet50-1, 8, channels-last, 2 | 2.0 |" in page
    )
    assert "A star marks rows of older records: [" in page and "commit abcdef" in page


def test_the_readme_takes_stages_from_rows_and_not_from_means(record):
    row = tail_row("resnet50-1", 1.0, 6.0)
    row.params["threads"] = 1
    mean = Row(
        "bench_er_stage", "mean of stage_tails[8-channels-last-1]", "means", {**PARAMS, "threads": 1}, 1, 1, 1, "ms"
    )
    mean.extra_info["ratio_naive"] = 5.0
    record.add(row, mean)
    assert report_readme.stages(Records(record.path.parent)).count("\n|") == 2  # the rule, and one stage


def test_bars_are_summed_up_by_what_they_ask():
    rows = [tail_row("resnet50-1", 1.0, naive, target="ratio_naive >= 5") for naive in (4.0, 6.0)]
    rows.append(tail_row("resnet50-2", 1.0, 7.0, target=["ratio_naive >= 5", "ratio_compiled >= 2"]))
    assert er_tables.targets_table(rows).splitlines()[2:] == [
        "| tails | `ratio_naive >= 5` | 2 of 3 | 4 to 7 |",
        "| tails | `ratio_compiled >= 2` | 0 of 0 | – |",
    ]
    assert er_tables.verdicts(rows[2]) == "ratio_naive >= 5 reached; ratio_compiled >= 2 not measured"


def test_a_bar_missed_is_called_short():
    assert er_tables.mark(8**0.5, 3.0) == "2.83 (short of 3)"


def test_usage(capsys):
    assert report_er.main([]) == 2
    assert "RECORD" in capsys.readouterr().err
