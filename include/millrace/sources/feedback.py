"""From the gateway's event log to what people asked, got and said of it: `silver/exchanges` and `silver/feedback`.

Keyed by data interval and by completion. Landing an interval inserts its lines once; refining it takes every
completion that the interval touches and makes its rows anew from all its events, so that the tables are the same
however often intervals run, in whatever order, and beside one another. Knows no schedule and no HTTP.
"""

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from millrace.applications import Application
from millrace.errors import SourceError
from millrace.lakehouse import quality
from millrace.lakehouse.content import content_hash
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import (
    BRONZE_EVENTS,
    QUARANTINE_FEEDBACK,
    SILVER_EXCHANGES,
    SILVER_FEEDBACK,
)
from millrace.settings import Settings
from millrace.sources.completion_id import CompletionKeys
from millrace.sources.erased import Erased, read_erasures, write_erasures
from millrace.sources.event_log import (
    Accepted,
    Completed,
    Failed,
    Feedback,
    Line,
    erase_lines,
    now,
    parse_event,
    read_events,
)

SETTLE = 2.0
"""Seconds after its end before an interval is read: a gateway may be between stamping an event and writing it."""

LATE = timedelta(minutes=5)
"""How long before its interval a run looks again. A gateway that was held up between stamping an event and writing it,
or whose clock is behind, acknowledged it after its own interval was read."""

AnyExchange: TypeAlias = Accepted | Completed | Failed


def land_events(
    settings: Settings, application: Application, start: datetime, end: datetime, *, run: str
) -> dict[str, Any]:
    """Insert the events of [start, end) into `bronze/events`, and lines that are none into `quarantine/feedback`; and
    events of shortly before that came too late for their own interval.

    Returns: `lines` of the interval, `landed` and `quarantined` for the first time, `erased` (of users who asked for
        that), `changed`.

    Raises:
        SourceError: the interval is empty or has no time zone, or a segment can't be read.
    """
    start, end = _interval(start, end)
    _wait_for_writers(end)
    lake = Lake.of(settings, application.name)
    there = lake.read(BRONZE_EVENTS, ["event_id", "payload"], where=_within(start - LATE, end))
    known = dict(zip(there["event_id"].to_pylist(), there["payload"].to_pylist(), strict=True))
    read = sorted(
        read_events(settings.event_log(application.name), start - LATE, end),
        key=lambda line: (line.at, line.segment, line.offset),
    )
    erased = Erased(read_erasures(lake))
    dropped = [line for line in read if erased.covers_line(line)] if erased else []
    if late := erased.late(dropped):
        # Feedback on what is dropped now is dropped whenever it arrives.
        write_erasures(lake, late, run=run)
        erased = Erased(read_erasures(lake))
    if dropped:
        erase_lines(settings.event_log(application.name), erased.covers_line)
    lines = [line for line in read if not erased.covers_line(line)] if erased else read
    events, refused = [], []
    for line in lines:
        reason = line.reason
        if line.event is not None:
            event_id = line.event.event_id
            if known.setdefault(event_id, line.text) == line.text:
                events.append(line)
                continue
            reason = f"event id {event_id} belongs to another line already"
        refused.append(
            {
                "item_id": f"{line.segment}:{line.offset}",
                "reason": reason,
                "payload": line.text,
                "segment": line.segment,
                "found_in": _interval_of(line.at, start, end),
            }
        )
    landed = lake.merge(BRONZE_EVENTS, _bronze(events), run=run)
    quarantined = lake.merge(
        QUARANTINE_FEEDBACK, pa.Table.from_pylist(refused, schema=QUARANTINE_FEEDBACK.rows_schema), run=run
    )
    return {
        "lines": sum(line.at >= start for line in read),
        "landed": landed.inserted,
        "quarantined": quarantined.inserted,
        "erased": sum(line.at >= start for line in dropped),
        "changed": landed.changed or quarantined.changed,
    }


def refine_feedback(
    settings: Settings, application: Application, start: datetime, end: datetime, *, run: str
) -> dict[str, Any]:
    """Bring the exchanges and feedback of every completion with an event in [start, end), or shortly before, up to all
    its events.

    Events that the quality suites refuse go to `quarantine/feedback` with the reason. Feedback on an exchange that
    has not landed waits in bronze: the exchange's own interval writes it. Of several ratings of one answer the last
    one counts.

    Returns: rows written to `exchanges` and `feedback`, `quarantined` for the first time, completions `waiting` for
    their exchange, `changed` (either silver table).

    Raises:
        SourceError: the interval is empty or has no time zone.
        SettingsError: there is no completion key to check signatures with.
    """
    start, end = _interval(start, end)
    lake = Lake.of(settings, application.name)
    landed = _touched(lake, start - LATE, end, settings)
    # Read after the events: whoever is erased meanwhile is known here.
    erased = Erased(read_erasures(lake))
    events = [one for one in landed if not erased.covers(one.event)]
    reasons = _refused(events, application.name)
    refused = [
        {
            "item_id": one.event.event_id,
            "reason": reasons[one.event.event_id],
            "payload": one.payload,
            "segment": one.segment,
            "found_in": _interval_of(one.at, start, end),
        }
        for one in events
        if one.event.event_id in reasons and start - LATE <= one.at < end
    ]
    completions: dict[str, _Completion] = defaultdict(_Completion)
    for one in sorted(events, key=lambda one: (one.at, one.event.event_id)):
        if one.event.event_id not in reasons:
            completions[one.event.completion_id].add(one.event)
    exchanges = [row for one in completions.values() if (row := one.exchange_row()) is not None]
    feedback = [row for one in completions.values() if (row := one.feedback_row()) is not None]
    quarantined = lake.merge(
        QUARANTINE_FEEDBACK, pa.Table.from_pylist(refused, schema=QUARANTINE_FEEDBACK.rows_schema), run=run
    )
    # Feedback first: the rollout takes the newest exchange for the moment up to which ratings are known.
    said = lake.merge(SILVER_FEEDBACK, pa.Table.from_pylist(feedback, schema=SILVER_FEEDBACK.rows_schema), run=run)
    exchanged = lake.merge(
        SILVER_EXCHANGES, pa.Table.from_pylist(exchanges, schema=SILVER_EXCHANGES.rows_schema), run=run
    )
    return {
        "exchanges": exchanged.inserted + exchanged.updated,
        "feedback": said.inserted + said.updated,
        "quarantined": quarantined.inserted,
        "waiting": sum(1 for one in completions.values() if one.waits),
        "changed": exchanged.changed or said.changed,
    }


@dataclass(frozen=True)
class _Landed:
    """A bronze row, and what the signature of its completion id says."""

    event: AnyExchange | Feedback
    at: datetime
    payload: str
    segment: str
    signed_for: str | None
    """Application that the id was issued for; None: nobody with this key issued it."""


@dataclass
class _Completion:
    """All good events of one completion, in the order in which they happened."""

    accepted: Accepted | None = None
    completed: Completed | None = None
    failed: Failed | None = None
    last_said: Feedback | None = None
    simulated: bool = False
    seen: int = 0
    said: int = 0

    def add(self, event: AnyExchange | Feedback) -> None:
        self.simulated = self.simulated or event.simulated
        if isinstance(event, Feedback):
            self.last_said, self.said = event, self.said + 1
            return
        self.seen += 1
        if isinstance(event, Accepted):
            self.accepted = self.accepted or event
        elif isinstance(event, Completed):
            self.completed = self.completed or event
        else:
            self.failed = self.failed or event

    @property
    def told(self) -> AnyExchange | None:
        """The event that says most."""
        return self.completed or self.failed or self.accepted

    @property
    def waits(self) -> bool:
        return self.told is None and self.last_said is not None

    def exchange_row(self) -> dict[str, Any] | None:
        told = self.told
        if told is None:
            return None
        done = told if isinstance(told, Completed) else None
        ended = told if isinstance(told, Completed | Failed) else None
        return _hashed(
            {
                "completion_id": told.completion_id,
                "events_seen": self.seen,
                "state": told.kind,
                "occurred_at": told.accepted_at,
                "completed_at": ended.occurred_at if ended else None,
                "date": _day(told.accepted_at),
                "user": told.user,
                "simulated": self.simulated,
                "question": told.question,
                "answer": ended.answer if ended else None,
                "release_id": told.release_id,
                "release_version": told.release_version,
                "index_build": told.index_build,
                "prompt_version": told.prompt_version,
                "rollout_id": told.rollout_id,
                "epoch": told.epoch,
                "arm": told.arm,
                "assignment_probability": told.assignment_probability,
                "pinned": told.pinned,
                "fell_back": ended.fell_back if ended else False,
                "from_cache": done.from_cache if done else False,
                "citations": list(done.citations) if done else [],
                "prompt_tokens": done.prompt_tokens if done else 0,
                "completion_tokens": done.completion_tokens if done else 0,
                "seconds": ended.seconds if ended else None,
                "cost_usd": done.cost_usd if done else 0.0,
                "error": ended.error if ended else None,
            }
        )

    def feedback_row(self) -> dict[str, Any] | None:
        told, said = self.told, self.last_said
        if told is None or said is None or said.occurred_at is None:
            return None
        return _hashed(
            {
                "completion_id": told.completion_id,
                # The row rests on both kinds of events: whoever has seen more of either knows better.
                "events_seen": self.seen + self.said,
                "occurred_at": said.occurred_at,
                "date": _day(said.occurred_at),
                "user": told.user,
                "simulated": self.simulated,
                "rating": said.rating,
                "comment": said.comment,
                "correction": said.correction,
                "question": told.question,
                "answer": None if isinstance(told, Accepted) else told.answer,
                "release_id": told.release_id,
                "release_version": told.release_version,
                "index_build": told.index_build,
            }
        )


def _touched(lake: Lake, start: datetime, end: datetime, settings: Settings) -> list[_Landed]:
    """All events so far of the completions that have one in the interval."""
    keys = CompletionKeys(settings.completion_key)
    ids = set(lake.read(BRONZE_EVENTS, ["completion_id"], where=_within(start, end))["completion_id"].to_pylist())
    if not ids:
        return []
    since = _day(start)
    for completion_id in ids:
        try:
            asked = keys.verify(completion_id, None).at
        except SourceError:
            continue
        # No event of a completion is older than its id: older partitions needn't be read.
        since = min(since, _day(asked))
    since_then = lake.read(BRONZE_EVENTS, ["completion_id", "payload", "segment"], where=pc.field("date") >= since)
    # Not in `where`: Arrow can't compare `isin` with the string statistics of Delta files.
    rows = since_then.filter(pc.is_in(since_then["completion_id"], pa.array(sorted(ids), pa.string()))).to_pylist()
    landed = []
    for row in rows:
        event = parse_event(row["payload"])
        assert event.occurred_at is not None
        # When it happened, not now: what a gateway took while a key counted stays when this is run again.
        signed_for = _signed_for(keys, row["completion_id"], event.occurred_at)
        landed.append(_Landed(event, event.occurred_at, row["payload"], row["segment"], signed_for))
    return landed


def _signed_for(keys: CompletionKeys, completion_id: str, at: datetime) -> str | None:
    try:
        return keys.verify(completion_id, at).application
    except SourceError:
        return None


def _refused(events: Iterable[_Landed], application: str) -> dict[str, str]:
    """Event id → why the quality suites refuse it."""
    types: dict[str, pa.DataType] = {"event_id": pa.string(), "signed": pa.bool_(), "own": pa.bool_()}
    feedback = types | {"rating": pa.float64(), "comment": pa.string(), "correction": pa.string()}
    exchanges = (
        types
        | {name: pa.string() for name in ("kind", "user", "question", "release_version")}
        | {name: pa.float64() for name in ("assignment_probability", "seconds", "cost_usd")}
        | {name: pa.int64() for name in ("prompt_tokens", "completion_tokens")}
    )
    rows: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for one in events:
        about = {
            "signed": one.signed_for is not None,
            "own": one.signed_for in (None, application) and one.event.application == application,
        }
        rows[isinstance(one.event, Feedback)].append(one.event.model_dump() | about)
    return quality.refused(_batch(rows[True], feedback), quality.FEEDBACK) | quality.refused(
        _batch(rows[False], exchanges), quality.EXCHANGES
    )


def _batch(rows: list[dict[str, Any]], types: Mapping[str, pa.DataType]) -> pa.Table:
    return pa.Table.from_pylist([{name: row.get(name) for name in types} for row in rows], schema=pa.schema(types))


def _bronze(lines: Iterable[Line]) -> pa.Table:
    """Rows of `bronze/events`; a line that occurs twice occurs once."""
    rows = {
        line.event.event_id: {
            "event_id": line.event.event_id,
            "kind": line.event.kind,
            "completion_id": line.event.completion_id,
            "occurred_at": line.at,
            "date": _day(line.at),
            "payload": line.text,
            "segment": line.segment,
        }
        for line in lines
        if line.event is not None
    }
    return pa.Table.from_pylist(list(rows.values()), schema=BRONZE_EVENTS.rows_schema)


def _hashed(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"content_hash": content_hash(json.dumps(row, sort_keys=True, default=str))}


def _within(start: datetime, end: datetime) -> pc.Expression:
    at, day = pc.field("occurred_at"), pc.field("date")
    return (at >= start) & (at < end) & (day >= _day(start)) & (day <= _day(end))


def _day(at: datetime) -> date:
    return at.astimezone(UTC).date()


def _interval(start: datetime, end: datetime) -> tuple[datetime, datetime]:
    if start.tzinfo is None or end.tzinfo is None or start >= end:
        raise SourceError(f"[{start}, {end}) is not an interval with a time zone; give start < end, in UTC")
    # Airflow's are of a class of its own, which forgets its time zone where a time is taken from it.
    return datetime.fromtimestamp(start.timestamp(), UTC), datetime.fromtimestamp(end.timestamp(), UTC)


def _interval_of(at: datetime, start: datetime, end: datetime) -> datetime:
    """Where the interval of `at` starts, as long as [start, end): what came late is reported as it would have been."""
    return start + (at - start) // (end - start) * (end - start)


def _wait_for_writers(end: datetime) -> None:
    past = (now() - end).total_seconds()
    if 0 <= past < SETTLE:
        time.sleep(SETTLE - past)
