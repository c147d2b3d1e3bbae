"""The engine for what outgrows one machine: a Spark Connect server, MERGE by SQL, batch functions by `mapInArrow`.

Held to the same results as `local.py` by the same tests. Spark decides anew what to write on the newest version
when it commits; what would change nothing is found out before, because Spark commits and rewrites even that.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TypeVar
from uuid import uuid4

import pyarrow as pa
from deltalake import DeltaTable
from pyspark.errors import PySparkException
from pyspark.sql.connect.dataframe import DataFrame
from pyspark.sql.connect.session import SparkSession

from millrace.errors import ConflictError, LakehouseError
from millrace.lakehouse.commits import described, open_table, retried
from millrace.lakehouse.difference import Difference
from millrace.lakehouse.engine import BatchFunction, Written
from millrace.lakehouse.local import create_empty, missing_constraints
from millrace.lakehouse.rows import checked, same_key, stamped, typed, update_condition
from millrace.lakehouse.spark_session import Refused, on_server, says, shown
from millrace.lakehouse.storage import delta_options
from millrace.lakehouse.tables import TIME, Table

T = TypeVar("T")

_LAST_COMMIT = "spark.databricks.delta.lastCommitVersionInSession"
_committing = threading.Lock()
"""The setting above belongs to the session, which the threads of a process share."""


class SparkEngine:
    """Spark, over Connect. Needs the lake's storage in reach of the server and of this process."""

    def __init__(self, url: str) -> None:
        self._url = url

    def create(self, uri: str, table: Table) -> None:
        # Spark's own creation, interrupted, leaves a folder that it takes for a table ever after. delta-rs writes
        # version 0 whole or not at all; every later commit is Spark's.
        opened = retried(lambda: create_empty(uri, table))
        for name, condition in missing_constraints(opened, table).items():
            statement = f"ALTER TABLE {_path(uri)} ADD CONSTRAINT {_quoted(name)} CHECK ({condition})"
            self._commit(uri, table, partial(_add_constraint, statement))

    def merge(
        self, uri: str, table: Table, rows: pa.Table, *, run: str, delete_unmatched: str | None = None
    ) -> Written:
        rows = checked(table, rows)
        self.create(uri, table)
        opened = open_table(uri, table)
        if not rows.num_rows and not delete_unmatched:
            return Written(opened.version())
        difference = Difference(opened, table, delete_unmatched, only=rows)
        changed = list(difference.changed([rows]))
        if not difference.doomed().num_rows:
            if not changed:
                return Written(opened.version())
            # Nothing to delete: what doesn't change need not travel, nor its files be rewritten.
            rows, delete_unmatched = changed[0], None
        source = stamped(rows, run)

        def once(session: SparkSession) -> Written:
            # The types are given: none can be inferred from a table without rows.
            with _view(session, session.createDataFrame(source, _columns(table.schema))) as view:
                return _merge(session, uri, table, view, delete_unmatched)

        return self._commit(uri, table, once)

    def transform(
        self, source_uri: str, columns: list[str], function: BatchFunction, uri: str, table: Table, *, run: str
    ) -> Written:
        if not DeltaTable.is_deltatable(source_uri, delta_options(source_uri)):
            raise LakehouseError(f"{table.path}: its source {source_uri} is not there; run the stage that writes it")
        self.create(uri, table)
        produce = partial(_produced, function, table, run, datetime.now(UTC))
        # Spark believes a declared "not null" without looking; `_produced` looks.

        def once(session: SparkSession) -> Written:
            source = session.read.format("delta").load(source_uri).select(*map(_quoted, columns))
            # Kept, so that the function runs once, though its result is read twice.
            produced = source.mapInArrow(produce, _columns(table.schema)).persist()
            try:
                with _view(session, produced) as view:
                    if not _differs(session, uri, table, view):
                        return Written(open_table(uri, table).version())
                    return _merge(session, uri, table, view, "true")
            finally:
                with suppress(PySparkException):
                    produced.unpersist()

        return self._commit(uri, table, once)

    def delete(self, uri: str, table: Table, condition: str) -> int:
        def once(session: SparkSession) -> int:
            counts = session.sql(f"DELETE FROM {_path(uri)} WHERE {condition}").toArrow().to_pylist()[0]
            return int(counts["num_affected_rows"])

        return self._commit(uri, table, once)

    def tidy(self, uri: str, table: Table, kept: timedelta) -> int:
        hours = int(kept.total_seconds() // 3600)

        def once(session: SparkSession) -> int:
            session.sql(f"OPTIMIZE {_path(uri)}").collect()
            listed = session.sql(f"VACUUM {_path(uri)} RETAIN {hours} HOURS DRY RUN").toArrow()["path"].to_pylist()
            # With nothing to remove it lists the table itself.
            doomed = [path for path in listed if path.endswith(".parquet")]
            if doomed:
                session.sql(f"VACUUM {_path(uri)} RETAIN {hours} HOURS").collect()
            return len(doomed)

        return self._commit(uri, table, once)

    def _commit(self, uri: str, table: Table, once: Callable[[SparkSession], T]) -> T:
        def attempt() -> T:
            try:
                return on_server(self._url, once)
            except ConflictError as error:
                raise ConflictError(f"{table.path}: {error}") from error
            except Refused as refused:
                # Whatever the server does, it does with the credential that it was started with.
                by = f"the Spark Connect server at {shown(self._url)}"
                raise described(table, uri, str(refused), by=by) from refused

        return retried(attempt)


def mapped(rows: DataFrame, function: BatchFunction, table: Table) -> DataFrame:
    """What `function`, which runs on the workers, makes of `rows`: rows of `table`, without provenance, unchecked."""
    return rows.mapInArrow(function, _columns(table.rows_schema))


def _add_constraint(statement: str, session: SparkSession) -> None:
    try:
        session.sql(statement)
    except PySparkException as error:
        # Somebody else was first; that was the purpose.
        if not says(error, "DELTA_CONSTRAINT_ALREADY_EXISTS"):
            raise


def _merge(session: SparkSession, uri: str, table: Table, view: str, delete_unmatched: str | None) -> Written:
    """Run the MERGE of `view`, which has the table's columns, into the table."""
    names = [_quoted(name) for name in table.schema.names]
    clauses = [f"MERGE INTO {_path(uri)} AS target USING {view} AS source ON {same_key(table)}"]
    if condition := update_condition(table):
        updates = ", ".join(f"target.{name} = source.{name}" for name in names)
        clauses.append(f"WHEN MATCHED AND {condition} THEN UPDATE SET {updates}")
    values = ", ".join(f"source.{name}" for name in names)
    clauses.append(f"WHEN NOT MATCHED THEN INSERT ({', '.join(names)}) VALUES ({values})")
    if delete_unmatched:
        clauses.append(f"WHEN NOT MATCHED BY SOURCE AND ({delete_unmatched}) THEN DELETE")
    with _committing:
        counts = session.sql("\n".join(clauses)).toArrow().to_pylist()[0]
        version = int(session.conf.get(_LAST_COMMIT) or 0)
    return Written(version, counts["num_inserted_rows"], counts["num_updated_rows"], counts["num_deleted_rows"])


def _differs(session: SparkSession, uri: str, table: Table, view: str) -> bool:
    """Whether making the table equal to `view` would change it.

    Raises:
        LakehouseError: a key occurs twice in `view`.
    """
    key = ", ".join(f"source.{_quoted(name)}" for name in table.key)
    changed = "false" if (condition := update_condition(table)) is None else condition
    found = session.sql(f"""
        SELECT count(source.there) AS rows,
               count(DISTINCT {key}) AS keys,
               count_if(target.there IS NULL OR source.there IS NULL OR ({changed})) AS differing
        FROM (SELECT *, true AS there FROM {view}) AS source
        FULL OUTER JOIN (SELECT *, true AS there FROM {_path(uri)}) AS target ON {same_key(table)}
    """).toArrow()
    counts = found.to_pylist()[0]
    if counts["rows"] != counts["keys"]:
        raise LakehouseError(f"{table.path}: a key ({', '.join(table.key)}) occurs twice among the rows, or is null")
    return bool(counts["differing"])


def _produced(
    function: BatchFunction, table: Table, run: str, at: datetime, batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """What `mapInArrow` runs on the workers: `function`, its result checked and stamped."""
    for batch in function(batches):
        yield from stamped(typed(table, pa.Table.from_batches([batch])), run, at).to_batches()


@contextmanager
def _view(session: SparkSession, rows: DataFrame) -> Iterator[str]:
    """`rows` under a name that SQL can use, for as long as it is needed."""
    name = f"millrace_{uuid4().hex}"
    rows.createOrReplaceTempView(name)
    try:
        yield name
    finally:
        with suppress(PySparkException):  # a server that is gone must not hide why
            session.catalog.dropTempView(name)


def _columns(schema: pa.Schema) -> str:
    """Columns and types in SQL, all nullable."""
    return ", ".join(f"{_quoted(field.name)} {_sql_type(field.type)}" for field in schema)


def _sql_type(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"ARRAY<{_sql_type(kind.value_type)}>"
    names = {
        pa.string(): "STRING",
        pa.binary(): "BINARY",
        pa.bool_(): "BOOLEAN",
        pa.int64(): "BIGINT",
        pa.float64(): "DOUBLE",
        pa.float32(): "FLOAT",
        pa.date32(): "DATE",
        TIME: "TIMESTAMP",
    }
    if kind not in names:
        raise LakehouseError(f"no Spark type is declared for Arrow's {kind}; declared are {', '.join(map(str, names))}")
    return names[kind]


def _quoted(name: str) -> str:
    return f"`{name.replace('`', '``')}`"


def _path(uri: str) -> str:
    return f"delta.{_quoted(uri)}"
