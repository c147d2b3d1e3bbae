"""What a declared table is, and the kinds of columns."""

from dataclasses import dataclass, field

import pyarrow as pa

TIME = pa.timestamp("us", tz="UTC")
VECTOR = pa.list_(pa.float32())

PROVENANCE = (
    pa.field("written_by", pa.string(), nullable=False),  # the run that wrote the row
    pa.field("code_version", pa.string(), nullable=False),
    pa.field("written_at", TIME, nullable=False),
)


FEATURES = frozenset({"appendOnly", "invariants", "checkConstraints", "changeDataFeed"})
"""Delta features that both engines write and read. Others, deletion vectors and column mapping among them, one of
the two refuses or reads wrong."""


@dataclass(frozen=True)
class Table:
    """One declared table. `columns` excludes provenance, which every table has (`schema` includes it)."""

    layer: str
    name: str
    columns: tuple[pa.Field, ...]
    key: tuple[str, ...]
    partition_by: tuple[str, ...] = ()
    change_feed: bool = False
    retention_days: int = 30
    constraints: dict[str, str] = field(default_factory=dict)
    """Name → SQL condition that every row satisfies."""
    append_only: bool = False
    """Delta refuses whoever would change or remove a row (`delta.appendOnly`); compacting rewrites files, not rows."""
    features: frozenset[str] = FEATURES
    """Delta features that the table may carry; one with another is refused."""

    @property
    def path(self) -> str:
        return f"{self.layer}/{self.name}"

    @property
    def schema(self) -> pa.Schema:
        """All columns, provenance last."""
        return pa.schema([*self.columns, *PROVENANCE])

    @property
    def rows_schema(self) -> pa.Schema:
        """What a stage hands in: the columns without provenance."""
        return pa.schema(self.columns)


def text(name: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, pa.string(), nullable=nullable)


def number(name: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, pa.float64(), nullable=nullable)


def count(name: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, pa.int64(), nullable=nullable)


def flag(name: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, pa.bool_(), nullable=nullable)


def time(name: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, TIME, nullable=nullable)
