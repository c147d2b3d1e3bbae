"""Small tables and rows for the tests of this folder, and what other processes and Spark's workers run."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from millrace.applications import Chunking
from millrace.errors import ConflictError, LakehouseError
from millrace.lakehouse.audit.chain import Event, record
from millrace.lakehouse.cursors import move_cursor
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.local import LocalEngine
from millrace.lakehouse.storage import ObjectStore
from millrace.lakehouse.tables import (
    OPS_DECISIONS,
    VECTOR,
    Table,
    count,
    flag,
    number,
    text,
)
from millrace.lakehouse.tables import time as time_column
from millrace.retrieval.chunk import chunk_documents
from millrace.settings import Settings

THINGS = Table(
    "silver", "things", (text("key"), text("content_hash"), count("size")), key=("key",), change_feed=True,
    constraints={"size_not_negative": "size >= 0"},
)  # fmt: skip
OTHER_THINGS = Table("gold", "other_things", THINGS.columns, key=("key",), change_feed=True)
COUNTED = Table("silver", "counted", (text("key"), text("content_hash"), count("events_seen")), key=("key",))
EVERYTHING = Table(
    "silver",
    "everything",
    (
        text("key"),
        text("content_hash"),
        text("user", nullable=True),
        count("position", nullable=True),
        number("rating", nullable=True),
        flag("simulated", nullable=True),
        time_column("at", nullable=True),
        pa.field("date", pa.date32(), nullable=False),
        pa.field("content", pa.binary(), nullable=True),
        pa.field("vector", VECTOR, nullable=True),
        pa.field("citations", pa.list_(pa.string()), nullable=False),
    ),
    key=("key", "date"),
    partition_by=("date",),
    change_feed=True,
)


def things(hashes: dict[str, str], size: int = 1) -> pa.Table:
    """Rows of THINGS: key → content hash."""
    return pa.Table.from_pylist(
        [{"key": key, "content_hash": value, "size": size} for key, value in hashes.items()],
        schema=THINGS.rows_schema,
    )


def hashes(rows: pa.Table) -> dict[str, str]:
    """What `things` was given."""
    found = dict(zip(rows["key"].to_pylist(), rows["content_hash"].to_pylist(), strict=True))
    assert len(found) == rows.num_rows, "a key occurs twice"
    return found


def decision(sequence: int) -> pa.Table:
    """One row of the journal."""
    row = dict.fromkeys(OPS_DECISIONS.rows_schema.names)
    row |= {"sequence": sequence, "decided_at": 0, "kind": "hold", "actor": "test", "reason": "none"}
    row |= {"share": 0.0, "evidence": "{}", "simulated": True}
    return pa.Table.from_pylist([row], schema=OPS_DECISIONS.rows_schema)


def happened(event_id: str, **changes: Any) -> Event:
    """Something for the audit trail."""
    told = {
        "occurred_at": datetime(2026, 11, 25, 12, tzinfo=UTC),
        "actor": "service/controller",
        "action": "decision",
        "application": "qa",
        "resource": "rollout",
        "outcome": "hold",
        "run": "test",
    }
    return Event(event_id=event_id, **told | changes)


def fill(folder: Path) -> None:
    """Leave no byte free on the disk that holds `folder`."""
    with (folder / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))


def doubled(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Each thing with twice its size."""
    for batch in batches:
        rows = [
            row | {"size": row["size"] * 2, "content_hash": f"2x{row['content_hash']}"} for row in batch.to_pylist()
        ]
        yield pa.RecordBatch.from_pylist(rows, schema=OTHER_THINGS.rows_schema)


def labelled(batches: Iterator[pa.RecordBatch], chunking: Chunking) -> Iterator[pa.RecordBatch]:
    """Each thing with what a declaration says."""
    for batch in batches:
        rows = [row | {"content_hash": str(chunking.max_words)} for row in batch.to_pylist()]
        yield pa.RecordBatch.from_pylist(rows, schema=OTHER_THINGS.rows_schema)


def repeated(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        yield batch
        yield batch


def unfit(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        yield batch.drop_columns(["size"])


def failing(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        yield batch
        raise ValueError("the moon is in the wrong house")


def sleeping(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        time.sleep(60)
        yield batch


def witnessed(
    batches: Iterator[pa.RecordBatch], chunking: Chunking, log: Path, pause: float = 0.0
) -> Iterator[pa.RecordBatch]:
    """Chunks of documents. Each task first says on which worker of a Spark cluster it runs; `pause` is in seconds."""
    folders = Path.cwd().parts  # …/worker-1/applications/app-…/0
    with log.open("a") as file:
        file.write(f"{next((one for one in folders if one.startswith('worker-')), 'no-worker')}\n")
    time.sleep(pause)
    yield from chunk_documents(batches, chunking)


def sentences(number: int) -> str:
    """A hundred words of their own."""
    return " ".join(f"word{number}x{n}" for n in range(100))


# What the processes of the concurrency tests run: begin at the same moment, say what happened.


def merge_often(
    root: str, writer: int, times: int, start: float, spark_url: str = "", store: ObjectStore | None = None
) -> list[str]:
    """Each time insert a key of its own and rewrite a key that all writers share."""
    spark_tables = frozenset({THINGS.path} if spark_url else ())
    lake = Lake(root, "dev", "qa", store=store, spark_url=spark_url, spark_tables=spark_tables)
    _wait_until(start)
    for i in range(times):
        lake.merge(THINGS, things({f"{writer}-{i}": "x", "shared": f"{writer}-{i}"}), run=f"writer {writer}")
    return [f"{writer}-{i}" for i in range(times)]


def count_things(root: str, store: ObjectStore) -> int:
    return Lake(root, "dev", "qa", store=store).read(THINGS, ["key"]).num_rows


def merge_same(root: str, writer: int, start: float) -> tuple[int, int]:
    """Everybody the same new rows: (inserted, updated) of this writer."""
    _wait_until(start)
    written = Lake(root, "dev", "qa").merge(THINGS, things({f"k{i}": "x" for i in range(50)}), run=f"writer {writer}")
    return written.inserted, written.updated


def append_decision(uri: str, expected: int | None, writer: int, start: float) -> bool:
    """Whether this append won."""
    rows = decision(0 if expected is None else expected + 1)
    _wait_until(start)
    try:
        LocalEngine().append_at(uri, OPS_DECISIONS, rows, run=f"{writer}", writer="journal", expected=expected)
    except ConflictError:
        return False
    return True


def move(root: str, versions: Sequence[int], start: float) -> None:
    _wait_until(start)
    for version in versions:
        move_cursor(Lake(root, "dev", "qa"), "reader", THINGS, version, run="r")


def record_often(settings: Settings, writer: int, times: int, start: float) -> int:
    """Append events of its own and one that all writers tell, each time: how many entries this writer made."""
    _wait_until(start)
    return sum(
        record(settings, [happened(f"{writer}-{i}"), happened(f"shared-{i}")], run=f"writer {writer}")
        for i in range(times)
    )


def create_and_break(uri: str, writer: int, start: float) -> str:
    """Create the table while others do, then write a row that its constraint forbids: what was said."""
    _wait_until(start)
    LocalEngine().create(uri, THINGS)
    try:
        LocalEngine().merge(uri, THINGS, things({f"{writer}": "x"}, size=-1), run="r")
    except LakehouseError as error:
        return str(error)
    return ""


def _wait_until(start: float) -> None:
    time.sleep(max(0.0, start - time.time()))
