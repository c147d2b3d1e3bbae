"""What surrounds every commit, whichever engine makes it: opening a table that carries only what it declares,
trying again after a conflict, and saying in one sentence why storage refused.
"""

import random
import re
import shutil
import time as clock
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

import pyarrow.dataset as ds
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from millrace import FORMAT_VERSION
from millrace.errors import AccessRefused, ConflictError, LakehouseError
from millrace.lakehouse.rows import FORMAT_PROPERTY
from millrace.lakehouse.storage import delta_options, files_for_arrow, store_at
from millrace.lakehouse.tables import Table

T = TypeVar("T")

PATIENCE = 60.0
"""Seconds in which a commit that loses to other writers is tried again. A count of attempts would be used up in
moments by writers that are quick; waits grow to two seconds, longer than a commit takes."""

# What the older, numbered protocol versions imply, beyond the version before.
_READER_VERSIONS = {2: {"columnMapping"}}
_WRITER_VERSIONS = {
    2: {"appendOnly", "invariants"},
    3: {"checkConstraints"},
    4: {"changeDataFeed"},  # generatedColumns too; a declared schema has none
    5: {"columnMapping"},
    6: {"identityColumns"},
}


def open_table(uri: str, table: Table, version: int | None = None) -> DeltaTable:
    """The table at `uri`, at `version` or as it is now.

    Raises:
        LakehouseError: it isn't there, hasn't that version, a newer Millrace wrote it, or it carries a Delta feature
            that it doesn't declare: delta-rs would read some of those silently wrong.
    """
    try:
        opened = DeltaTable(uri, version=version, storage_options=delta_options(uri))
    except TableNotFoundError:
        at = "" if version is None else f" at version {version}"
        raise LakehouseError(
            f"{table.path}: there is no Delta table{at} in {uri}; run the stage that writes it"
        ) from None
    except (DeltaError, OSError, ValueError) as error:
        raise refusal(table, uri, error, "read") from error
    written = opened.metadata().configuration.get(FORMAT_PROPERTY, "1")
    if int(written) > FORMAT_VERSION:
        raise LakehouseError(
            f"{table.path}: the table in {uri} has format {written}, written by a newer Millrace, and this one knows "
            f"up to {FORMAT_VERSION}; upgrade Millrace"
        )
    undeclared = features(opened) - table.features
    if undeclared:
        raise LakehouseError(
            f"{table.path}: the table in {uri} carries {', '.join(sorted(undeclared))}, which it doesn't declare and "
            "not every engine here can read; somebody else wrote it: drop the feature, or write the table anew"
        )
    return opened


def dataset_of(opened: DeltaTable, uri: str) -> ds.Dataset:
    """The table's files as an Arrow dataset."""
    return opened.to_pyarrow_dataset(filesystem=files_for_arrow(uri))


def features(opened: DeltaTable) -> set[str]:
    """Delta features in a table's protocol, listed or implied by its numbers."""
    protocol = opened.protocol()
    found = set(protocol.reader_features or ()) | set(protocol.writer_features or ())
    for number, implied in _READER_VERSIONS.items():
        if number <= protocol.min_reader_version < 3:
            found |= implied
    for number, implied in _WRITER_VERSIONS.items():
        if number <= protocol.min_writer_version < 7:
            found |= implied
    return found


def retried(commit: Callable[[], T]) -> T:
    """The result of `commit`, tried again while it raises ConflictError, for at most `PATIENCE` seconds.

    `commit` reads the table anew each time.

    Raises:
        ConflictError: other writers won all that time.
    """
    start = clock.monotonic()
    attempt = 0
    while True:
        try:
            return commit()
        except ConflictError as error:
            attempt += 1
            if clock.monotonic() - start > PATIENCE:
                raise ConflictError(f"{error}; lost {attempt} times in {PATIENCE:.0f} s, retry later") from error
            clock.sleep(min(2.0, 0.05 * 2 ** min(attempt, 6)) * random.random())


_COLOURS = re.compile(r"\x1b\[[0-9;]*m↳?")
"""delta-rs draws its causes for a terminal."""

Doing = Literal["read", "write", "tidy"]
"""What somebody is about to do with a table, for the sentence that says they may not."""


def refusal(table: Table, uri: str, error: Exception, doing: Doing = "write") -> LakehouseError:
    """One sentence for what delta-rs or storage said: which table, what is wrong, what to do."""
    said = " ".join(_COLOURS.sub("", str(error)).split())
    if _is_refused(said):  # before all else: delta-rs says it of a commit as of a conflict
        return described(table, uri, said, doing)
    if isinstance(error, CommitFailedError) and not _disk_is_full(said):
        return ConflictError(f"{table.path}: another writer committed first ({said})")
    return described(table, uri, said, doing)


def described(table: Table, uri: str, said: str, doing: Doing = "write", by: str = "") -> LakehouseError:
    """`refusal` for an error known only by what it says.

    Args:
        by: who asked storage; empty: this process.
    """
    if said.startswith("LakehouseError: "):  # ours, from a worker
        return LakehouseError(said.removeprefix("LakehouseError: "))
    if _disk_is_full(said):
        free = f" ({shutil.disk_usage(uri).free // 1024} KiB free)" if Path(uri).exists() else ""
        return LakehouseError(
            f"{table.path}: the disk that holds {uri} is full{free}; nothing was committed: free some space and retry"
        )
    if _is_refused(said):
        if store := store_at(uri):
            return AccessRefused(
                f"{table.path}: the object store does not let {by or store.identity} {doing} {uri}; "
                "use the credential of an environment that may (docs/lake.md)"
            )
        return AccessRefused(
            f"{table.path}: this environment's credentials may not {doing} {uri}; "
            "use the environment that owns the table"
        )
    if (store := store_at(uri)) and (unknown := re.search("SignatureDoesNotMatch|InvalidAccessKeyId", said)):
        return LakehouseError(
            f"{table.path}: the object store does not know {store.identity} by this secret key ({unknown.group()}); "
            "correct MILLRACE_LAKE_ACCESS_KEY and MILLRACE_LAKE_SECRET_KEY"
        )
    for sign in ("failed validation check", "violate", "NOT_NULL_CONSTRAINT", "Check or Invariant"):
        if sign in said:
            limits = "; ".join(f"{name}: {condition}" for name, condition in table.constraints.items())
            return LakehouseError(
                f"{table.path}: rows break a constraint ({limits or 'no nulls'}), nothing was written: {said[:400]}"
            )
    return LakehouseError(f"{table.path}: {said[:600]} (table in {uri})")


def _is_refused(said: str) -> bool:
    """Whether storage refused: in the words of delta-rs, of a disk, of Arrow, of Spark."""
    signs = ("lacked the necessary privileges", "Permission denied", "ACCESS_DENIED", "AccessDenied")
    return any(sign in said for sign in signs)


def _disk_is_full(said: str) -> bool:
    return "No space left on device" in said or "os error 28" in said or "Disk quota exceeded" in said
