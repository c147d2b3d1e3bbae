"""What an engine must be able to do to commit to tables; `local.py` and `spark.py` do it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import pyarrow as pa

from millrace.lakehouse.tables import Table

BatchFunction = Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]
"""A transformation: pure, over record batches, the same in-process and on a cluster."""


@dataclass(frozen=True)
class Written:
    """What one commit did. All zero and `changed` false: nothing was committed."""

    version: int
    inserted: int = 0
    updated: int = 0
    deleted: int = 0

    @property
    def changed(self) -> bool:
        return bool(self.inserted or self.updated or self.deleted)

    @property
    def counts(self) -> dict[str, int]:
        return {"inserted": self.inserted, "updated": self.updated, "deleted": self.deleted}


class Engine(Protocol):
    """How rows are committed. Both implementations are held to the same results by the same tests."""

    def create(self, uri: str, table: Table) -> None:
        """Create the empty table if it isn't there."""

    def merge(self, uri: str, table: Table, rows: pa.Table, *, run: str, delete_unmatched: str | None) -> Written:
        """See `Lake.merge`."""

    def transform(
        self, source_uri: str, columns: list[str], function: BatchFunction, uri: str, table: Table, *, run: str
    ) -> Written:
        """See `Lake.transform`."""

    def delete(self, uri: str, table: Table, condition: str) -> int:
        """See `Lake.delete`."""
        ...

    def tidy(self, uri: str, table: Table, kept: timedelta) -> int:
        """Make few files of many, and remove those that only versions older than `kept` ago need; how many went.
        The content stays as it is, and so does the change feed of that time."""
        ...
