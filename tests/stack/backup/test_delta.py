from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from millrace.errors import BackupError
from millrace.lakehouse.storage import Location
from millrace.stack.backup.delta import LOG, Tables
from millrace.stack.backup.store import Store

PATH = "dev/qa/bronze/events"


@pytest.fixture
def tables(tmp_path: Path) -> Tables:
    return Tables(Store.at(tmp_path), Location(str(tmp_path)))


def test_what_a_version_needs_is_found_whatever_its_partitions_are_called(tables: Tables, tmp_path: Path) -> None:
    names = ["plain", "a b", "50 %", "ü/ö", "x=y", "a%20b", "#?&"]
    rows = pa.table({"name": names, "n": list(range(len(names)))})
    write_deltalake(str(tmp_path / PATH), rows, partition_by=["name"])
    assert tables.version(PATH) == 0
    needed = tables.needed(PATH, 0)
    assert len(needed) == len(names)
    assert needed == {one.path for one in tables.files(PATH, 0) if f"/{LOG}/" not in one.path}


def test_a_version_is_its_log_up_to_there_without_the_pointer_that_may_lie_beyond(
    tables: Tables, tmp_path: Path
) -> None:
    folder = tmp_path / PATH
    for number in range(4):
        write_deltalake(str(folder), pa.table({"n": [number]}), mode="append")
    DeltaTable(str(folder)).create_checkpoint()
    (folder / LOG / f"{1:020}.{3:020}.compacted.json").write_text("")
    (folder / LOG / f"{1:020}.{2:020}.compacted.json").write_text("")

    def log(version: int) -> list[str]:
        return [one.path.rpartition("/")[2] for one in tables.files(PATH, version) if f"/{LOG}/" in one.path]

    commits = [f"{number:020}.json" for number in range(4)]
    assert log(2) == [commits[0], f"{1:020}.{2:020}.compacted.json", *commits[1:3]]
    assert f"{3:020}.checkpoint.parquet" in log(3)
    assert "_last_checkpoint" in {path.name for path in (folder / LOG).iterdir()}
    assert "_last_checkpoint" not in log(3)


def test_tables_of_one_environment_are_found_and_what_is_no_table_is_not(tables: Tables, tmp_path: Path) -> None:
    for path in (PATH, "prod/qa/bronze/events", "dev/_platform/ops/audit"):
        write_deltalake(str(tmp_path / path), pa.table({"n": [1]}))
    (tmp_path / "dev" / "qa" / "silver" / "begun" / LOG).mkdir(parents=True)
    assert set(tables.paths("dev")) == {PATH, "dev/_platform/ops/audit"}
    assert set(tables.paths()) == {PATH, "dev/_platform/ops/audit", "prod/qa/bronze/events"}


def test_a_table_that_can_not_be_read_is_one_sentence(tables: Tables, tmp_path: Path) -> None:
    write_deltalake(str(tmp_path / PATH), pa.table({"n": [1]}))
    (tmp_path / PATH / LOG / f"{0:020}.json").write_text("not a log")
    with pytest.raises(BackupError, match=f"table {PATH} in .* can't be read: ") as said:
        tables.version(PATH)
    assert "\n" not in str(said.value)
