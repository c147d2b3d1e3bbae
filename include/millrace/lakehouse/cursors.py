"""How far each reader has read a table's change feed, kept in the lake itself."""

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties
from deltalake.exceptions import DeltaError

from millrace.lakehouse.commits import open_table, refusal, retried
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.local import LocalEngine
from millrace.lakehouse.rows import same_key, stamped
from millrace.lakehouse.tables import OPS_CURSORS, Table


def read_cursor(lake: Lake, reader: str, table: Table) -> int | None:
    """Last version of `table` that `reader` has finished with; None: it has read nothing."""
    rows = lake.read(OPS_CURSORS, where=(pc.field("reader") == reader) & (pc.field("table") == table.path))
    return rows["version"][0].as_py() if rows.num_rows else None


def move_cursor(lake: Lake, reader: str, table: Table, version: int, *, run: str) -> None:
    """Record that `reader` has finished with everything up to `version`. Never moves back, whoever else moves it."""
    uri = lake.own_uri(OPS_CURSORS)
    LocalEngine().create(uri, OPS_CURSORS)
    row = pa.Table.from_pylist(
        [{"reader": reader, "table": table.path, "version": version}], schema=OPS_CURSORS.rows_schema
    )
    values = {name: f"source.`{name}`" for name in OPS_CURSORS.schema.names}

    def once() -> None:
        opened = open_table(uri, OPS_CURSORS)
        try:
            (
                # On the version that was read, or not at all: two merges of one new key would insert it twice.
                opened.merge(
                    stamped(row, run),
                    same_key(OPS_CURSORS),
                    source_alias="source",
                    target_alias="target",
                    commit_properties=CommitProperties(max_commit_retries=0),
                )
                .when_matched_update(values, predicate="source.version > target.version")
                .when_not_matched_insert(values)
                .execute()
            )
        except (DeltaError, OSError) as error:
            raise refusal(OPS_CURSORS, uri, error) from error

    retried(once)


def forget_cursor(lake: Lake, reader: str, table: Table, *, run: str) -> None:
    """Let `reader` start from the whole of `table` again."""
    if lake.exists(OPS_CURSORS):
        lake.merge(
            OPS_CURSORS,
            OPS_CURSORS.rows_schema.empty_table(),
            run=run,
            delete_unmatched=f"target.reader = '{reader}' AND target.table = '{table.path}'",
        )
