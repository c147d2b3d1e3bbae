"""What a merge would change in a table, found batch by batch, so that what would change nothing is never written.

It holds keys, hashes and counts of the table, not its rows. It reads through delta-rs; which engine then writes
is not its business.
"""

from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable, QueryBuilder

from millrace.errors import LakehouseError
from millrace.lakehouse.rows import comparable
from millrace.lakehouse.tables import Table

Key = tuple[object, ...]


class Difference:
    """Between the table that `opened` has at its version and the rows of one merge."""

    def __init__(
        self, opened: DeltaTable, table: Table, delete_unmatched: str | None, only: pa.Table | None = None
    ) -> None:
        """
        Args:
            delete_unmatched: as in `Lake.merge`.
            only: all rows of the merge, where they are known: without `delete_unmatched` no other keys of the
                table are then kept.
        """
        self._table = table
        self._seen: set[Key] = set()
        self._there: dict[Key, tuple[object, ...]] = {}
        self._deletable: set[Key] = set()
        width = len(table.key)
        for batch in _compared(opened, table, delete_unmatched, only):
            if only is not None and not delete_unmatched:
                batch = _among(batch, only, table)
            values = [column.to_pylist() for column in batch.columns]
            for *state, deletable in zip(*values, strict=True):
                key = tuple(state[:width])
                self._there[key] = tuple(state[width:])
                if deletable:
                    self._deletable.add(key)
        self.within = _partitions(table, only, self._deletable) if only is not None else ""
        """SQL: the partitions of the target that hold all rows of the merge; empty: any may hold one."""

    def changed(self, batches: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Of each batch the rows that the merge would insert or update; batches without any are left out.

        Raises:
            LakehouseError: a key occurs twice.
        """
        names = comparable(self._table)
        width = len(self._table.key)
        for batch in batches:
            mask = []
            for state in zip(*(batch[name].to_pylist() for name in names), strict=True):
                key = tuple(state[:width])
                if key in self._seen:
                    raise LakehouseError(
                        f"{self._table.path}: key {', '.join(map(str, key))} ({', '.join(self._table.key)}) "
                        "occurs twice among the rows"
                    )
                self._seen.add(key)
                mask.append(key not in self._there or self._newer(self._there[key], state[width:]))
            if any(mask):
                yield batch.filter(pa.array(mask, pa.bool_()))

    def doomed(self) -> pa.Table:
        """Keys of the table's rows that the merge would delete; complete once `changed` is exhausted."""
        keys = sorted(self._deletable - self._seen, key=str)
        fields = [self._table.schema.field(name) for name in self._table.key]
        columns = [pa.array([key[i] for key in keys], field.type) for i, field in enumerate(fields)]
        return pa.table(columns, schema=pa.schema(fields))

    def _newer(self, there: tuple[object, ...], now: tuple[object, ...]) -> bool:
        """`rows.update_condition`, of values."""
        if not there or there[0] == now[0]:
            return False
        return len(there) == 1 or now[1] >= there[1]  # type: ignore[operator]


def _compared(
    opened: DeltaTable, table: Table, delete_unmatched: str | None, only: pa.Table | None
) -> Iterator[pa.RecordBatch]:
    names = comparable(table)
    columns = ", ".join(f'target."{name}"' for name in names)
    query = f"SELECT {columns}, ({delete_unmatched or 'false'}) AS deletable FROM target"
    if only is not None and (within := _partitions(table, only, ())):
        query += f" WHERE ({delete_unmatched or 'false'}) OR ({within})"
    schema = pa.schema([table.schema.field(name) for name in names] + [pa.field("deletable", pa.bool_())])
    for batch in pa.RecordBatchReader.from_stream(QueryBuilder().register("target", opened).execute(query)):
        yield batch.cast(schema)


def _partitions(table: Table, rows: pa.Table, keys: Iterable[Key]) -> str:
    """SQL: the target's partitions of these rows and keys. Where a partition is part of the key, no other one can hold
    them, and its files stay shut. Empty where it isn't."""
    conditions = []
    for name in table.partition_by:
        if name in table.key:
            position = table.key.index(name)
            values = {*rows[name].to_pylist(), *(key[position] for key in keys)}
            quoted = ["'" + str(value).replace("'", "''") + "'" for value in sorted(values, key=str)]
            kind = "DATE " if pa.types.is_date(table.schema.field(name).type) else ""
            conditions.append(f"target.{name} IN ({', '.join(kind + value for value in quoted) or 'NULL'})")
    return " AND ".join(conditions)


def _among(batch: pa.RecordBatch, rows: pa.Table, table: Table) -> pa.RecordBatch:
    """Rows of `batch` whose key may occur in `rows`: each key column is looked up alone."""
    mask = None
    for name in table.key:
        found = pc.is_in(batch[name], value_set=rows[name])
        mask = found if mask is None else pc.and_(mask, found)
    return batch.filter(mask)
