"""A deleted row is gone: from every file, the change feed and the log, whichever engine committed."""

from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import CommitProperties
from deltalake.exceptions import DeltaError
from pyarrow.fs import FileSelector, FileSystem, FileType

from millrace.errors import LakehouseError
from millrace.lakehouse import forgetting
from millrace.lakehouse.commits import open_table
from millrace.lakehouse.forgetting import forget_removed
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.storage import files_for_upkeep
from millrace.lakehouse.tables import OPS_AUDIT, OPS_DECISIONS, SILVER_FEEDBACK

SECRET = "the canary of ann"


def feedback(number: int, user: str) -> dict[str, Any]:
    return {
        "completion_id": f"completion {number}",
        "content_hash": str(number),
        "events_seen": 1,
        "occurred_at": datetime.now(UTC),
        "date": date(2026, 11, 20 + number % 2),
        "user": user,
        "simulated": False,
        "rating": 0.1,
        "comment": f"the canary of {user}",
        "correction": None,
        "question": f"the canary of {user}, asked",
        "answer": None,
        "release_id": "r",
        "release_version": "1",
        "index_build": "b",
    }


def write(lake: Lake, *rows: dict[str, Any]) -> None:
    lake.merge(SILVER_FEEDBACK, pa.Table.from_pylist(list(rows), schema=SILVER_FEEDBACK.rows_schema), run="test")


def holders(files: FileSystem, secret: str) -> list[str]:
    """The files in which a text is, as bytes or, of Parquet, as a value."""
    found = []
    for info in files.get_file_info(FileSelector("", recursive=True)):
        if info.type != FileType.File:
            continue
        with files.open_input_stream(info.path) as stream:
            content = stream.read()
        parquet = info.path.endswith(".parquet") and content[:4] == b"PAR1"
        values = str(pq.ParquetFile(pa.BufferReader(content)).read().to_pylist()) if parquet else ""
        if secret.encode() in content or secret in values:
            found.append(info.path)
    return sorted(found)


def test_what_was_deleted_is_in_no_file_and_everything_else_is_as_it_was(lake: Lake) -> None:
    write(lake, feedback(1, "ann"), feedback(2, "bob"))
    write(lake, feedback(3, "ann"))
    write(lake, feedback(4, "bob"), feedback(1, "ann") | {"content_hash": "changed", "events_seen": 2})
    uri = lake.uri(SILVER_FEEDBACK)
    files = files_for_upkeep(uri)
    assert lake.delete(SILVER_FEEDBACK, "user", ["ann", "o'brien"]) == 2
    before = holders(files, SECRET)
    assert any("_change_data" in name for name in before)
    assert any("_delta_log" in name for name in before)

    assert forget_removed(uri, SILVER_FEEDBACK) > 0
    assert holders(files, SECRET) == []
    assert len(holders(files, "the canary of bob")) >= 1
    rows = lake.read(SILVER_FEEDBACK)
    assert sorted(rows["completion_id"].to_pylist()) == ["completion 2", "completion 4"]

    # The engine that owns the table goes on, and the other reads what it does.
    write(lake, feedback(5, "bob"))
    write(lake, feedback(2, "bob") | {"content_hash": "changed", "events_seen": 2})
    assert lake.read(SILVER_FEEDBACK).num_rows == 3
    assert lake.changes(SILVER_FEEDBACK, lake.version(SILVER_FEEDBACK) - 1).num_rows == 1  # type: ignore[operator]
    lake.engine(SILVER_FEEDBACK).tidy(uri, SILVER_FEEDBACK, timedelta(days=30))
    assert lake.read(SILVER_FEEDBACK).num_rows == 3
    assert lake.delete(SILVER_FEEDBACK, "user", ["ann"]) == 0


def test_doing_it_again_changes_nothing(lake: Lake) -> None:
    write(lake, feedback(1, "ann"), feedback(2, "bob"))
    lake.delete(SILVER_FEEDBACK, "user", ["ann"])
    uri = lake.uri(SILVER_FEEDBACK)
    forget_removed(uri, SILVER_FEEDBACK)
    version = lake.version(SILVER_FEEDBACK)
    assert forget_removed(uri, SILVER_FEEDBACK) == 0
    assert lake.version(SILVER_FEEDBACK) == version


@pytest.mark.parametrize("folder", ["", "_change_data/"])
def test_a_file_that_nobody_committed_goes_once_nobody_can_be_about_to(
    lake: Lake, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    write(lake, feedback(1, "bob"))
    uri = lake.uri(SILVER_FEEDBACK)
    forget_removed(uri, SILVER_FEEDBACK)
    files = files_for_upkeep(uri)
    name = f"{folder}part-of-a-commit-that-lost.parquet"
    with closing(files.handler._handler.open_output_stream(name)) as stream:
        stream.write(SECRET.encode())
    assert forget_removed(uri, SILVER_FEEDBACK) == 0
    assert holders(files, SECRET) == [name]
    monkeypatch.setattr(forgetting, "UNCOMMITTED", timedelta(seconds=-5))  # as if hours had passed
    assert forget_removed(uri, SILVER_FEEDBACK) == 1
    assert holders(files, SECRET) == []
    assert lake.read(SILVER_FEEDBACK).num_rows == 1


def test_a_writer_that_holds_an_older_version_still_loses(lake: Lake) -> None:
    """Log entries that were removed would let it commit under a number that was taken."""
    write(lake, feedback(1, "ann"), feedback(2, "bob"))
    uri = lake.uri(SILVER_FEEDBACK)
    stale = open_table(uri, SILVER_FEEDBACK)
    lake.delete(SILVER_FEEDBACK, "user", ["ann"])
    forget_removed(uri, SILVER_FEEDBACK)
    version = lake.version(SILVER_FEEDBACK)
    with pytest.raises((DeltaError, OSError)):
        stale.delete("true", commit_properties=CommitProperties(max_commit_retries=0))
    assert (lake.version(SILVER_FEEDBACK), lake.read(SILVER_FEEDBACK).num_rows) == (version, 1)


def test_an_append_only_table_deletes_nothing(lake: Lake) -> None:
    with pytest.raises(LakehouseError, match="declared append-only"):
        lake.delete(OPS_AUDIT, "actor", ["person/ann"])
    assert not lake.exists(OPS_DECISIONS)
    assert lake.delete(OPS_DECISIONS, "actor", ["ann"]) == 0
