"""The engine without a JVM: delta-rs, in-process. The default where the input is small.

A commit here is made on the very version of the table that was read to decide it, or not at all: another
writer's commit in between makes it a conflict, and it is decided anew.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import chain

import pyarrow as pa
import pyarrow.fs as pafs
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import DeltaError

from millrace.errors import ConflictError, FeedGone, LakehouseError
from millrace.lakehouse.commits import dataset_of, open_table, refusal, retried
from millrace.lakehouse.difference import Difference
from millrace.lakehouse.engine import BatchFunction, Written
from millrace.lakehouse.rows import checked, net_changes, properties, same_key, stamped, typed, update_condition
from millrace.lakehouse.storage import delta_options, files_for_upkeep
from millrace.lakehouse.tables import Table

BATCH = 1000
"""Rows that a batch function is given at once, as on Spark."""

_DOOMED = "_doomed"
"""Column of a merge's source: true for a row that only says which key to delete."""


REMOVED = ("Invalid table version", "not found", "No such file", "NoSuchKey")
"""What delta-rs says of a version or a file that is there no more."""


class LocalEngine:
    """delta-rs. Holds nothing: every call opens the table anew."""

    def create(self, uri: str, table: Table) -> None:
        retried(lambda: self._create_once(uri, table))

    def merge(
        self, uri: str, table: Table, rows: pa.Table, *, run: str, delete_unmatched: str | None = None
    ) -> Written:
        rows = checked(table, rows)
        self.create(uri, table)

        def once() -> Written:
            opened = open_table(uri, table)
            if not rows.num_rows and not delete_unmatched:
                return Written(opened.version())
            difference = Difference(opened, table, delete_unmatched, only=rows)
            return _commit(opened, uri, table, difference, iter([rows]), run, delete_unmatched)

        return retried(once)

    def transform(
        self, source_uri: str, columns: list[str], function: BatchFunction, uri: str, table: Table, *, run: str
    ) -> Written:
        self.create(uri, table)

        def once() -> Written:
            opened = open_table(uri, table)
            options = delta_options(source_uri)
            if not DeltaTable.is_deltatable(source_uri, options):
                raise LakehouseError(
                    f"{table.path}: its source {source_uri} is not there; run the stage that writes it"
                )
            source = dataset_of(DeltaTable(source_uri, storage_options=options), source_uri).to_batches(
                columns=columns, batch_size=BATCH
            )
            rows = (typed(table, pa.Table.from_batches([batch])) for batch in function(source))
            return _commit(opened, uri, table, Difference(opened, table, "true"), rows, run, "true")

        return retried(once)

    def append_at(self, uri: str, table: Table, rows: pa.Table, *, run: str, writer: str, expected: int | None) -> None:
        """Append `rows` only if the last transaction of `writer` on the table is still number `expected`
        (None: there was none); the append is then number `expected + 1`, or 0.

        Raises:
            ConflictError: another append came first, or the table changed meanwhile.
        """
        rows = stamped(checked(table, rows), run)
        self.create(uri, table)
        opened = open_table(uri, table)
        # Read from the handle that then commits: what it has not seen makes its commit fail.
        if opened.transaction_version(writer) != expected:
            raise ConflictError(f"{table.path}: expected transaction {expected} of {writer}; read again and retry")
        following = Transaction(writer, 0 if expected is None else expected + 1)
        properties = CommitProperties(app_transactions=[following], max_commit_retries=0)
        try:
            write_deltalake(opened, rows, mode="append", commit_properties=properties)
        except (DeltaError, OSError) as error:
            raise refusal(table, uri, error) from error

    def changes(self, uri: str, table: Table, since: int | None) -> pa.Table:
        opened = open_table(uri, table)
        if since is None:
            rows = dataset_of(opened, uri).to_table().select(table.schema.names).cast(table.schema)
            return rows.append_column("change", pa.array(["upsert"] * rows.num_rows, pa.string()))
        if since >= opened.version():
            return table.schema.append(pa.field("change", pa.string())).empty_table()
        try:
            feed = pa.table(opened.load_cdf(starting_version=since + 1, ending_version=opened.version()).read_all())
        except Exception as error:  # a file that isn't there is a bare Exception of delta-rs
            if not any(sign in str(error) for sign in REMOVED):
                raise refusal(table, uri, error, "read") from error
            raise FeedGone(
                f"{table.path}: the change feed no longer reaches back to version {since}; "
                f"forget the reader's cursor to start from the whole table ({error})"
            ) from error
        return net_changes(table, feed)

    def delete(self, uri: str, table: Table, condition: str) -> int:
        def once() -> int:
            opened = open_table(uri, table)
            try:
                # On the version that was read, or not at all.
                return int(
                    opened.delete(condition, commit_properties=CommitProperties(max_commit_retries=0)).get(
                        "num_deleted_rows", 0
                    )
                )
            except (DeltaError, OSError) as error:
                raise refusal(table, uri, error) from error

        return retried(once)

    def tidy(self, uri: str, table: Table, kept: timedelta) -> int:
        retried(lambda: _compact(uri, table))
        return _vacuum(uri, table, kept) + _forget_changes(uri, table, datetime.now(UTC) - kept)

    def _create_once(self, uri: str, table: Table) -> None:
        opened = create_empty(uri, table)
        try:
            for name, condition in missing_constraints(opened, table).items():
                opened.alter.add_constraint({name: condition})
        except (DeltaError, OSError) as error:
            if "already exists" in str(error):
                raise ConflictError(f"{table.path}: another writer added the constraint ({error})") from error
            raise refusal(table, uri, error) from error


def create_empty(uri: str, table: Table) -> DeltaTable:
    """The table at `uri`, created without its constraints if it isn't there: one commit, whole or not at all.

    Raises:
        ConflictError: somebody else creates it at this moment.
    """
    try:
        if not DeltaTable.is_deltatable(uri, delta_options(uri)):
            DeltaTable.create(
                uri,
                schema=table.schema,
                mode="error",
                partition_by=list(table.partition_by) or None,
                name=table.path,
                configuration=properties(table),
                raise_if_key_not_exists=False,  # one property is ours, not Delta's
                storage_options=delta_options(uri),
                # With retries, the loser of a race would commit its own empty metadata over the winner's.
                commit_properties=CommitProperties(max_commit_retries=0),
            )
    except (DeltaError, OSError) as error:
        if "already exists" in str(error):
            raise ConflictError(f"{table.path}: another writer is creating it ({error})") from error
        raise refusal(table, uri, error) from error
    return open_table(uri, table)


def missing_constraints(opened: DeltaTable, table: Table) -> dict[str, str]:
    """Declared constraints that the table at hand doesn't have (yet)."""
    there = opened.metadata().configuration
    return {name: sql for name, sql in table.constraints.items() if f"delta.constraints.{name}" not in there}


def _compact(uri: str, table: Table) -> None:
    try:
        open_table(uri, table).optimize.compact(commit_properties=CommitProperties(max_commit_retries=0))
    except (DeltaError, OSError) as error:
        raise refusal(table, uri, error, "tidy") from error


def _vacuum(uri: str, table: Table, kept: timedelta) -> int:
    hours = int(kept.total_seconds() // 3600)
    opened = open_table(uri, table)
    try:
        doomed = opened.vacuum(retention_hours=hours, dry_run=True, enforce_retention_duration=False)
        # delta-rs lists what went long ago too, and would commit for it every time.
        infos = files_for_upkeep(uri).get_file_info(doomed) if doomed else []
        there = sum(info.type == pafs.FileType.File for info in infos)
        if there:
            opened.vacuum(retention_hours=hours, dry_run=False, enforce_retention_duration=False)
    except (DeltaError, OSError) as error:
        raise refusal(table, uri, error, "tidy") from error
    return there


def _forget_changes(uri: str, table: Table, before: datetime) -> int:
    """Remove the change feed's files from before `before`: delta-rs's vacuum leaves them for ever."""
    files = files_for_upkeep(uri)
    try:
        found = files.get_file_info(pafs.FileSelector("_change_data", allow_not_found=True, recursive=True))
        gone = [info.path for info in found if info.path.endswith(".parquet") and info.mtime < before]
        for path in gone:
            files.delete_file(path)
    except (DeltaError, OSError) as error:
        raise refusal(table, uri, error, "tidy") from error
    return len(gone)


def _commit(
    opened: DeltaTable,
    uri: str,
    table: Table,
    difference: Difference,
    batches: Iterator[pa.Table],
    run: str,
    delete_unmatched: str | None,
) -> Written:
    """Merge what differs into `opened`, streaming, at its version or not at all.

    Raises:
        ConflictError: somebody committed since `opened` was opened.
    """
    source = _Guarded(_source(table, difference, batches, run))
    first = next(source, None)
    if first is None:
        return Written(opened.version())
    names = table.schema.names
    try:
        merger = opened.merge(
            pa.RecordBatchReader.from_batches(first.schema, chain([first], source)),
            predicate=" AND ".join(filter(None, (same_key(table), difference.within))),
            source_alias="source",
            target_alias="target",
            commit_properties=CommitProperties(max_commit_retries=0),
        )
        if delete_unmatched:
            merger = merger.when_matched_delete(predicate=f"source.{_DOOMED}")
        if condition := update_condition(table):
            merger = merger.when_matched_update(
                {f"`{name}`": f"source.`{name}`" for name in names}, predicate=f"NOT source.{_DOOMED} AND {condition}"
            )
        merger = merger.when_not_matched_insert(
            {f"`{name}`": f"source.`{name}`" for name in names}, predicate=f"NOT source.{_DOOMED}"
        )
        metrics = merger.execute()
    except (DeltaError, OSError) as error:
        if source.failure:
            raise source.failure from None
        raise refusal(table, uri, error) from error
    return Written(
        opened.version(),
        metrics["num_target_rows_inserted"],
        metrics["num_target_rows_updated"],
        metrics["num_target_rows_deleted"],
    )


def _source(table: Table, difference: Difference, batches: Iterator[pa.Table], run: str) -> Iterator[pa.RecordBatch]:
    """What differs, as record batches of the table's schema and `_doomed`; the keys to delete come last."""
    schema = pa.schema([*(field.with_nullable(True) for field in table.schema), pa.field(_DOOMED, pa.bool_())])
    at = datetime.now(UTC)
    for rows in difference.changed(batches):
        kept = stamped(rows, run, at)
        yield from kept.append_column(_DOOMED, pa.array([False] * kept.num_rows)).cast(schema).to_batches()
    doomed = difference.doomed()
    columns = [
        doomed[field.name] if field.name in table.key else pa.nulls(doomed.num_rows, field.type)
        for field in table.schema
    ]
    yield from pa.table([*columns, pa.array([True] * doomed.num_rows, pa.bool_())], schema=schema).to_batches()


class _Guarded:
    """An iterator that remembers what it raised: delta-rs turns an exception of its source into text."""

    def __init__(self, source: Iterator[pa.RecordBatch]) -> None:
        self._source = source
        self.failure: Exception | None = None

    def __iter__(self) -> "_Guarded":
        return self

    def __next__(self) -> pa.RecordBatch:
        try:
            return next(self._source)
        except StopIteration:
            raise
        except Exception as error:
            self.failure = error
            raise
