"""Tables of the ER benches: computed from rows alone, and honest about what is missing."""

from __future__ import annotations

import pictures
import pytest
import tables
from er_means import STAGES_50, mean_rows
from er_tables import EPILOGUES, TABLES
from record import Record, Row
from records import Records
from target_tables import by_group

MACHINE = {
    "kind": "cpu", "name": "cpu-2-cores", "cpu": "Some CPU", "cores": 2, "packages": {"torch": "2.13.0"},
    "python": "3.11.7", "commit": "012345678", "dirty": False, "sources": "feed", "time": "2026-11-23T12:00:00+00:00",
    "clocks": [],
}  # fmt: skip
PARAMS = {"batch": 8, "layout": "channels-last", "threads": 2}


def epilogue_row(stage, fused, naive, test="stage_epilogues", bench="bench_er_stage", **info):
    figures = {
        "naive_ms": naive, "fused_ms": fused, "ratio_naive": naive / fused, "copy_time": 0.6 * fused,
        "must_move": 3.3e8,
        "share_of_copy_cached": 0.5, "map_accesses": 33, "moved_naive": 7.7e8, "moved_fused": 3.4e8,
        "faults_naive": 0, "faults_fused": 0, **info,
    }  # fmt: skip
    name = f"{test}[{stage}-8-channels-last-2]"
    return Row(bench, name, "epilogues", {"stage": stage, **PARAMS}, fused, fused, fused, "ms", 5, figures)


def kernels_row(stage, blocks):
    info = {"blocks": blocks, "map_bytes": 1e7, "naive_map_kernels": 16 * blocks, "naive_vector_kernels": 3}
    info |= {"fused_map_kernels": 5 * blocks, "fused_vector_kernels": 2 * blocks}
    return Row("bench_er_stage", f"kernels[{stage}]", "kernels", {"stage": stage}, 7, 7, 7, "kernels", 1, info)


@pytest.fixture
def record(tmp_path):
    record = Record.of(MACHINE, tmp_path / "results")
    for stage, naive in zip(STAGES_50, (2.0, 4.0, 8.0, 16.0), strict=True):
        record.add(epilogue_row(stage, 1.0, naive))
    return record


def test_means_need_all_four_stages_and_have_the_targets_that_can_be_judged(record):
    (row,) = mean_rows(record.rows(), *EPILOGUES)
    assert row.name == "mean of stage_epilogues[8-channels-last-2]" and row.p50 == 1
    assert [(str(target), value) for target, value in row.targets()] == [("ratio_naive >= 5", pytest.approx(5.6569))]
    assert mean_rows(record.rows()[:3], *EPILOGUES) == []
    assert mean_rows(record.rows(), "bench_er_functional", "shortcut_sum") == []


def test_tables_of_a_partial_record(record, tmp_path):
    record.add(kernels_row("resnet50-1", 2), epilogue_row("resnet101-3", 10.0, 70.0))
    found = {name: made(Records(record.path.parent)) for name, made in TABLES.items()}
    means = found["er-means"].splitlines()[-1]
    assert means == "| 8, channels-last, 2 | 5.66 | – | 60 % | 60 % | 7 | ratio_naive >= 5 met |"
    assert found["er-kernels"].endswith("| resnet50-1 | 2 | 16 | 1.5 | – | – | 5 | 2 | – |")
    assert found["er-steps"] == found["er-parts"] == "Not measured."
    assert [line.split(",")[0] for line in found["er-speed"].splitlines()[2:]] == [
        f"| {stage}" for stage in (*STAGES_50, "resnet101-3")
    ]
    assert "| 33 | 34 |" in found["er-bytes"], "maps to move, and moved"
    empty = Records(tmp_path / "empty")
    assert {made(empty) for made in TABLES.values()} == {"Not measured."}


def test_picture(record, tmp_path):
    pytest.importorskip("matplotlib")
    pictures.epilogues(Records(record.path.parent)).savefig(tmp_path / "er_speed.png")
    assert (tmp_path / "er_speed.png").read_bytes().startswith(b"\x89PNG")


def test_rows_that_only_older_records_have_are_marked(record):
    older = Record.of({**MACHINE, "commit": "abcdef", "time": "2026-11-20T12:00:00+00:00"}, record.path.parent)
    older.add(epilogue_row("resnet101-3", 1.0, 9.0), epilogue_row("resnet50-1", 1.0, 99.0))
    found = TABLES["er-speed"](Records(record.path.parent))
    assert "| resnet101-3, 8, channels-last, 2 * | 9 |" in found
    assert "| resnet50-1, 8, channels-last, 2 | 2 |" in found
    assert "| 8, channels-last, 2 * |" in TABLES["er-means"](Records(record.path.parent))


def test_the_readme_takes_stages_from_rows_and_not_from_means(record):
    row = epilogue_row("resnet50-1", 1.0, 6.0)
    row.params["threads"] = 1
    record.add(row, *mean_rows(record.rows(), *EPILOGUES))
    assert TABLES["readme-stages"](Records(record.path.parent)).count("\n|") == 2  # the rule, and one stage


def test_targets_are_summed_up_by_what_they_ask(tmp_path):
    rows = [epilogue_row(stage, 1.0, naive, target="ratio_naive >= 5") for stage, naive in (("a", 4.0), ("b", 6.0))]
    rows.append(epilogue_row("c", 1.0, 7.0, target=["ratio_naive >= 5", "ratio_compiled >= 2"]))
    Record.of(MACHINE, tmp_path).add(*rows)
    assert by_group(missed=False)(Records(tmp_path)).splitlines()[2:] == [
        "| epilogues | `ratio_naive >= 5` | 2 of 3 | 4: stage_epilogues[a-8-channels-last-2] |"
    ]
    assert tables.verdicts(rows[2]) == "ratio_naive >= 5 met; ratio_compiled >= 2 not measured"
