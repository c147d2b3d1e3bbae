"""What concerns Spark alone: other engines' tables, other people's features, workers, and the session."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import Pool
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from millrace.errors import ConflictError, LakehouseError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.local import create_empty
from millrace.lakehouse.spark_session import on_server
from millrace.settings import Settings
from tests.conftest import free_port
from tests.lakehouse.conftest import SPARK_TABLES
from tests.lakehouse.things import OTHER_THINGS, THINGS, fill, hashes, merge_often, things

pytestmark = pytest.mark.spark


@pytest.fixture
def spark_lake(settings: Settings, spark_url: str) -> Lake:
    return Lake(str(settings.lake), "dev", "qa", spark_url=spark_url, spark_tables=SPARK_TABLES)


def test_a_server_that_is_not_there_is_one_sentence_at_once(settings: Settings) -> None:
    url = f"sc://127.0.0.1:{free_port()}"
    lake = Lake(str(settings.lake), "dev", "qa", spark_url=url, spark_tables=SPARK_TABLES)
    start = time.monotonic()
    with pytest.raises(LakehouseError, match=f"{url} can't be reached"):
        lake.merge(THINGS, things({"a": "1"}), run="r")
    assert time.monotonic() - start < 5


def test_spark_reads_what_delta_rs_committed(settings: Settings, spark_url: str) -> None:
    lake = Lake.of(settings, "qa")
    lake.merge(THINGS, things({"a": "1", "b": "1"}), run="r")
    lake.merge(THINGS, things({"a": "2"}), run="r")
    uri = lake.uri(THINGS)
    read = on_server(spark_url, lambda session: session.sql(f"SELECT * FROM delta.`{uri}`").toArrow())
    assert hashes(read) == {"a": "2", "b": "1"}


def test_a_transformation_reads_one_engines_table_and_commits_by_the_other(settings: Settings, spark_url: str) -> None:
    lake = Lake(str(settings.lake), "dev", "qa", spark_url=spark_url, spark_tables=frozenset({OTHER_THINGS.path}))
    lake.merge(THINGS, things({f"k{i}": "1" for i in range(2500)}), run="r")

    calls = settings.home / "calls"

    def counted(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            with calls.open("a") as file:
                file.write(f"{os.getpid()} {batch.num_rows}\n")
            yield batch

    assert lake.transform(THINGS, counted, OTHER_THINGS, run="t").inserted == 2500
    done = [line.split() for line in calls.read_text().splitlines()]
    assert str(os.getpid()) not in {pid for pid, _ in done}
    assert max(int(rows) for _, rows in done) <= 1000
    assert sum(int(rows) for _, rows in done) == 2500, "the function runs once over the source"


def test_threads_that_merge_at_once_lose_nothing(spark_lake: Lake) -> None:
    spark_lake.merge(THINGS, things({"shared": "0"}), run="r")

    def merge(i: int) -> int:
        return spark_lake.merge(THINGS, things({f"k{i}": "1", "shared": str(i)}), run="r").version

    with ThreadPoolExecutor(3) as pool:
        versions = list(pool.map(merge, range(1, 4)))
    assert len(set(versions)) == 3
    assert hashes(spark_lake.read(THINGS)).keys() == {"shared", "k1", "k2", "k3"}


def test_processes_that_merge_overlapping_keys_lose_nothing(spark_lake: Lake, spark_url: str, processes: Pool) -> None:
    start = time.time() + 1
    done = processes.starmap(merge_often, [(spark_lake.root, writer, 3, start, spark_url) for writer in range(2)])
    found = hashes(spark_lake.read(THINGS))
    assert found.keys() - {"shared"} == {key for keys in done for key in keys}
    assert found["shared"] in {keys[-1] for keys in done}


def test_a_constraint_that_a_table_lacks_is_added_once(spark_lake: Lake) -> None:
    create_empty(spark_lake.uri(THINGS), THINGS)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: spark_lake.engine(THINGS).create(spark_lake.uri(THINGS), THINGS), range(3)))
    operations = [entry["operation"] for entry in DeltaTable(spark_lake.uri(THINGS)).history()]
    assert sorted(operations) == ["ADD CONSTRAINT", "CREATE TABLE"]


@pytest.mark.parametrize("feature", ["DeletionVectors", "RowTracking"])
def test_a_table_that_somebody_made_with_other_features_is_refused(
    spark_lake: Lake, spark_url: str, feature: str
) -> None:
    uri = spark_lake.uri(THINGS)
    made = (
        f"CREATE TABLE delta.`{uri}` (key STRING, content_hash STRING, size BIGINT) USING DELTA "
        f"TBLPROPERTIES ('delta.enable{feature}' = 'true')"
    )
    on_server(spark_url, lambda session: session.sql(made).collect())
    named = feature[0].lower() + feature[1:]
    with pytest.raises(LakehouseError, match=f"{named}.*doesn't declare"):
        spark_lake.read(THINGS)
    with pytest.raises(LakehouseError, match=f"{named}.*doesn't declare"):
        spark_lake.merge(THINGS, things({"a": "1"}), run="r")


def test_a_full_disk_is_one_sentence_and_the_table_stays_readable(small_disk: Path, spark_url: str) -> None:
    lake = Lake(str(small_disk), "dev", "qa", spark_url=spark_url, spark_tables=SPARK_TABLES)
    lake.merge(THINGS, things({"a": "1"}), run="r")
    version = lake.version(THINGS)
    fill(small_disk)
    for table in (THINGS, OTHER_THINGS):
        with pytest.raises(LakehouseError, match=f"the disk that holds {small_disk}.* is full") as raised:
            lake.merge(table, things({f"k{i}": "2" for i in range(1000)}), run="r")
        assert not isinstance(raised.value, ConflictError)
    assert lake.version(THINGS) == version
    assert hashes(lake.read(THINGS)) == {"a": "1"}
    (small_disk / "filler").unlink()
    assert lake.merge(THINGS, things({"a": "2"}), run="r").updated == 1
    assert lake.merge(OTHER_THINGS, things({"a": "2"}), run="r").inserted == 1
