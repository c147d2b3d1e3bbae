"""What both engines ask of rows and of a declared table: do they fit, who wrote them, when is a row rewritten, and
what a change feed comes to. Pure: it reads no table and knows no engine.
"""

from datetime import UTC, datetime
from importlib.metadata import version

import pyarrow as pa
import pyarrow.compute as pc

from millrace import FORMAT_VERSION
from millrace.errors import LakehouseError
from millrace.lakehouse.tables import PROVENANCE, Table

FORMAT_PROPERTY = "millrace.format"
"""Delta table property: the format version of the table's rows."""


def properties(table: Table) -> dict[str, str | None]:
    """Delta table properties of a declared table, for either engine."""
    days = f"interval {table.retention_days} days"
    append_only: dict[str, str | None] = {"delta.appendOnly": "true"} if table.append_only else {}
    return append_only | {
        "delta.enableChangeDataFeed": "true" if table.change_feed else "false",
        "delta.logRetentionDuration": days,
        "delta.deletedFileRetentionDuration": days,
        FORMAT_PROPERTY: str(FORMAT_VERSION),
    }


def same_key(table: Table) -> str:
    """SQL: `source` and `target` are the same row."""
    return " AND ".join(f"target.`{name}` = source.`{name}`" for name in table.key)


def update_condition(table: Table) -> str | None:
    """SQL: when a matched row is rewritten; None: never (the key holds the whole content)."""
    if "content_hash" not in table.schema.names:
        return None
    changed = "target.content_hash <> source.content_hash"
    if "events_seen" in table.schema.names:
        return f"{changed} AND source.events_seen >= target.events_seen"
    return changed


def comparable(table: Table) -> list[str]:
    """The columns that decide whether a row is rewritten: key, and content hash and events seen where there are."""
    return [*table.key, *(name for name in ("content_hash", "events_seen") if name in table.schema.names)]


def checked(table: Table, rows: pa.Table) -> pa.Table:
    """`rows` in the declared schema.

    Raises:
        LakehouseError: columns, types or nulls don't fit, or a key occurs twice.
    """
    rows = typed(table, rows)
    if rows.num_rows and rows.group_by(list(table.key)).aggregate([]).num_rows != rows.num_rows:
        raise LakehouseError(f"{table.path}: a key ({', '.join(table.key)}) occurs twice among the rows")
    return rows


def typed(table: Table, rows: pa.Table) -> pa.Table:
    """`rows` in the declared schema, keys unchecked.

    Raises:
        LakehouseError: columns, types or nulls don't fit.
    """
    wanted = table.rows_schema
    try:
        # Arrow takes a null for a column that may have none: that is asked of the values, below.
        nullable = pa.schema([field.with_nullable(True) for field in wanted])
        rows = rows.select(wanted.names).cast(nullable)
    except (KeyError, pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise LakehouseError(f"{table.path}: rows don't fit the declared schema: {error}") from None
    for column in table.columns:
        if not column.nullable and rows[column.name].null_count:
            raise LakehouseError(f"{table.path}: column {column.name} must not be null")
    return rows.cast(wanted)


def stamped(rows: pa.Table, run: str, at: datetime | None = None) -> pa.Table:
    """`rows` with provenance: written by `run`, by this version of the code, `at` (None: now)."""
    values = (run, version("millrace"), at or datetime.now(UTC))
    for field, value in zip(PROVENANCE, values, strict=True):
        rows = rows.append_column(field, pa.array([value] * rows.num_rows, field.type))
    return rows


def net_changes(table: Table, feed: pa.Table) -> pa.Table:
    """The last state of each key in a change feed: `upsert` or `delete`."""
    wanted = table.schema.append(pa.field("_change_type", pa.string())).append(pa.field("_commit_version", pa.int64()))
    feed = feed.select(wanted.names).cast(wanted)
    feed = feed.filter(pc.not_equal(feed["_change_type"], "update_preimage"))
    # Within one version a rewritten key shows delete and insert: the insert is what remains.
    rank = pc.if_else(pc.equal(feed["_change_type"], "delete"), 0, 1)
    feed = feed.append_column("_rank", rank).sort_by([("_commit_version", "ascending"), ("_rank", "ascending")])
    last = {key: i for i, key in enumerate(zip(*(feed[k].to_pylist() for k in table.key), strict=True))}
    feed = feed.take(pa.array(sorted(last.values()), pa.int64()))
    change = pc.if_else(pc.equal(feed["_change_type"], "delete"), "delete", "upsert")
    return feed.select(table.schema.names).append_column("change", change)
