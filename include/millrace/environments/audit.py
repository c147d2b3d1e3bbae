"""Reading the audit trail: is it whole, and who did what. Appending to it is `lakehouse/audit/`'s.

The trail is walked month by month in the order of its sequence, so memory holds a month. It is whole if every entry
has the hash that its columns give and the hash of the entry before, from the first to at least the last that is noted
outside of it (`lakehouse/audit/head.py`), and if it still tells what the journals tell.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import reduce
from operator import and_, or_
from typing import Any, get_args

import pyarrow.compute as pc

from millrace.applications import load_applications
from millrace.errors import AuditError
from millrace.lakehouse.audit.chain import FIRST, Action, Event, columns, digest
from millrace.lakehouse.audit.head import Head, note, noted, noted_in
from millrace.lakehouse.audit.journals import journal_events
from millrace.lakehouse.commits import open_table
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_AUDIT, OPS_DECISIONS, OPS_EVALUATIONS, OPS_PROMOTIONS, PLATFORM
from millrace.settings import Settings

JOURNALS = tuple(f"{table.path}/" for table in (OPS_DECISIONS, OPS_EVALUATIONS, OPS_PROMOTIONS))
"""How the resource of an entry begins that follows a journal."""
BATCH = 1000
"""Entries that are Python objects at once."""


@dataclass(frozen=True)
class Trail:
    """A trail that is whole."""

    entries: int
    head: Head | None
    """Its last entry; None: there is none."""
    waiting: int
    """Rows of journals that it lacks: the next tick of their application's rollout appends them."""


def verify(settings: Settings, *, head: str = "") -> Trail:
    """Walk the whole trail, then note its end in this home.

    Args:
        head: the hash of an entry that somebody noted down, whole; empty: nobody did.

    Raises:
        AuditError: the trail is not whole; the message names the first entry at which it is broken.
        LakehouseError: it can't be read.
    """
    lake, known = Lake.of(settings, PLATFORM), noted(settings)
    journals = _Journals(settings)
    last: Head | None = None
    count, found = 0, not head
    for entry in _walk(lake):
        if problem := _broken(entry, last) or journals.contradiction(entry):
            raise AuditError(f"the audit trail is broken at entry {last.sequence + 1 if last else 0}: {problem}")
        last = Head(**{name: entry[name] for name in Head.COLUMNS})
        if known and known.sequence == last.sequence and known.hash != last.hash:
            raise AuditError(
                f"the audit trail is broken at entry {last.sequence} or before: it has hash {last.hash}, and "
                f"{noted_in(settings)} noted {known.hash}; somebody wrote the trail anew"
            )
        found = found or entry["hash"] == head
        count += 1
    if known and (last is None or last.sequence < known.sequence):
        raise AuditError(
            f"the audit trail is broken at entry {count}: it is missing, and so are all up to {known.sequence}, which "
            f"{noted_in(settings)} noted; somebody cut the trail off, or the lake is from an older backup than the home"
        )
    if not found:
        raise AuditError(
            f"none of the {count} entries of the audit trail has hash {head}: it was cut off or written anew since "
            "that was noted, or the hash is not of this environment"
        )
    if last is not None:
        note(settings, known, last, lambda _: True)
    return Trail(count, last, journals.waiting())


def search(
    settings: Settings,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    actor: str = "",
    action: str = "",
    application: str = "",
    resource: str = "",
    text: str = "",
    limit: int = 100,
) -> list[dict[str, Any]]:
    """The last `limit` entries for which all that is given holds, oldest first, without provenance; `details` read.

    Args:
        since, until: when it happened; UTC where they have no zone; `until` is not included.
        actor: whole (`person/ann`), or without its kind (`ann`, a pseudonym, a key's id).
        resource, text: part of the resource, or of any column that holds text; upper or lower case.

    Raises:
        AuditError: there is no such action.
        LakehouseError: the trail can't be read.
    """
    if action and action not in get_args(Action):
        raise AuditError(f"there is no action {action!r}; there are {', '.join(get_args(Action))}")
    wanted = [
        since and pc.field("occurred_at") >= _utc(since),
        until and pc.field("occurred_at") < _utc(until),
        action and pc.field("action") == action,
        application and pc.field("application") == application,
        resource and pc.match_substring(pc.field("resource"), resource, ignore_case=True),
        actor and ((pc.field("actor") == actor) | pc.ends_with(pc.field("actor"), f"/{actor}")),
        text and _says(text),
    ]
    given = [one for one in wanted if isinstance(one, pc.Expression)]
    where = reduce(and_, given) if given else None
    lake = Lake.of(settings, PLATFORM)
    rows = lake.read(OPS_AUDIT, OPS_AUDIT.rows_schema.names, where=where).sort_by("sequence")
    found = rows.slice(max(0, rows.num_rows - limit)).to_pylist()
    return [entry | {"details": json.loads(entry["details"])} for entry in found]


class _Journals:
    """What the journals of applications tell, each read once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._told: dict[str, dict[str, Event]] = {}

    def contradiction(self, entry: dict[str, Any]) -> str | None:
        """How the journal that `entry` follows tells it now; None: as the entry does, or it follows none."""
        if not entry["resource"].startswith(JOURNALS):
            return None
        application = entry["application"]
        event = self._of(application).pop(entry["event_id"], None)
        if event is None:
            return f"{entry['resource']} of {application}, which it tells of, is gone from the journal"
        told = columns(event)
        # What a later Millrace tells in addition, an older entry doesn't have.
        details = {name: event.details.get(name) for name in json.loads(entry["details"])}
        changed = [name for name in told if name != "details" and told[name] != entry[name]]
        changed += [name for name, value in json.loads(entry["details"]).items() if details[name] != value]
        if changed:
            return f"{entry['resource']} of {application} has another {', '.join(changed)} in the journal now"
        return None

    def waiting(self) -> int:
        """Rows that no entry told of, of the declared applications too that no entry names."""
        names = {*self._told, *(application.name for application in load_applications(self._settings))}
        return sum(len(self._of(name)) for name in names)

    def _of(self, application: str) -> dict[str, Event]:
        if application not in self._told:
            events = journal_events(Lake.of(self._settings, application))
            self._told[application] = {event.event_id: event for event in events}
        return self._told[application]


def _walk(lake: Lake) -> Iterator[dict[str, Any]]:
    """All entries by month, then sequence.

    Raises:
        AuditError: the table would let entries be changed.
    """
    if not lake.exists(OPS_AUDIT):
        return
    opened = open_table(lake.uri(OPS_AUDIT), OPS_AUDIT)
    if opened.metadata().configuration.get("delta.appendOnly") != "true":
        raise AuditError(f"somebody took delta.appendOnly from the table in {lake.uri(OPS_AUDIT)}; set it again")
    version, names = opened.version(), OPS_AUDIT.rows_schema.names
    for month in sorted(partition["month"] for partition in opened.partitions()):
        rows = lake.read(OPS_AUDIT, names, where=pc.field("month") == month, version=version).sort_by("sequence")
        for batch in rows.to_batches(max_chunksize=BATCH):
            yield from batch.to_pylist()


def _broken(entry: dict[str, Any], last: Head | None) -> str | None:
    """Why `entry` can't come after `last`; None: it can."""
    following = last.sequence + 1 if last else 0
    if entry["sequence"] > following:
        return f"it is missing, the next is {entry['sequence']}"
    if entry["sequence"] < following:
        return f"entry {entry['sequence']} is there once more, or in another month than when it was appended"
    if digest(entry) != entry["hash"]:
        return f"it was changed: its columns give hash {digest(entry)}, and it has {entry['hash']}"
    if entry["previous_hash"] != (last.hash if last else FIRST):
        return f"it names {entry['previous_hash']} as the hash of the entry before, which is another"
    return None


def _says(text: str) -> pc.Expression:
    names = ("actor", "action", "application", "resource", "outcome", "details", "run", "event_id")
    return reduce(or_, (pc.match_substring(pc.field(name), text, ignore_case=True) for name in names))


def _utc(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
