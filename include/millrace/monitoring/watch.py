"""The last step of a monitor's run: breaches written down once, told once, and turned into what the policy names.

Which metric is beyond its bound is `bounds.py`'s business. What a retraining, a re-embedding or a rollback is, the
stages that hear of it know: here only its name leaves.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from millrace.alerts import Alert, send
from millrace.applications import Application
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import GOLD_DRIFT_HOURLY, OPS_BREACHES
from millrace.monitoring.bounds import Breach, bounds_of, breaches
from millrace.monitoring.drift import QUESTIONS
from millrace.monitoring.observed import read_windows
from millrace.monitoring.windows import Window, by_date, from_text, move_on
from millrace.policies import ACTS_WITHIN
from millrace.releases.published_split import answering_now
from millrace.settings import Settings

OF_WHO_ANSWERS = ("retrain", "reembed")
"""A release that is gone needs them no more; whom a rollback is about, the rollout looks for itself."""
STARTED = (*OF_WHO_ANSWERS, "rollback")
"""Actions that other stages hear of."""


def check(
    settings: Settings,
    application: Application,
    measured: Mapping[str, Any],
    *,
    run: str,
    now: datetime,
    answering: Callable[[Settings, str], Collection[str]] = answering_now,
) -> dict[str, Any]:
    """Hold every window that is over against the bounds; alert of new breaches, write them down, and record that silver
    was looked at.

    A breach is told before it is written: a run that is killed in between tells it again, and none is lost.

    Args:
        measured: as `measure` returns it.
        answering: which versions users are given now; asked only if a breach's action is about one of them.

    Returns: `breaches` found for the first time, `actions` that this run, repeated or not, must start.

    Raises:
        ReleaseError: which release answers must be known, and MLflow doesn't say.
    """
    lake = Lake.of(settings, application.name)
    over = [window for window in from_text(measured["windows"]) if window.end <= now]
    known = _known(lake, over, application)
    new = [breach for breach in _found(lake, application, over) if breach.breach_id not in known]
    for breach in new:
        if now - breach.interval_end <= ACTS_WITHIN:
            _tell(settings, application, breach)
    asking = {b.action for b in new} | {row["action"] for row in known.values() if row["written_by"] == run}
    # Before anything is written: where it can't be known, the next run finds the breach again.
    now_answering = answering(settings, application.name) if asking & set(OF_WHO_ANSWERS) else ()
    rows = [{"date": breach.interval_start.date(), "at": now} | vars(breach) for breach in new]
    if rows:
        lake.merge(OPS_BREACHES, pa.Table.from_pylist(rows, schema=OPS_BREACHES.rows_schema), run=run)
        known = _known(lake, over, application)
    move_on(lake, measured["seen"], run=run)
    ours = [row for row in known.values() if row["written_by"] == run and row["interval_start"] in _starts(over)]
    quiet = timedelta(hours=application.monitor.quiet_hours)
    actions = {
        row["action"]
        for row in ours
        if row["action"] in STARTED
        and (row["action"] not in OF_WHO_ANSWERS or row["release_version"] in (QUESTIONS, *now_answering))
        and _acts(row, known.values(), quiet, now)
    }
    return {"breaches": len(new), "actions": [action for action in STARTED if action in actions]}


def _found(lake: Lake, application: Application, windows: Iterable[Window]) -> list[Breach]:
    found = []
    for day, those in by_date(windows).items():
        observed = read_windows(lake, day, those)
        drift = lake.read(GOLD_DRIFT_HOURLY, where=pc.field("date") == day).to_pylist()
        for window in those:
            rows = [row for row in drift if Window(row["interval_start"], row["interval_end"]) == window]
            found += breaches(window, observed[window], rows, bounds_of(application), application.monitor.confidence)
    return found


def _known(lake: Lake, windows: Sequence[Window], application: Application) -> dict[str, dict[str, Any]]:
    """Breaches of these windows, and of the time before in which the same one keeps an action quiet."""
    if not windows:
        return {}
    since = min(window.start for window in windows) - timedelta(hours=application.monitor.quiet_hours)
    until = max(window.start for window in windows)
    where = (pc.field("date") >= since.date()) & (pc.field("date") <= until.date())
    return {row["breach_id"]: row for row in lake.read(OPS_BREACHES, where=where).to_pylist()}


def _acts(row: Mapping[str, Any], known: Iterable[Mapping[str, Any]], quiet: timedelta, now: datetime) -> bool:
    """Whether this breach starts its action: it is recent, and the same one, as recent when it was found, was not there
    shortly before.

    A rollback is never held back: the rollout acts on each breach once, and only against who answers now.
    """
    start = row["interval_start"]
    if now - row["interval_end"] > ACTS_WITHIN:
        return False
    return row["action"] == "rollback" or not any(
        (other["release_id"], other["bound"]) == (row["release_id"], row["bound"])
        and start - quiet <= other["interval_start"] < start
        and other["at"] - other["interval_end"] <= ACTS_WITHIN
        for other in known
    )


def _starts(windows: Iterable[Window]) -> set[datetime]:
    return {window.start for window in windows}


def _tell(settings: Settings, application: Application, breach: Breach) -> None:
    about = "users' questions" if breach.release_version == "-" else f"version {breach.release_version}"
    acts = {"alert": ""}.get(breach.action, f"; the policy asks for {breach.action}")
    send(
        Alert(
            title=f"{application.name}: {about}: {breach.bound}",
            what=f"{breach.interval_start:%Y-%m-%d %H:%M} to {breach.interval_end:%H:%M} UTC: {breach.reason}{acts}",
            source=f"{application.name}.monitor, breach {breach.breach_id}",
            runbook=f"{settings.airflow_url}/dags/{application.name}.monitor",
        ),
        settings,
    )
