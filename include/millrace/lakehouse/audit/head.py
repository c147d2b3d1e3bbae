"""The end of the audit trail as this home knows it, in a small file beside the lake that only ever moves on.

A chain alone can't tell that its last entries are gone. Who cuts them off has to change this file too, in every home
that appended to the trail or verified it; where a home is no safe place, a person notes the hash down
(`millrace audit verify --head`).
"""

import fcntl
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from millrace.errors import AuditError
from millrace.settings import Settings

log = logging.getLogger("millrace.audit")


@dataclass(frozen=True)
class Head:
    """The last entry of a trail at some moment."""

    COLUMNS: ClassVar[tuple[str, ...]] = ("sequence", "month", "hash", "occurred_at")

    sequence: int
    month: str
    hash: str
    occurred_at: datetime


def noted_in(settings: Settings) -> Path:
    return settings.home / "audit" / f"{settings.environment}.json"


def noted(settings: Settings) -> Head | None:
    """The end that this home has seen; None: it has seen none.

    Raises:
        AuditError: the file can't be understood.
    """
    path = noted_in(settings)
    if not path.exists():
        return None
    try:
        told: dict[str, Any] = json.loads(path.read_text())
        return Head(**told | {"occurred_at": datetime.fromisoformat(told["occurred_at"])})
    except (ValueError, TypeError, KeyError) as error:
        raise AuditError(f"{path} can't be understood ({error}); restore it from the home's backup") from None


def note(settings: Settings, before: Head | None, head: Head, holds: Callable[[Head], bool]) -> None:
    """Remember `head`, unless a later one is remembered. What the trail has lost stays remembered, for whoever
    verifies it; appending goes on, since a rollback must not wait for that.

    Args:
        before: the end that `head` was appended to.
        holds: whether the trail holds an entry.

    Raises:
        AuditError: the file can't be understood, or not be written.
    """
    path = noted_in(settings)
    try:
        _note(path, settings, before, head, holds)
    except OSError as error:
        raise AuditError(
            f"the end of the audit trail, entry {head.sequence} with hash {head.hash}, can't be noted in {path}: "
            f"{error}; the trail itself is written"
        ) from error


def _note(path: Path, settings: Settings, before: Head | None, head: Head, holds: Callable[[Head], bool]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = noted(settings)
        if known is not None:
            if known.sequence >= head.sequence and holds(known):
                return
            if known != before and not holds(known):
                log.error("the audit trail lacks entry %d, which %s notes: millrace audit verify", known.sequence, path)
                return
        writing = path.with_suffix(".writing")
        with writing.open("w") as file:
            json.dump(asdict(head), file, default=datetime.isoformat)
            file.flush()
            os.fsync(file.fileno())
        writing.rename(path)
