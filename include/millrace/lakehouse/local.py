"""The engine without a JVM: delta-rs, in-process. The default where the input is small."""

import random
import time as clock
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError

from millrace.errors import ConflictError, LakehouseError
from millrace.lakehouse.engine import BatchFunction, Written
from millrace.lakehouse.tables import PROVENANCE, Table

ATTEMPTS = 12
"""Optimistic commits before a conflict is reported; waits grow to about two seconds."""


class LocalEngine:
    """delta-rs. Holds nothing: every call opens the table anew."""

    def create(self, uri: str, table: Table) -> None:
        DeltaTable.create(
            uri,
            schema=table.schema,
            mode="ignore",
            partition_by=list(table.partition_by) or None,
            name=table.path,
            configuration=properties(table),
        )
        opened = DeltaTable(uri)
        for name, condition in table.constraints.items():
            if f"delta.constraints.{name}" not in opened.metadata().configuration:
                opened.alter.add_constraint({name: condition})

    def merge(
        self, uri: str, table: Table, rows: pa.Table, *, run: str, delete_unmatched: str | None = None
    ) -> Written:
        rows = checked(table, rows)
        self.create(uri, table)
        if not rows.num_rows and not delete_unmatched:
            return Written(DeltaTable(uri).version())
        return self._retry(lambda: self._merge_once(uri, table, rows, run, delete_unmatched), table)

    def transform(
        self, source_uri: str, columns: list[str], function: BatchFunction, uri: str, table: Table, *, run: str
    ) -> Written:
        source = DeltaTable(source_uri).to_pyarrow_dataset().to_batches(columns=columns)
        batches = list(function(source))
        rows = pa.Table.from_batches(batches, table.rows_schema)
        return self.merge(uri, table, rows, run=run, delete_unmatched="true")

    def append_at(self, uri: str, table: Table, rows: pa.Table, *, run: str, writer: str, expected: int | None) -> None:
        """Append `rows` only if the last transaction of `writer` on the table is still number `expected`
        (None: there was none); the append is then number `expected + 1`, or 0.

        Raises:
            ConflictError: another append came first.
        """
        self.create(uri, table)
        opened = DeltaTable(uri)
        if opened.transaction_version(writer) != expected:
            raise ConflictError(f"{table.path}: expected transaction {expected} of {writer}; read again and retry")
        next_version = 0 if expected is None else expected + 1
        try:
            write_deltalake(
                opened,
                stamped(checked(table, rows), run),
                mode="append",
                commit_properties=CommitProperties(
                    app_transactions=[Transaction(writer, next_version)], max_commit_retries=0
                ),
            )
        except CommitFailedError as error:
            raise ConflictError(f"{table.path}: another append of {writer} came first ({error})") from error

    def changes(self, uri: str, table: Table, since: int | None) -> pa.Table:
        opened = DeltaTable(uri)
        if since is None:
            rows = opened.to_pyarrow_dataset().to_table().select(table.schema.names).cast(table.schema)
            return rows.append_column("change", pa.array(["upsert"] * rows.num_rows, pa.string()))
        if since >= opened.version():
            return table.schema.append(pa.field("change", pa.string())).empty_table()
        try:
            feed = pa.table(opened.load_cdf(starting_version=since + 1).read_all())
        except DeltaError as error:
            raise LakehouseError(
                f"{table.path}: the change feed no longer reaches back to version {since}; "
                f"forget the reader's cursor to start from the whole table ({error})"
            ) from error
        return net_changes(table, feed)

    def _merge_once(self, uri: str, table: Table, rows: pa.Table, run: str, delete_unmatched: str | None) -> Written:
        opened = DeltaTable(uri)
        rows, unmatched = self._worth_writing(opened, table, rows, delete_unmatched)
        if not rows.num_rows and not unmatched:
            return Written(opened.version())
        names = table.schema.names
        merger = opened.merge(
            stamped(rows, run),
            predicate=" AND ".join(f"target.{k} = source.{k}" for k in table.key),
            source_alias="source",
            target_alias="target",
        )
        if condition := update_condition(table):
            merger = merger.when_matched_update({name: f"source.{name}" for name in names}, predicate=condition)
        merger = merger.when_not_matched_insert({name: f"source.{name}" for name in names})
        if unmatched:
            merger = merger.when_not_matched_by_source_delete(predicate=unmatched)
        metrics = merger.execute()
        return Written(
            opened.version(),
            metrics["num_target_rows_inserted"],
            metrics["num_target_rows_updated"],
            metrics["num_target_rows_deleted"],
        )

    def _worth_writing(
        self, opened: DeltaTable, table: Table, rows: pa.Table, delete_unmatched: str | None
    ) -> tuple[pa.Table, str | None]:
        """Leave out what a merge would not change, so that a repeat commits nothing."""
        compared = [c for c in (*table.key, "content_hash") if c in table.schema.names]
        there = opened.to_pyarrow_dataset().to_table(columns=compared)
        if delete_unmatched:
            # Rows that the condition may delete must stay among the source, or they would be unmatched.
            same = there.num_rows == rows.num_rows and there.select(compared).sort_by(
                [(c, "ascending") for c in compared]
            ) == rows.select(compared).cast(there.schema).sort_by([(c, "ascending") for c in compared])
            return (rows.slice(0, 0), None) if same else (rows, delete_unmatched)
        known = set(zip(*(there[c].to_pylist() for c in compared), strict=True))
        mask = [key not in known for key in zip(*(rows[c].to_pylist() for c in compared), strict=True)]
        return rows.filter(pa.array(mask, pa.bool_())), None

    def _retry(self, commit: Callable[[], Written], table: Table) -> Written:
        for attempt in range(ATTEMPTS):
            try:
                return commit()
            except CommitFailedError as error:
                if attempt == ATTEMPTS - 1:
                    raise ConflictError(
                        f"{table.path}: lost {ATTEMPTS} commits in a row to other writers ({error}); retry later"
                    ) from error
                clock.sleep(min(2.0, 0.05 * 2**attempt) * random.random())
            except DeltaError as error:
                raise LakehouseError(f"{table.path}: the rows were refused: {error}") from error
        raise AssertionError("unreachable")


def properties(table: Table) -> dict[str, str | None]:
    """Delta table properties of a declared table, for either engine."""
    days = f"interval {table.retention_days} days"
    return {
        "delta.enableChangeDataFeed": "true" if table.change_feed else "false",
        "delta.logRetentionDuration": days,
        "delta.deletedFileRetentionDuration": days,
    }


def update_condition(table: Table) -> str | None:
    """When a matched row is rewritten; None: never (the key holds the whole content)."""
    if "content_hash" not in table.schema.names:
        return None
    changed = "target.content_hash <> source.content_hash"
    if "events_seen" in table.schema.names:
        return f"{changed} AND source.events_seen >= target.events_seen"
    return changed


def checked(table: Table, rows: pa.Table) -> pa.Table:
    """`rows` in the declared schema.

    Raises:
        LakehouseError: columns, types or nulls don't fit, or a key occurs twice.
    """
    try:
        rows = rows.select(table.rows_schema.names).cast(table.rows_schema)
    except (KeyError, pa.ArrowInvalid, ValueError) as error:
        raise LakehouseError(f"{table.path}: rows don't fit the declared schema: {error}") from None
    for column in table.columns:
        if not column.nullable and rows[column.name].null_count:
            raise LakehouseError(f"{table.path}: column {column.name} must not be null")
    if rows.num_rows and rows.group_by(list(table.key)).aggregate([]).num_rows != rows.num_rows:
        raise LakehouseError(f"{table.path}: a key ({', '.join(table.key)}) occurs twice among the rows")
    return rows


def stamped(rows: pa.Table, run: str) -> pa.Table:
    """`rows` with provenance."""
    values = (run, version("millrace"), datetime.now(UTC))
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
