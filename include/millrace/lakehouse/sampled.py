"""What of an environment's tables is a sample of another's: how far that one's tables were read, and by which rule.

Kept among the cursors, under `prod/silver/documents`, so that nobody takes a version of that environment's table for
one of this environment's own. Who is in the sample is the declaration's business (`policies.Sample`).
"""

from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from millrace.lakehouse.cursors import move_cursor, read_cursor
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_CURSORS, SILVER_DOCUMENTS, Table

SAMPLED = "prod"
"""The environment that samples are taken of."""


def versions_read(lake: Lake, rule: str, tables: tuple[Table, ...]) -> tuple[int | None, ...]:
    """Version of each of the sampled environment's tables that `lake` is the sample of, by this very rule; None: it is
    of none."""
    return tuple(read_cursor(lake, rule, _theirs(table)) for table in tables)


def note_versions(
    lake: Lake, rule: str, tables: tuple[Table, ...], versions: tuple[int | None, ...], *, run: str
) -> None:
    """Note that `lake` is now the sample of these versions, and forget what it was a sample of by other rules, or of
    later versions: those of a table that was since restored from a backup."""
    for table, version in zip(tables, versions, strict=True):
        theirs = _theirs(table)
        kept = "false" if version is None else f"target.reader = '{rule}' AND target.version <= {version}"
        gone = f"target.table = '{theirs.path}' AND NOT ({kept})"
        lake.merge(OPS_CURSORS, OPS_CURSORS.rows_schema.empty_table(), run=run, delete_unmatched=gone)
        if version is not None:
            move_cursor(lake, rule, theirs, version, run=run)


def sampled_documents(lake: Lake) -> frozenset[str] | None:
    """Ids of the documents that are here; None: they are no sample of another environment's."""
    path = _theirs(SILVER_DOCUMENTS).path
    if not lake.read(OPS_CURSORS, ["reader"], where=pc.field("table") == path).num_rows:
        return None
    found: pa.Table = lake.read(SILVER_DOCUMENTS, ["document_id"])
    return frozenset(found["document_id"].to_pylist())


def _theirs(table: Table) -> Table:
    return replace(table, layer=f"{SAMPLED}/{table.layer}")
