"""One application's tables in one environment: reading them, and committing through the engine that owns each.

Any engine reads any table; only one commits to it, because Spark and delta-rs don't honour each other's
locks. Which one is a setting (`Settings.spark_tables`). Every write here is safe to repeat.
"""

from collections.abc import Iterable, Iterator
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from millrace.errors import LakehouseError
from millrace.lakehouse.commits import dataset_of, open_table, refusal
from millrace.lakehouse.engine import BatchFunction, Engine, Written
from millrace.lakehouse.local import LocalEngine
from millrace.lakehouse.places import owner
from millrace.lakehouse.storage import Location, ObjectStore, delta_options, store_of
from millrace.lakehouse.tables import Table
from millrace.settings import Settings


class Lake:
    """The tables of `application` in `environment`, or in a place beside them, under `root`: a folder, or where `store`
    has the lake."""

    def __init__(
        self,
        root: str,
        environment: str,
        application: str,
        *,
        store: ObjectStore | None = None,
        spark_url: str = "",
        spark_tables: frozenset[str] = frozenset(),
        writer: str = "",
    ) -> None:
        """
        Args:
            writer: the environment that this process works in, where these tables may be another's: those it only
                reads.
        """
        journals = sorted(path for path in spark_tables if path.startswith("ops/"))
        if journals:
            raise LakehouseError(
                f"{', '.join(journals)} can't be committed by Spark: journals and cursors rest on delta-rs refusing a "
                "commit on a version that is no longer the newest; take them out of MILLRACE_SPARK_TABLES"
            )
        if "%" in root:
            raise LakehouseError(f"a lake can't be in {root}: delta-rs decodes its %; choose a folder without one")
        self.root = root
        self.environment = environment
        self.application = application
        self._store = store
        self._spark_url = spark_url
        self._spark_tables = spark_tables
        self._writer = writer or owner(environment)

    @classmethod
    def of(cls, settings: Settings, application: str, *, environment: str = "") -> "Lake":
        """
        Args:
            environment: another one, whose tables this environment only reads, or a place beside them; empty: its own.
        """
        return cls(
            settings.lake,
            environment or settings.environment,
            application,
            store=store_of(settings),
            spark_url=settings.spark_connection,
            spark_tables=settings.spark_tables,
            writer=settings.environment,
        )

    def uri(self, table: Table) -> Location:
        return Location(f"{self.root}/{self.environment}/{self.application}/{table.path}", self._store)

    def own_uri(self, table: Table) -> Location:
        """`uri`, for whoever commits to it.

        Raises:
            LakehouseError: the table is another environment's. This wall is code; the one that nobody walks around is
                the object store's, by credential.
        """
        if self._writer != owner(self.environment):
            raise LakehouseError(
                f"{self._writer} may not write {table.path} of {self.application} in {self.environment} "
                f"({self.uri(table)}): an environment writes its own tables only; what {self.environment} shall have, "
                "its own stages bring"
            )
        return self.uri(table)

    def engine(self, table: Table) -> Engine:
        """The engine that commits to `table` in this deployment."""
        if table.path in self._spark_tables:
            from millrace.lakehouse.spark import SparkEngine

            return SparkEngine(self._spark_url)
        return LocalEngine()

    def exists(self, table: Table) -> bool:
        try:
            return DeltaTable.is_deltatable(uri := self.uri(table), delta_options(uri))
        except (DeltaError, OSError) as error:
            raise refusal(table, uri, error, "read") from error

    def version(self, table: Table) -> int | None:
        """Current Delta version; None while the table doesn't exist."""
        return open_table(self.uri(table), table).version() if self.exists(table) else None

    def made_as(self, table: Table) -> str:
        """The id that the table got when it was made: another one in its place has another.

        Raises:
            LakehouseError: it isn't there, or can't be read.
        """
        return open_table(self.uri(table), table).metadata().id

    def read(
        self,
        table: Table,
        columns: list[str] | None = None,
        where: pc.Expression | None = None,
        version: int | None = None,
    ) -> pa.Table:
        """Rows as Arrow, in no particular order; empty, with the declared schema, while the table doesn't exist.

        Args:
            columns: only these, in this order.
            where: only rows for which it is true.
            version: as of this Delta version.

        Raises:
            LakehouseError: no such version, or the table can't be read.
        """
        wanted = pa.schema([table.schema.field(name) for name in columns]) if columns else table.schema
        if version is None and not self.exists(table):
            return wanted.empty_table()
        opened = open_table(self.uri(table), table, version)
        try:
            dataset = dataset_of(opened, self.uri(table))
            found = dataset.to_table(columns=wanted.names) if where is None else _filtered(dataset, where, wanted.names)
        except (DeltaError, OSError) as error:
            raise refusal(table, self.uri(table), error, "read") from error
        return found.cast(wanted)

    def batches(self, table: Table, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """These columns of all rows, some rows at a time: of tables that memory doesn't hold. Raises as `read` does."""
        if not self.exists(table):
            return
        wanted = pa.schema([table.schema.field(name) for name in columns])
        opened = open_table(self.uri(table), table)
        try:
            for batch in dataset_of(opened, self.uri(table)).to_batches(columns=columns):
                yield batch.cast(wanted)
        except (DeltaError, OSError) as error:
            raise refusal(table, self.uri(table), error, "read") from error

    def merge(self, table: Table, rows: pa.Table, *, run: str, delete_unmatched: str | None = None) -> Written:
        """Insert rows with a new key; update a row whose `content_hash` changed (or, where the table has
        `events_seen`, only if it has seen no fewer events); leave all else untouched.

        Args:
            rows: with `table.rows_schema`; keys unique.
            run: who writes, for provenance.
            delete_unmatched: SQL condition on the target (`target.column`); rows that satisfy it and are
                not among `rows` are deleted. `"true"` makes the table equal to `rows`.

        Raises:
            ConflictError: concurrent commits won, again and again.
            LakehouseError: a row breaks the table's schema or constraints; nothing is written.
        """
        return self.engine(table).merge(self.own_uri(table), table, rows, run=run, delete_unmatched=delete_unmatched)

    def delete(self, table: Table, column: str, values: Iterable[str]) -> int:
        """Delete the rows whose `column` is one of `values`, all in one commit; how many those were.

        Raises:
            ConflictError: concurrent commits won, again and again.
            LakehouseError: the table can't be read or written, or only ever grows.
        """
        if table.append_only:
            raise LakehouseError(f"{table.path}: nothing can be deleted from it, it is declared append-only")
        quoted = ", ".join("'" + value.replace("'", "''") + "'" for value in sorted(values))
        if not quoted or not self.exists(table):
            return 0
        return self.engine(table).delete(self.own_uri(table), table, f"`{column}` IN ({quoted})")

    def transform(
        self, source: Table, function: BatchFunction, table: Table, *, run: str, origin: "Lake | None" = None
    ) -> Written:
        """Make `table` equal to `function` over all of `source`, by the merge above: where the engine lives.

        Args:
            function: takes batches with `source.rows_schema`, at most a thousand rows each, yields batches with
                `table.rows_schema`. Pure, and picklable: it may run elsewhere, and more than once.
            origin: the lake that has `source`, where it is another environment's.

        Raises:
            LakehouseError: there is no source, or what `function` yields doesn't fit the table; nothing is written.
        """
        fitting = partial(fitted, function, source.rows_schema)
        return self.engine(table).transform(
            (origin or self).uri(source), source.rows_schema.names, fitting, self.own_uri(table), table, run=run
        )

    def changes(self, table: Table, since: int | None) -> pa.Table:
        """Net change per key after version `since` (None: from the beginning): rows of the table's schema and
        `change` (`upsert` or `delete`), one per key. A deleted row carries its last values.

        Raises:
            FeedGone: the feed no longer reaches back to `since`.
            LakehouseError: storage doesn't answer, or refuses.
        """
        return LocalEngine().changes(self.uri(table), table, since)


def fitted(function: BatchFunction, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """`function` over `batches` in the declared `schema`: engines name and nest Arrow types a little differently."""
    return function(batch.select(schema.names).cast(schema) for batch in batches)


def _filtered(dataset: pa.dataset.Dataset, where: pc.Expression, names: list[str]) -> pa.Table:
    """Rows for which `where` is true. Files are left out by their partition and statistics, rows after they are read:
    files that a merge of delta-rs wrote hold string_view, and a filter pushed down into one fails (pyarrow 25)."""
    batches = (
        batch
        for fragment in dataset.get_fragments(filter=where)
        for batch in fragment.to_batches(schema=dataset.schema)
    )
    parts = [pa.Table.from_batches([batch]).filter(where).select(names) for batch in batches]
    return pa.concat_tables(parts) if parts else dataset.schema.empty_table().select(names)
