"""Which windows a run has to look at: those that its interval touches, and those in which something arrived late.

A window is a fixed piece of UTC time (an hour, unless the policy says otherwise), the same whatever intervals the
schedule has. A rating belongs to the window of its exchange, a week long. What arrives after its window was looked
at (feedback of hours later, an ingestion that was down) is found in the change feeds of silver, behind a cursor that
the last step of a run moves: a run that dies in between leaves its late windows to the next one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import groupby
from typing import Any

from millrace.errors import FeedGone, MillraceError, SourceError
from millrace.lakehouse.cursors import move_cursor, read_cursor
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_EXCHANGES, SILVER_FEEDBACK, Table
from millrace.sources.completion_id import CompletionKeys

READER = "monitor"
"""Name of the cursors."""
LATEST_RATING = timedelta(days=7)
"""After its exchange. A later rating is not counted, so that an old window can be read without all that followed."""
WATCHED: tuple[Table, ...] = (SILVER_EXCHANGES, SILVER_FEEDBACK)
MISSING = -1
"""Version of a table that isn't there yet: all that comes into it comes after."""


@dataclass(frozen=True, order=True)
class Window:
    """[start, end), UTC, within one day."""

    start: datetime
    end: datetime

    @property
    def date(self) -> date:
        return self.start.date()


def window_at(moment: datetime, minutes: int) -> Window:
    """The window of `minutes` that `moment` lies in."""
    moment = moment.astimezone(UTC)
    # Plain times, whatever `moment` is: Airflow's, subtracted, don't divide.
    midnight = datetime(moment.year, moment.month, moment.day, tzinfo=UTC)
    start = midnight + timedelta(minutes=(moment.hour * 60 + moment.minute) // minutes * minutes)
    return Window(start, start + timedelta(minutes=minutes))


def touched(start: datetime, end: datetime, minutes: int) -> list[Window]:
    """Every window that [start, end) shares a moment with, in order.

    Raises:
        MillraceError: it is no interval, or has no time zone.
    """
    if start.tzinfo is None or end.tzinfo is None or start >= end:
        raise MillraceError(f"[{start}, {end}) is not an interval with a time zone; give start < end, in UTC")
    found = [window_at(start, minutes)]
    while found[-1].end < end:
        found.append(window_at(found[-1].end, minutes))
    return found


def seen_now(lake: Lake) -> dict[str, int]:
    """Path → present version of each watched table."""
    versions = {table.path: lake.version(table) for table in WATCHED}
    return {path: MISSING if version is None else version for path, version in versions.items()}


def arrived(lake: Lake, minutes: int, completion_keys: CompletionKeys) -> set[Window]:
    """Windows in which an exchange or a rating arrived or changed since the cursors.

    Nothing before the first run: what lies behind it is for a backfill. Nothing either where a change feed no longer
    reaches back.
    """
    asked = [row["occurred_at"] for row in _changed(lake, SILVER_EXCHANGES)]
    rated = [_asked_at(row, completion_keys) for row in _changed(lake, SILVER_FEEDBACK)]
    return {window_at(moment, minutes) for moment in [*asked, *rated] if moment is not None}


def move_on(lake: Lake, seen: Mapping[str, int], *, run: str) -> None:
    """Record that everything up to the versions `seen` has been looked at."""
    for table in WATCHED:
        since = read_cursor(lake, READER, table)
        if since is None or since < seen[table.path]:
            move_cursor(lake, READER, table, seen[table.path], run=run)


def by_date(windows: Iterable[Window]) -> dict[date, list[Window]]:
    """The windows of each day, in order."""
    return {day: list(those) for day, those in groupby(sorted(windows), key=lambda window: window.date)}


def as_text(windows: Iterable[Window]) -> list[list[str]]:
    """For handing windows from task to task."""
    return [[window.start.isoformat(), window.end.isoformat()] for window in sorted(windows)]


def from_text(windows: Iterable[Iterable[str]]) -> list[Window]:
    return [Window(*(datetime.fromisoformat(moment) for moment in window)) for window in windows]


def _changed(lake: Lake, table: Table) -> list[dict[str, Any]]:
    since = read_cursor(lake, READER, table)
    if since is None or not lake.exists(table):
        return []
    try:
        feed = lake.changes(table, since)
    except FeedGone:
        # Vacuumed. Those windows can still be made right, by a backfill.
        return []
    rows: list[dict[str, Any]] = feed.select(["completion_id", "occurred_at"]).to_pylist()
    return rows


def _asked_at(row: Mapping[str, Any], keys: CompletionKeys) -> datetime | None:
    """When the exchange of a rating began, by its id alone; None: the rating is too late to count."""
    try:
        asked = keys.verify(row["completion_id"], row["occurred_at"]).at
    except SourceError:
        return None
    return asked if row["occurred_at"] - asked <= LATEST_RATING + timedelta(seconds=1) else None
