"""One archive on several machines: the files of one run, each done once."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

from ernet_fast.cli import main
from ernet_fast.scale import Shard, merge_status, normalize_files
from ernet_fast.scale.journal import journals
from ernet_fast.scale.run_folder import one_run
from ernet_fast.scale.shard import read_shard

COUNT = 13


@pytest.fixture
def archive(tmp_path: Path, write_patch) -> Path:
    for number in range(COUNT):
        write_patch(tmp_path / "in" / f"slide {number % 2}" / f"{number:02}.png", number, size=(32, 32))
    (tmp_path / "in" / "slide 0" / "broken.png").write_bytes(b"")
    (tmp_path / "in" / "slide 1" / "whole.svs").write_bytes(b"")
    return tmp_path / "in"


def images_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}


@pytest.mark.parametrize("fit", ["per-image", "per-folder"])
def test_shards_are_one_run(archive, tmp_path, fit):
    whole, out = tmp_path / "whole", tmp_path / "out"
    normalize_files(archive, whole, fit=fit, status=tmp_path / "whole.csv")
    done = []
    for index in (3, 1, 2):
        summary = normalize_files(archive, out, fit=fit, shard=f"{index}/3", status=tmp_path / "status.csv")
        done += [file.input for file in summary.files]
    assert len(done) == len(set(done)) == COUNT + 2
    assert images_below(out) == images_below(whole)
    tables = sorted(map(str, tmp_path.glob("status.*.csv")))
    assert len(tables) == 3 and main(["normalize", "--merge", *tables, str(tmp_path / "status.csv")]) == 0
    merged = (tmp_path / "status.csv").read_text()
    assert merged.replace(f"{out}/", f"{whole}/") == (tmp_path / "whole.csv").read_text()
    for count in (1, 2, 5):  # however many go on
        again = [normalize_files(archive, out, fit=fit, shard=Shard(i + 1, count)) for i in range(count)]
        assert sum(len(summary.done_before) for summary in again) == COUNT
    assert len(normalize_files(archive, out, fit=fit).done_before) == COUNT
    assert len(journals(out)) == 1, "a run that has the folder to itself merges the journals"
    assert len(normalize_files(archive, out, fit=fit).done_before) == COUNT


def test_folders_fitted_together_are_not_divided(archive, tmp_path):
    for index in (1, 2):
        summary = normalize_files(archive, tmp_path / "out", fit="per-folder", shard=Shard(index, 2))
        folders = {Path(file.input).parent.name for file in summary.files if file.status == "ok"}
        assert all(len(list((tmp_path / "out" / name).iterdir())) >= 3 for name in folders)


class TestWhoMayWrite:
    def test_shards_of_as_many_share(self, archive, tmp_path):
        out = tmp_path / "out"
        with one_run(out, shard=Shard(1, 2)):
            normalize_files(archive, out, shard="2/2")
            for options in ({"shard": "1/2"}, {"shard": "1/3"}, {}, {"overwrite": True}):
                with pytest.raises(RuntimeError, match="another run is writing"):
                    normalize_files(archive, out, **options)
        with one_run(out), pytest.raises(RuntimeError, match="another run is writing"):
            normalize_files(archive, out, shard="1/2")

    def test_what_makes_no_sense(self, archive, tmp_path):
        for shard in ("0/2", "3/2", "2", "x"):
            with pytest.raises(ValueError, match="expected I/N"):
                normalize_files(archive, tmp_path / "out", shard=shard)
        with pytest.raises(ValueError, match="cannot do together"):
            normalize_files(archive, tmp_path / "out", shard="1/2", overwrite=True)
        with pytest.raises(ValueError, match="single file"):
            normalize_files(archive / "slide 0" / "00.png", tmp_path / "out.png", shard="1/2")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_STEP": "2",
          "SLURM_ARRAY_TASK_COUNT": "5", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Shard(3, 5)),
        ({"RANK": "0", "WORLD_SIZE": "4"}, Shard(1, 4)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, Shard(4, 4)),
    ],
)  # fmt: skip
def test_the_environment_of_a_cluster(environment, expected):
    assert read_shard("auto", environment) == expected


@pytest.mark.parametrize("environment", [{}, {"RANK": "1"}, {"RANK": "4", "WORLD_SIZE": "4"}, {"SLURM_PROCID": "x"}])
def test_an_environment_that_says_nothing(environment):
    with pytest.raises(ValueError, match="give --shard I/N"):
        read_shard("auto", environment)


def test_only_tables_of_one_kind_merge(archive, tmp_path):
    target = archive / "slide 0" / "00.png"
    normalize_files(archive, tmp_path / "a", status=tmp_path / "a.csv")
    normalize_files(archive, tmp_path / "b", status=tmp_path / "b.csv", method="reinhard", target=target)
    (tmp_path / "c.csv").write_text("a,b\n")
    for other in ("b.csv", "c.csv"):
        with pytest.raises(ValueError, match="tables of one method|no table of statuses"):
            merge_status([tmp_path / "a.csv", tmp_path / other], tmp_path / "merged.csv")
    assert not os.path.exists(tmp_path / "merged.csv")


def test_tables_in_parquet_say_the_same(archive, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "out"
    for number in (1, 2):
        normalize_files(archive, out, shard=f"{number}/2", status=tmp_path / "status.parquet")
    whole = normalize_files(archive, out, status=tmp_path / "whole.parquet")
    normalize_files(archive, out, status=tmp_path / "whole.csv")
    shards = [tmp_path / f"status.{number}-of-2.parquet" for number in (2, 1)]
    assert merge_status(shards, tmp_path / "merged.parquet") == len(whole.files)
    merged, table = (parquet.read_table(tmp_path / f"{name}.parquet") for name in ("merged", "whole"))
    assert merged.equals(table)
    with open(tmp_path / "whole.csv", newline="") as file:
        header, *rows = csv.reader(file)
    columns = [column.to_pylist() for column in table.columns]
    assert table.column_names == header and table.column("width").type == "int64"
    assert [["" if value is None else str(value) for value in row] for row in zip(*columns, strict=True)] == rows
    with pytest.raises(ValueError, match="tables of one kind"):
        merge_status([tmp_path / "whole.csv"], tmp_path / "merged.parquet")
    with pytest.raises(ValueError, match=r"ends in \.csv or \.parquet"):
        normalize_files(archive, out, status=tmp_path / "status.xlsx")
