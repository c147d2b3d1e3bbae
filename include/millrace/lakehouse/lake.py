"""One application's tables in one environment: reading them, and committing through the engine that owns each.

Any engine reads any table; only one commits to it, because Spark and delta-rs don't honour each other's
locks. Which one is a setting (`Settings.spark_tables`). Every write here is safe to repeat.
"""

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from millrace.lakehouse.engine import BatchFunction, Engine, Written
from millrace.lakehouse.local import LocalEngine
from millrace.lakehouse.tables import Table
from millrace.settings import Settings


class Lake:
    """The tables of `application` in `environment`, under `root`."""

    def __init__(
        self,
        root: str,
        environment: str,
        application: str,
        *,
        spark_url: str = "",
        spark_tables: frozenset[str] = frozenset(),
    ) -> None:
        self.root = root
        self.environment = environment
        self.application = application
        self._spark_url = spark_url
        self._spark_tables = spark_tables

    @classmethod
    def of(cls, settings: Settings, application: str) -> "Lake":
        return cls(
            str(settings.lake),
            settings.environment,
            application,
            spark_url=settings.spark_url,
            spark_tables=settings.spark_tables,
        )

    def uri(self, table: Table) -> str:
        return f"{self.root}/{self.environment}/{self.application}/{table.path}"

    def engine(self, table: Table) -> Engine:
        """The engine that commits to `table` in this deployment."""
        if table.path in self._spark_tables:
            from millrace.lakehouse.spark import SparkEngine

            return SparkEngine(self._spark_url)
        return LocalEngine()

    def exists(self, table: Table) -> bool:
        return DeltaTable.is_deltatable(self.uri(table))

    def version(self, table: Table) -> int | None:
        """Current Delta version; None while the table doesn't exist."""
        return DeltaTable(self.uri(table)).version() if self.exists(table) else None

    def read(
        self,
        table: Table,
        columns: list[str] | None = None,
        where: pc.Expression | None = None,
        version: int | None = None,
    ) -> pa.Table:
        """Rows as Arrow, in no particular order; empty, with the declared schema, while the table doesn't exist."""
        if not self.exists(table):
            empty = table.schema.empty_table()
            return empty.select(columns) if columns else empty
        found = (
            DeltaTable(self.uri(table), version=version).to_pyarrow_dataset().to_table(columns=columns, filter=where)
        )
        wanted = pa.schema([table.schema.field(name) for name in columns]) if columns else table.schema
        return found.select(wanted.names).cast(wanted)

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
        return self.engine(table).merge(self.uri(table), table, rows, run=run, delete_unmatched=delete_unmatched)

    def transform(self, source: Table, function: BatchFunction, table: Table, *, run: str) -> Written:
        """Make `table` equal to `function` over all of `source`, by the merge above: where the engine lives.

        Batches carry `source.rows_schema`; `function` yields batches with `table.rows_schema`.
        """
        return self.engine(table).transform(
            self.uri(source), source.rows_schema.names, function, self.uri(table), table, run=run
        )

    def changes(self, table: Table, since: int | None) -> pa.Table:
        """Net change per key after version `since` (None: from the beginning): rows of the table's schema and
        `change` (`upsert` or `delete`), one per key. A deleted row carries its last values.

        Raises:
            LakehouseError: the feed no longer reaches back to `since`.
        """
        return LocalEngine().changes(self.uri(table), table, since)
