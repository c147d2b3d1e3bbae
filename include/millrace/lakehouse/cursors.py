"""How far each reader has read a table's change feed, kept in the lake itself."""

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from millrace.lakehouse.lake import Lake
from millrace.lakehouse.local import LocalEngine, stamped
from millrace.lakehouse.tables import OPS_CURSORS, Table


def read_cursor(lake: Lake, reader: str, table: Table) -> int | None:
    """Last version of `table` that `reader` has finished with; None: it has read nothing."""
    rows = lake.read(OPS_CURSORS, where=(pc.field("reader") == reader) & (pc.field("table") == table.path))
    return rows["version"][0].as_py() if rows.num_rows else None


def move_cursor(lake: Lake, reader: str, table: Table, version: int, *, run: str) -> None:
    """Record that `reader` has finished with everything up to `version`. Never moves back."""
    uri = lake.uri(OPS_CURSORS)
    LocalEngine().create(uri, OPS_CURSORS)
    row = pa.Table.from_pylist(
        [{"reader": reader, "table": table.path, "version": version}], schema=OPS_CURSORS.rows_schema
    )
    names = OPS_CURSORS.schema.names
    (
        DeltaTable(uri)
        .merge(
            stamped(row, run),
            "target.reader = source.reader AND target.table = source.table",
            source_alias="source",
            target_alias="target",
        )
        .when_matched_update({n: f"source.{n}" for n in names}, predicate="source.version > target.version")
        .when_not_matched_insert({n: f"source.{n}" for n in names})
        .execute()
    )
