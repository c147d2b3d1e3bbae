"""What the local engine promises under concurrency, on strange tables, and when the disk is full."""

import json
import time
from collections.abc import Iterator
from multiprocessing.pool import Pool
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake

from millrace.errors import ConflictError, FeedGone, LakehouseError
from millrace.lakehouse.commits import open_table
from millrace.lakehouse.difference import Difference
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.local import LocalEngine
from millrace.lakehouse.rows import stamped
from millrace.lakehouse.tables import OPS_DECISIONS
from millrace.settings import Settings
from tests.lakehouse.things import (
    OTHER_THINGS,
    THINGS,
    append_decision,
    create_and_break,
    decision,
    fill,
    hashes,
    merge_often,
    merge_same,
    things,
)


@pytest.fixture
def lake(settings: Settings) -> Lake:
    return Lake.of(settings, "qa")


def soon() -> float:
    """A moment at which all processes begin."""
    return time.time() + 0.15


@pytest.mark.slow
def test_four_writers_on_overlapping_keys_lose_nothing(lake: Lake, processes: Pool) -> None:
    start = soon()
    done = processes.starmap(merge_often, [(lake.root, writer, 5, start) for writer in range(4)])
    found = hashes(lake.read(THINGS))
    assert found.keys() - {"shared"} == {key for keys in done for key in keys}
    assert found["shared"] in {keys[-1] for keys in done}


@pytest.mark.slow
def test_writers_of_the_same_rows_write_them_once(lake: Lake, processes: Pool) -> None:
    start = soon()
    written = processes.starmap(merge_same, [(lake.root, writer, start) for writer in range(4)])
    assert sorted(written) == [(0, 0), (0, 0), (0, 0), (50, 0)]
    assert lake.read(THINGS).num_rows == 50


@pytest.mark.slow
def test_a_table_that_several_processes_create_at_once_never_lacks_its_constraint(lake: Lake, processes: Pool) -> None:
    start = soon()
    said = processes.starmap(create_and_break, [(lake.uri(THINGS), writer, start) for writer in range(4)])
    assert all("size_not_negative" in sentence for sentence in said), said
    assert lake.read(THINGS).num_rows == 0
    operations = [entry["operation"] for entry in DeltaTable(lake.uri(THINGS)).history()]
    assert sorted(operations) == ["ADD CONSTRAINT", "CREATE TABLE"]


@pytest.mark.slow
def test_of_concurrent_appends_with_the_same_expected_number_exactly_one_wins(lake: Lake, processes: Pool) -> None:
    uri = lake.uri(OPS_DECISIONS)
    for expected in (None, 0, 1, 2):
        start = soon()
        won = processes.starmap(append_decision, [(uri, expected, writer, start) for writer in range(4)])
        assert won.count(True) == 1, (expected, won)
    assert sorted(lake.read(OPS_DECISIONS)["sequence"].to_pylist()) == list(range(4))


def test_an_append_is_refused_when_the_journal_went_on_since_it_was_read(lake: Lake) -> None:
    uri = lake.uri(OPS_DECISIONS)
    for number in range(3):
        expected = number - 1 if number else None
        LocalEngine().append_at(uri, OPS_DECISIONS, decision(number), run="r", writer="journal", expected=expected)
    for stale in (None, 0, 1, 7):
        with pytest.raises(ConflictError, match="read again"):
            LocalEngine().append_at(uri, OPS_DECISIONS, decision(3), run="r", writer="journal", expected=stale)
    assert lake.read(OPS_DECISIONS).num_rows == 3


@pytest.mark.parametrize("retries", [0, 15])
def test_delta_refuses_a_transaction_number_taken_since_the_handle_was_opened(lake: Lake, retries: int) -> None:
    """What `append_at` rests on: should a later delta-rs refresh the handle before it commits, this fails."""
    uri = lake.uri(OPS_DECISIONS)
    LocalEngine().create(uri, OPS_DECISIONS)
    opened = DeltaTable(uri)
    LocalEngine().append_at(uri, OPS_DECISIONS, decision(0), run="r", writer="journal", expected=None)
    assert opened.transaction_version("journal") is None
    taken = CommitProperties(app_transactions=[Transaction("journal", 0)], max_commit_retries=retries)
    with pytest.raises(Exception, match="Failed to commit transaction"):
        write_deltalake(opened, stamped(decision(0), "r"), mode="append", commit_properties=taken)
    assert lake.read(OPS_DECISIONS).num_rows == 1


def test_the_journal_keeps_its_number_through_a_checkpoint(lake: Lake) -> None:
    uri = lake.uri(OPS_DECISIONS)
    LocalEngine().append_at(uri, OPS_DECISIONS, decision(0), run="r", writer="journal", expected=None)
    DeltaTable(uri).create_checkpoint()
    for log in Path(uri, "_delta_log").glob("*.json"):
        if not log.name.endswith("1.json"):
            log.unlink()
    with pytest.raises(ConflictError):
        LocalEngine().append_at(uri, OPS_DECISIONS, decision(0), run="r", writer="journal", expected=None)
    LocalEngine().append_at(uri, OPS_DECISIONS, decision(1), run="r", writer="journal", expected=0)


def test_a_commit_that_came_between_reading_and_committing_is_seen_before_the_merge_is_repeated(lake: Lake) -> None:
    """The other writer commits while this one's batch function runs: the merge is decided anew, on its rows."""
    lake.merge(THINGS, things({"a": "1"}), run="r")
    lake.merge(OTHER_THINGS, things({"a": "old"}), run="r")
    calls = []

    def slow(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        if not calls:
            lake.merge(OTHER_THINGS, things({"late": "1"}), run="other")
        calls.append(1)
        yield from batches

    written = lake.transform(THINGS, slow, OTHER_THINGS, run="t")
    assert len(calls) == 2
    assert (written.inserted, written.updated, written.deleted) == (0, 1, 1)
    assert hashes(lake.read(OTHER_THINGS)) == {"a": "1"}


def test_a_transformation_streams_its_source(lake: Lake) -> None:
    lake.merge(THINGS, things({f"k{i}": "1" for i in range(2500)}), run="r")
    sizes = []

    def watched(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            sizes.append(batch.num_rows)
            yield batch

    assert lake.transform(THINGS, watched, OTHER_THINGS, run="t").inserted == 2500
    assert max(sizes) <= 1000


def test_a_small_merge_into_a_large_table_keeps_only_its_own_keys_in_memory(lake: Lake) -> None:
    lake.merge(THINGS, things({f"k{i}": "1" for i in range(20_000)}), run="r")
    difference = Difference(DeltaTable(lake.uri(THINGS)), THINGS, None, only=things({"k7": "2", "new": "1"}))
    assert len(difference._there) == 1


def test_a_version_that_is_not_there_is_one_sentence(lake: Lake) -> None:
    lake.merge(THINGS, things({"a": "1"}), run="r")
    assert lake.read(THINGS, version=0).num_rows == 0
    with pytest.raises(LakehouseError, match="silver/things"):
        lake.read(THINGS, version=99)


def test_a_feed_that_no_longer_reaches_back_is_one_sentence(lake: Lake) -> None:
    for i in range(4):
        lake.merge(THINGS, things({"a": str(i)}), run="r")
    DeltaTable(lake.uri(THINGS)).create_checkpoint()
    for version in range(3):
        Path(lake.uri(THINGS), "_delta_log", f"{version:020}.json").unlink()
    with pytest.raises(FeedGone, match="no longer reaches back to version 0"):
        lake.changes(THINGS, 0)


def test_a_feed_whose_files_were_removed_is_gone_and_one_that_storage_does_not_give_now_is_not(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake.merge(THINGS, things({"a": "1", "b": "1"}), run="r")
    since = lake.version(THINGS)
    lake.merge(THINGS, things({"a": "2"}), run="r")

    def unavailable(*_: object, **__: object) -> None:
        raise OSError("Generic S3 error: 503 Service Unavailable")

    with monkeypatch.context() as patched:
        patched.setattr(DeltaTable, "load_cdf", unavailable)
        with pytest.raises(LakehouseError, match="503 Service Unavailable") as raised:
            lake.changes(THINGS, since)
    assert not isinstance(raised.value, FeedGone)
    assert lake.changes(THINGS, since).num_rows == 1
    for file in Path(lake.uri(THINGS), "_change_data").rglob("*.parquet"):
        file.unlink()
    with pytest.raises(FeedGone, match=f"no longer reaches back to version {since}"):
        lake.changes(THINGS, since)


@pytest.mark.parametrize(
    ("protocol", "feature"),
    [
        ({"minReaderVersion": 2, "minWriterVersion": 5}, "columnMapping"),
        (
            {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": ["deletionVectors"],
             "writerFeatures": ["deletionVectors"]},
            "deletionVectors",
        ),
        ({"minReaderVersion": 1, "minWriterVersion": 7, "writerFeatures": ["rowTracking", "domainMetadata"]},
         "rowTracking"),
    ],
)  # fmt: skip
def test_a_table_with_a_feature_that_it_does_not_declare_is_refused(
    lake: Lake, protocol: dict[str, object], feature: str
) -> None:
    lake.merge(OTHER_THINGS, things({"a": "1"}), run="r")
    log = Path(lake.uri(OTHER_THINGS), "_delta_log", f"{2:020}.json")
    log.write_text(json.dumps({"protocol": protocol}) + "\n")
    for use in (
        lambda: lake.read(OTHER_THINGS),
        lambda: lake.changes(OTHER_THINGS, 0),
        lambda: lake.merge(OTHER_THINGS, things({"a": "2"}), run="r"),
    ):
        with pytest.raises(LakehouseError, match=f"{feature}.* which it doesn't declare"):
            use()


def test_a_table_that_is_not_delta_is_one_sentence(lake: Lake) -> None:
    log = Path(lake.uri(THINGS), "_delta_log")
    log.mkdir(parents=True)
    (log / f"{0:020}.json").write_text("not JSON\n")
    with pytest.raises(LakehouseError, match="silver/things"):
        lake.read(THINGS)
    with pytest.raises(LakehouseError, match="there is no Delta table"):
        open_table(lake.uri(OTHER_THINGS), OTHER_THINGS)


def test_a_full_disk_is_one_sentence_and_the_table_stays_readable(small_disk: Path) -> None:
    lake = Lake(str(small_disk), "dev", "qa")
    lake.merge(THINGS, things({"a": "1"}), run="r")
    version = lake.version(THINGS)
    fill(small_disk)
    for attempt in (
        lambda: lake.merge(THINGS, things({f"k{i}": "2" for i in range(1000)}), run="r"),
        lambda: lake.merge(OTHER_THINGS, things({"a": "1"}), run="r"),
        lambda: LocalEngine().append_at(
            lake.uri(OPS_DECISIONS), OPS_DECISIONS, decision(0), run="r", writer="journal", expected=None
        ),
    ):
        with pytest.raises(LakehouseError, match=f"the disk that holds {small_disk}.* is full") as raised:
            attempt()
        assert not isinstance(raised.value, ConflictError)
        assert "\n" not in str(raised.value)
    assert lake.version(THINGS) == version
    assert hashes(lake.read(THINGS)) == {"a": "1"}
    (small_disk / "filler").unlink()
    assert lake.merge(THINGS, things({"a": "2"}), run="r").updated == 1
    assert lake.merge(OTHER_THINGS, things({"a": "1"}), run="r").inserted == 1


def test_a_lake_refuses_what_would_break_it(tmp_path: Path) -> None:
    with pytest.raises(LakehouseError, match="ops/decisions can't be committed by Spark"):
        Lake(str(tmp_path), "dev", "qa", spark_tables=frozenset({"ops/decisions"}))
    with pytest.raises(LakehouseError, match="choose a folder without"):
        Lake(f"{tmp_path}/50%20off", "dev", "qa")
