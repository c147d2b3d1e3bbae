"""Uses of API keys for the audit trail: counted in memory, one entry a key, application, outcome and hour.

A gateway answers thousands of requests a second, and a trail with each of them would be as large as the traffic, which
`silver/exchanges` holds already. So one process counts, and an hour that is over becomes one entry a count; several
gateways make one each. What a process counted in the running hour is lost if it is killed.
"""

import threading
import uuid
from collections import Counter
from datetime import UTC, datetime

from millrace.lakehouse.audit.chain import Event, record
from millrace.settings import Settings


class KeyUses:
    """Counts of one process. Safe to use from several threads."""

    def __init__(self) -> None:
        self._process = uuid.uuid4().hex[:12]
        self._cut = 0
        self._lock = threading.Lock()
        self._counts: Counter[tuple[datetime, str, str, str]] = Counter()
        self._waiting: list[Event] = []

    def count(self, key_id: str, application: str, outcome: str, *, at: datetime | None = None) -> None:
        """One use of a key: `outcome` is what it let in for (its scope), or `refused`; `at`: now, unless said."""
        hour = (at or datetime.now(UTC)).replace(minute=0, second=0, microsecond=0)
        with self._lock:
            self._counts[hour, key_id, application, outcome] += 1

    def flush(self, settings: Settings, *, run: str, now: datetime | None = None) -> int:
        """Append the hours that are over at `now`; None: all, because the process ends. How many entries those were.
        What could not be appended waits for the next flush, and is never counted twice.

        Raises:
            LakehouseError: the trail can't be written.
        """
        with self._lock:
            hour = now and now.replace(minute=0, second=0, microsecond=0)
            due = [counted for counted in self._counts if hour is None or counted[0] < hour]
            # An hour may be cut twice, by a clock that was set back: the number tells its entries apart.
            self._cut += bool(due)
            self._waiting += [self._event(*counted, uses=self._counts.pop(counted)) for counted in sorted(due)]
            waiting = list(self._waiting)
        if not waiting:
            return 0
        appended = record(settings, waiting, run=run)
        done = {event.event_id for event in waiting}
        with self._lock:
            self._waiting = [event for event in self._waiting if event.event_id not in done]
        return appended

    def _event(self, hour: datetime, key_id: str, application: str, outcome: str, *, uses: int) -> Event:
        return Event(
            event_id=f"key/{key_id}/{application}/{outcome}/{hour:%Y-%m-%dT%H}/{self._process}/{self._cut}",
            occurred_at=hour,
            actor=f"key/{key_id}",
            action="key_use",
            application=application,
            resource=f"key/{key_id}",
            outcome=outcome,
            run=f"gateway/{self._process}",
            details={"uses": uses},
        )
