"""What no metric shows: data that stopped coming in, runs that failed without a word, alerts that reached nobody, and a
disk that is running full. Each alerts, and repeats itself.

It is told by whoever schedules whether runs succeeded; it does not know Airflow.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from croniter import croniter

from millrace.alerts import Alert, said_since, send, send_again
from millrace.applications import Application, Deadlines
from millrace.settings import Settings

BRINGS_DATA = ("ingest_documents", "ingest_feedback")
"""Stages with data intervals; without them everything after works on old data."""
MISSED = 3
"""Intervals in a row without a success after which data is stale."""
FREE_SHARE = 0.1
"""Of the disk that holds the home; less is an alert. A compaction alone may take some percent for a while."""

TELLS_BEFORE = timedelta(minutes=10)
"""A task tells of its failure at most this long before its run counts as failed."""

Succeeded = Callable[[str, Sequence[datetime] | None], int]
"""DAG id, logical dates (None: any) → how many of its runs succeeded."""
Failed = Callable[[str], int]
"""DAG id → how many of its runs failed."""


def check_health(
    settings: Settings,
    application: Application,
    succeeded: Succeeded,
    failed: Failed,
    *,
    before: Mapping[str, Any],
    now: datetime,
) -> dict[str, Any]:
    """Alert of stages that stopped bringing data, of runs that failed, and of a disk that is nearly full; and send
    alerts again that reached nobody.

    A stage that never succeeded has not been started yet, and is nobody's trouble. A task tells of its own failure;
    one whose process was killed (for memory, with its machine) can't, and its run is told of here.

    Args:
        before: what the look before returned; empty: there was none. A DAG that it has no count of is counted from now
            on.

    Returns: `at` (ISO 8601), `stale` (DAG ids), `failed` (DAG id → runs that failed), `disk_free` (share of the home's
        disk).
    """
    stale = [
        dag
        for stage in BRINGS_DATA
        if succeeded(dag := f"{application.name}.{stage}", None)
        and not succeeded(dag, last_intervals(getattr(application.schedules, stage), now))
    ]
    for dag in stale:
        what = f"none of its last {MISSED} intervals was brought in; what follows works on older data"
        _tell(settings, application, f"{dag} is stale", what, dag)
    counts = {dag: failed(dag) for dag in (f"{application.name}.{stage}" for stage in Deadlines.model_fields)}
    for dag, count in counts.items():
        more = count - before.get("failed", {}).get(dag, count)
        looked = datetime.fromisoformat(before.get("at", now.isoformat()))
        if more > 0 and not said_since(settings, dag, looked - TELLS_BEFORE):
            why = "a process was killed (is memory short?), or its worker was lost"
            what = f"{more} more of its runs failed, and no task said why: {why}"
            _tell(settings, application, f"{dag} failed", what, dag)
    send_again(settings, now=now)
    disk = shutil.disk_usage(settings.home)
    free = disk.free / disk.total
    if free < FREE_SHARE:
        what = f"{disk.free / 2**30:.1f} GiB of {disk.total / 2**30:.0f} are free; free some before writes are refused"
        title = f"the disk of {settings.home} is nearly full"
        _tell(settings, application, title, what, f"{application.name}.maintain_lakehouse")
    return {"at": now.isoformat(), "stale": stale, "failed": counts, "disk_free": round(free, 3)}


def last_intervals(cron: str, now: datetime) -> list[datetime]:
    """The starts of the last intervals that are over: `MISSED`, and the newest, which may still be at work."""
    ends = croniter(cron, now)
    moments = [ends.get_prev(datetime).astimezone(UTC) for _ in range(MISSED + 2)]
    return moments[1:]


def _tell(settings: Settings, application: Application, title: str, what: str, dag: str) -> None:
    send(Alert(title, what, f"{application.name}.monitor", f"{settings.airflow_url}/dags/{dag}"), settings)
