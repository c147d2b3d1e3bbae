"""Users of whom nothing may be stored any more, and what they did up to the moment when that was asked for.

Told by `ops/erasures`, so that an event that arrives late, or a backfill of a segment, does not bring them back. What
somebody does after that moment counts again: they have come back. Who is erased, and how, is
`environments/erasure.py`'s business.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from millrace.errors import ConflictError
from millrace.lakehouse.content import content_hash
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_ERASURES
from millrace.sources.event_log import Accepted, Completed, Failed, Feedback, Line
from millrace.sources.pseudonym import pseudonym


@dataclass(frozen=True)
class Erasure:
    """One user's, in one application."""

    user: str
    """Keyed pseudonym."""
    until: datetime
    done_at: datetime | None
    completions: frozenset[str]
    """Hashes of the ids of the user's completions: feedback on one need not name the user."""
    told: Mapping[str, Any]
    """`questions`: keyed hashes of what the user asked, where the key was known; and what the report is made of."""

    def covers(self, event: Accepted | Completed | Failed | Feedback) -> bool:
        """Whether nothing may be stored of `event`."""
        if isinstance(event, Feedback):
            said_by = event.user == self.user and event.occurred_at is not None and event.occurred_at <= self.until
            return said_by or hashed(event.completion_id) in self.completions
        return event.user == self.user and event.accepted_at <= self.until

    def covers_line(self, line: Line) -> bool:
        """As `covers`; a line that is no event is the user's if the pseudonym is in it."""
        if line.event is not None:
            return self.covers(line.event)
        return self.user in line.text and line.at <= self.until


@dataclass(frozen=True)
class Questions:
    """What somebody asked: as it was, and as keyed hashes, which outlive it and without the key tell nothing."""

    texts: frozenset[str]
    hashes: frozenset[str]
    key: bytes = field(repr=False)

    def __contains__(self, question: str) -> bool:
        return question.strip() in self.texts or hashed_question(self.key, question) in self.hashes


class Erased:
    """All erasures of an application."""

    def __init__(self, erasures: Iterable[Erasure]) -> None:
        self._erasures = {one.user: one for one in erasures}
        self._completions = frozenset().union(*(one.completions for one in self._erasures.values()))

    def __bool__(self) -> bool:
        return bool(self._erasures)

    def covers(self, event: Accepted | Completed | Failed | Feedback) -> bool:
        one = self._erasures.get(event.user or "")
        return (one is not None and one.covers(event)) or (
            isinstance(event, Feedback) and hashed(event.completion_id) in self._completions
        )

    def covers_line(self, line: Line) -> bool:
        if line.event is not None:
            return self.covers(line.event)
        return any(one.covers_line(line) for one in self._erasures.values())

    def late(self, lines: Iterable[Line]) -> list[Erasure]:
        """The erasures that have to know more completions, by these lines that they cover."""
        found: dict[str, set[str]] = {}
        for line in lines:
            if line.event is not None and not isinstance(line.event, Feedback):
                found.setdefault(line.event.user, set()).add(hashed(line.event.completion_id))
        known = {user: self._erasures[user] for user in found}
        return [
            replace(one, completions=one.completions | found[user])
            for user, one in known.items()
            if not found[user] <= one.completions
        ]


def erasures_seen(lake: Lake) -> str:
    """For `require_nobody_erased`: before users' questions are read. Of what the table says: upkeep changes versions,
    too."""
    rows = lake.read(OPS_ERASURES, OPS_ERASURES.rows_schema.names).to_pylist()
    return content_hash(*sorted(json.dumps(row, default=str, sort_keys=True) for row in rows))


def require_nobody_erased(lake: Lake, seen: str) -> None:
    """Before something is kept that was made of users' questions: who was erased meanwhile may be in it.

    Raises:
        ConflictError: somebody was.
    """
    if erasures_seen(lake) != seen:
        raise ConflictError(
            f"a user of {lake.application} was erased while this was made of what users asked; nothing was kept, run "
            "it again"
        )


def hashed(completion_id: str) -> str:
    """An id that says nothing of when and where; the end of the id of the exchange's trace, too."""
    return hashlib.sha256(completion_id.encode()).hexdigest()[:32]


def hashed_question(key: bytes, question: str) -> str:
    """By the pseudonyms' key: questions can be guessed, ids can't."""
    return pseudonym(key, f"question {question.strip()}")


def read_erasures(lake: Lake) -> list[Erasure]:
    return [
        Erasure(row["user"], row["until"], row["done_at"], frozenset(row["completions"]), json.loads(row["told"]))
        for row in lake.read(OPS_ERASURES, OPS_ERASURES.rows_schema.names).to_pylist()
    ]


def write_erasures(lake: Lake, erasures: Iterable[Erasure], *, run: str) -> None:
    """Raises:
    LakehouseError: the table can't be written.
    """
    rows = []
    for one in erasures:
        row = {
            "user": one.user,
            "until": one.until.astimezone(UTC),
            "done_at": one.done_at,
            "completions": sorted(one.completions),
            "told": json.dumps(one.told, sort_keys=True),
        }
        rows.append(row | {"content_hash": content_hash(json.dumps(row, sort_keys=True, default=str))})
    lake.merge(OPS_ERASURES, pa.Table.from_pylist(rows, schema=OPS_ERASURES.rows_schema), run=run)
