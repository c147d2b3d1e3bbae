"""What no metric shows: data that stopped coming in, and a disk that is running full. Each alerts, and repeats itself.

It is told by whoever schedules whether runs succeeded; it does not know Airflow.
"""

import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from croniter import croniter

from millrace.alerts import Alert, send
from millrace.applications import Application
from millrace.settings import Settings

BRINGS_DATA = ("ingest_documents", "ingest_feedback")
"""Stages with data intervals; without them everything after works on old data."""
MISSED = 3
"""Intervals in a row without a success after which data is stale."""
FREE_SHARE = 0.1
"""Of the disk that holds the home; less is an alert. A compaction alone may take some percent for a while."""

Succeeded = Callable[[str, Sequence[datetime] | None], int]
"""DAG id, logical dates (None: any) → how many of its runs succeeded."""


def check_health(
    settings: Settings, application: Application, succeeded: Succeeded, *, now: datetime
) -> dict[str, Any]:
    """Alert of stages that stopped bringing data, and of a disk that is nearly full.

    A stage that never succeeded has not been started yet, and is nobody's trouble.

    Returns: `stale` (DAG ids), `disk_free` (share of the home's disk).
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
    disk = shutil.disk_usage(settings.home)
    free = disk.free / disk.total
    if free < FREE_SHARE:
        what = f"{disk.free / 2**30:.1f} GiB of {disk.total / 2**30:.0f} are free; free some before writes are refused"
        title = f"the disk of {settings.home} is nearly full"
        _tell(settings, application, title, what, f"{application.name}.maintain_lakehouse")
    return {"stale": stale, "disk_free": round(free, 3)}


def last_intervals(cron: str, now: datetime) -> list[datetime]:
    """The starts of the last intervals that are over: `MISSED`, and the newest, which may still be at work."""
    ends = croniter(cron, now)
    moments = [ends.get_prev(datetime).astimezone(UTC) for _ in range(MISSED + 2)]
    return moments[1:]


def _tell(settings: Settings, application: Application, title: str, what: str, dag: str) -> None:
    send(Alert(title, what, f"{application.name}.monitor", f"{settings.airflow_url}/dags/{dag}"), settings)
