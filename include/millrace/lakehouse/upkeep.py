"""Keeping a table small and quick: many small files become few, and files that nobody can need any more go.

What may still be needed is counted by time: the declared retention, and back to the oldest version that a reader of
the change feed or an index build names, as long as Delta's log knows it: until the first checkpoint after the
retention. Content, change feed within that time and the journal's numbers stay as they
are. Safe beside writers: a compaction that loses to one is tried again.
"""

import logging
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pyarrow.compute as pc
from deltalake import DeltaTable

from millrace.lakehouse.commits import open_table
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_CURSORS, Table

log = logging.getLogger("millrace.lakehouse")

MARGIN = timedelta(hours=1)
"""Between two clocks, and for a reader that is at work."""


@dataclass(frozen=True)
class Kept:
    """What one round did to a table."""

    table: str
    files_before: int
    files: int
    removed: int
    """Files of the past that went."""
    kept_hours: float
    """How far back the past still reaches."""


def keep_up(lake: Lake, table: Table, *, needed: int | None = None, now: datetime | None = None) -> Kept:
    """Compact `table`, then remove files of versions older than its retention.

    Args:
        needed: the oldest version that something other than a cursor still names; None: nothing does.

    Raises:
        LakehouseError: the table can't be read, or the disk refused.
    """
    now = now or datetime.now(UTC)
    uri = lake.own_uri(table)
    before = open_table(uri, table)
    versions = [version for version in (needed, _slowest_reader(lake, table)) if version is not None]
    age = _age(before, min(versions), now) if versions else timedelta()
    kept = max(timedelta(days=table.retention_days), age + MARGIN)
    removed = lake.engine(table).tidy(uri, table, kept)
    after = open_table(uri, table)
    return Kept(table.path, len(before.file_uris()), len(after.file_uris()), removed, kept.total_seconds() / 3600)


def _slowest_reader(lake: Lake, table: Table) -> int | None:
    rows = lake.read(OPS_CURSORS, ["version"], where=pc.field("table") == table.path)
    return min(rows["version"].to_pylist(), default=None)


def _age(opened: DeltaTable, version: int, now: datetime) -> timedelta:
    """How long ago `version` was followed by another; nothing, if it is the newest."""
    if version >= opened.version():
        return timedelta()
    followed = [commit["timestamp"] for commit in opened.history() if commit.get("version", -1) == version + 1]
    if not followed:
        # Delta's log keeps as many days as the table; what it has forgotten can't be read, whatever files there are.
        log.warning("%s: version %d is still named, and its log is gone", opened.table_uri, version)
        return timedelta()
    return now - datetime.fromtimestamp(followed[0] / 1000, UTC)
