"""Entries of the audit trail, each bound to the one before by a hash, and appending them: each event once.

`hash` is SHA-256, as 64 lower-case hexadecimal digits, over the UTF-8 bytes of one JSON object of all other columns of
the entry, `previous_hash` among them and provenance not, as RFC 8785 writes it: keys sorted, no white space, text
escaped only where JSON must. Values are text, null, `sequence` and `occurred_at`, which is whole microseconds since
1970 UTC; `details` is text that holds JSON. `previous_hash` of the first entry is 64 zeros.

Users are in it as keyed pseudonyms only, so that it stays whole when one is erased; services, keys and the people
who operate are in it by name, since it says who answers for what. It knows no journal, and not who may do what.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from millrace.errors import AuditError
from millrace.lakehouse.audit.head import Head, note
from millrace.lakehouse.commits import open_table, retried
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.local import LocalEngine
from millrace.lakehouse.tables import OPS_AUDIT, PLATFORM
from millrace.settings import Settings

Action = Literal[
    "decision",  # of a rollout
    "approval",  # a person lets a release roll out, or does not
    "gate",  # the gate's verdict on a candidate
    "promotion",  # a release is champion, or goes to another environment
    "permission",  # who may do what was changed
    "key",  # an API key was made, revoked or rotated
    "key_use",  # an API key was shown, so often in one hour
    "erasure",  # what is known of a user was destroyed
]
PERSON = "person/"
"""Actors who are people begin so, and runs that a person made by hand."""
WRITER = "audit"
"""Name of the trail's transactions on its table: one a batch of entries."""
FIRST = "0" * 64
"""What the first entry has as `previous_hash`."""

_ACTOR = re.compile(r"(?:service|person|key)/.+|user/[0-9a-f]{32}")
_USER = re.compile(r"(?<![:\w])user/(?![0-9a-f]{32}\b)")  # after a colon: an account of AWS, in its ARN
_ADDRESS = re.compile(r"[^\s@\"/]+@[^\s@\"/]+\.[A-Za-z]{2,}")


@dataclass(frozen=True)
class Event:
    """What happened. The same `event_id` is the same event, however often it is told."""

    event_id: str
    occurred_at: datetime
    actor: str
    """`service/<name>`, `person/<name>`, `key/<id>` or `user/<pseudonym>`."""
    action: Action
    application: str
    """`_platform` where it concerns the whole environment."""
    resource: str
    outcome: str
    run: str
    release_id: str | None = None
    release_version: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able. Ids and numbers, no text that people wrote: that may name anybody."""


def record(settings: Settings, events: Sequence[Event], *, run: str) -> int:
    """Append those of `events` that the trail does not hold yet, in this order, on the very end that was read.

    Args:
        run: who appends, for provenance.

    Returns:
        How many those were.

    Raises:
        AuditError: an event names a user by something else than a pseudonym, or can't be understood.
        ConflictError: concurrent appends won, again and again.
        LakehouseError: the trail can't be read or written.
    """
    told = {event.event_id: columns(event) for event in events}
    if not told:
        return 0
    lake = Lake.of(settings, PLATFORM)
    before, appended = retried(lambda: _append(lake, told, run))
    if appended:
        note(settings, before, appended[-1], lambda head: _holds(lake, head))
    return len(appended)


def record_act(
    settings: Settings,
    person: str,
    action: Action,
    resource: str,
    outcome: str,
    *,
    at: datetime,
    application: str = PLATFORM,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Append what one person did at `at`, once.

    Args:
        person: the name, as its login has it.

    Raises:
        AuditError: as `record`.
        ConflictError: as `record`.
        LakehouseError: as `record`.
    """
    actor = f"{PERSON}{person}"
    event_id = f"{application}/{resource}/{outcome}/{at.isoformat()}"
    record(
        settings,
        [Event(event_id, at, actor, action, application, resource, outcome, run=actor, details=details or {})],
        run=actor,
    )


def columns(event: Event) -> dict[str, Any]:
    """The columns that the event itself gives.

    Raises:
        AuditError: as `record`.
    """
    told = {
        "event_id": event.event_id,
        "occurred_at": event.occurred_at,
        "actor": event.actor,
        "action": event.action,
        "application": event.application,
        "resource": event.resource,
        "release_id": event.release_id,
        "release_version": event.release_version,
        "outcome": event.outcome,
        "details": _canonical(event.details),
        "run": event.run,
    }
    if problem := _objection(told):
        raise AuditError(f"event {event.event_id!r} can't go into the audit trail: {problem}")
    return told


def digest(entry: Mapping[str, Any]) -> str:
    """What the entry's `hash` has to be; see the module."""
    covered = {name: entry[name] for name in OPS_AUDIT.rows_schema.names if name != "hash"}
    # As Arrow counts: a float would lose the last microseconds.
    covered["occurred_at"] = pa.scalar(entry["occurred_at"], OPS_AUDIT.schema.field("occurred_at").type).value
    return hashlib.sha256(_canonical(covered).encode()).hexdigest()


def _append(lake: Lake, told: Mapping[str, Mapping[str, Any]], run: str) -> tuple[Head | None, list[Head]]:
    """The end before, and the entries appended.

    Raises:
        ConflictError: somebody else appended since.
    """
    uri = lake.own_uri(OPS_AUDIT)
    opened = open_table(uri, OPS_AUDIT) if lake.exists(OPS_AUDIT) else None
    before, known = (_last(lake, opened), _known(lake, opened, list(told))) if opened else (None, set[str]())
    missing = [event for event_id, event in told.items() if event_id not in known]
    if not missing:
        return before, []
    entries = _chained(before, missing, f"{datetime.now(UTC):%Y-%m}")
    rows = pa.Table.from_pylist(entries, schema=OPS_AUDIT.rows_schema)
    # Of the version that all this was read at: whoever appended since makes this fail.
    number = opened.transaction_version(WRITER) if opened else None
    LocalEngine().append_at(uri, OPS_AUDIT, rows, run=run, writer=WRITER, expected=number)
    return before, [Head(**{name: entry[name] for name in Head.COLUMNS}) for entry in entries]


def _last(lake: Lake, opened: DeltaTable) -> Head | None:
    """The last entry of the trail as it was opened; None: it has none."""
    last = max((partition["month"] for partition in opened.partitions()), default=None)
    if last is None:
        return None
    rows = lake.read(OPS_AUDIT, [*Head.COLUMNS], where=pc.field("month") == last, version=opened.version())
    return Head(**rows.slice(pc.index(rows["sequence"], pc.max(rows["sequence"])).as_py(), 1).to_pylist()[0])


def _known(lake: Lake, opened: DeltaTable, event_ids: list[str]) -> set[str]:
    there = lake.read(OPS_AUDIT, ["event_id"], where=pc.field("event_id").isin(event_ids), version=opened.version())
    return set(there["event_id"].to_pylist())


def _chained(before: Head | None, events: Sequence[Mapping[str, Any]], month: str) -> list[dict[str, Any]]:
    """`events` as the entries that follow `before`."""
    head, entries = before, []
    for event in events:
        # A clock that is behind must not put an entry before its predecessor: the trail is read month by month.
        entry = {
            **event,
            "sequence": head.sequence + 1 if head else 0,
            "month": max(month, head.month) if head else month,
            "previous_hash": head.hash if head else FIRST,
        }
        entry["hash"] = digest(entry)
        head = Head(**{name: entry[name] for name in Head.COLUMNS})
        entries.append(entry)
    return entries


def _canonical(told: Mapping[str, Any]) -> str:
    return json.dumps(told, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _holds(lake: Lake, head: Head) -> bool:
    there = lake.read(OPS_AUDIT, ["hash"], where=pc.field("sequence") == head.sequence)
    return there["hash"].to_pylist() == [head.hash]


def _objection(told: Mapping[str, Any]) -> str | None:
    """Why this may not be written for ever; None: it may."""
    if told["action"] not in get_args(Action):
        return f"its action {told['action']!r} is none of {', '.join(get_args(Action))}"
    if not _ACTOR.fullmatch(told["actor"]):
        return "its actor is not service/…, person/…, key/… or user/ with a pseudonym (32 hexadecimal digits)"
    if told["occurred_at"].tzinfo is None:
        return f"its time {told['occurred_at']} has no time zone"
    for name in ("event_id", "application", "resource", "outcome", "details"):
        if _USER.search(told[name]) or _ADDRESS.search(told[name]):
            return f"its {name} names a user by something else than a pseudonym"
    return None
