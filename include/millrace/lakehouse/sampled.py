"""What is a sample, or a copy, of another place's tables: how far those were read, and by which rule.

Kept among the cursors, under `prod/silver/documents`, so that nobody takes a version of that place's table for one of
the lake's own. Who is in the sample is the declaration's business (`policies.Sample`).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from millrace.lakehouse.cursors import move_cursor, read_cursor
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.places import SAMPLE
from millrace.lakehouse.tables import OPS_CURSORS, SILVER_DOCUMENTS, Table

Brought = TypeVar("Brought")


def follow(
    lake: Lake, theirs: Lake, tables: tuple[Table, ...], bring: Callable[[], Brought], *, rule: str, run: str
) -> Brought | None:
    """Do `bring`, which makes these tables of `lake` from those of `theirs` by this rule; None: nothing was done, since
    they are made of what is there now, by this very rule."""
    read = tuple(theirs.version(table) for table in tables)
    known = tuple(read_cursor(lake, rule, _of(theirs.environment, table)) for table in tables)
    if read == known and all(lake.exists(table) for table in tables):
        return None
    brought = bring()
    _note_versions(lake, theirs, rule, tables, read, run=run)
    return brought


def sampled_documents(lake: Lake) -> frozenset[str] | None:
    """Ids of the documents that are here; None: they are no copy of the sample."""
    path = _of(SAMPLE, SILVER_DOCUMENTS).path
    if not lake.read(OPS_CURSORS, ["reader"], where=pc.field("table") == path).num_rows:
        return None
    found: pa.Table = lake.read(SILVER_DOCUMENTS, ["document_id"])
    return frozenset(found["document_id"].to_pylist())


def _of(place: str, table: Table) -> Table:
    return replace(table, layer=f"{place}/{table.layer}")


def _note_versions(
    lake: Lake, theirs: Lake, rule: str, tables: tuple[Table, ...], read: tuple[int | None, ...], *, run: str
) -> None:
    """Forget what `lake` was made of by other rules, or of later versions: those of a table that was since restored
    from a backup."""
    for table, version in zip(tables, read, strict=True):
        of = _of(theirs.environment, table)
        kept = "false" if version is None else f"target.reader = '{rule}' AND target.version <= {version}"
        gone = f"target.table = '{of.path}' AND NOT ({kept})"
        lake.merge(OPS_CURSORS, OPS_CURSORS.rows_schema.empty_table(), run=run, delete_unmatched=gone)
        if version is not None:
            move_cursor(lake, rule, of, version, run=run)
