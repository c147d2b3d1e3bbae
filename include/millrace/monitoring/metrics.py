"""Metrics of each window, per release and index build: `gold/metrics_hourly`.

A window's rows are a function of silver alone and replace each other, so that any run may make them, again and in
any order. The cost of a run is that of its windows' days, whatever lies before them.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa

from millrace.applications import Application
from millrace.lakehouse.content import content_hash
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import GOLD_METRICS_HOURLY, Table
from millrace.monitoring.observed import Exchange, read_windows
from millrace.monitoring.windows import Window, arrived, as_text, by_date, seen_now, touched
from millrace.settings import Settings
from millrace.sources.completion_id import CompletionKeys


def measure(
    settings: Settings, application: Application, start: datetime, end: datetime, *, run: str
) -> dict[str, Any]:
    """Bring the metrics of every window that [start, end) touches, or in which something arrived late, up to silver.

    Returns: `windows` (start and end of each, as text) and `seen` (versions of silver), for `drift` and `check`;
    `rows` written or removed, `changed`.

    Raises:
        MillraceError: the interval is empty or has no time zone.
        SettingsError: there is no completion key to tell by when a late rating's exchange began.
    """
    lake = Lake.of(settings, application.name)
    keys = CompletionKeys(settings.completion_key)
    minutes = application.monitor.minutes
    windows = set(touched(start, end, minutes))
    rows = 0
    while True:
        seen = seen_now(lake)
        windows |= arrived(lake, minutes, keys)
        rows += _write(lake, windows, run)
        # Whoever writes last has read silver as it is now: of two runs, the slow one doesn't leave an older state.
        if seen_now(lake) == seen:
            return {"windows": as_text(windows), "seen": seen, "rows": rows, "changed": rows > 0}


def _write(lake: Lake, windows: Iterable[Window], run: str) -> int:
    changed = 0
    for day, those in by_date(windows).items():
        observed = read_windows(lake, day, those)
        rows = [row for window in those for row in metrics_of(window, observed[window])]
        changed += replace_windows(lake, GOLD_METRICS_HOURLY, those, rows, run=run)
    return changed


def replace_windows(
    lake: Lake, table: Table, windows: Sequence[Window], rows: list[dict[str, Any]], *, run: str
) -> int:
    """Make what `table` has of these windows of one day equal to `rows`; returns how many rows that changed."""
    if not rows and not lake.exists(table):
        return 0
    spans = " OR ".join(
        f"(target.interval_start = TIMESTAMP '{_sql(window.start)}' AND target.interval_end = "
        f"TIMESTAMP '{_sql(window.end)}')"
        for window in windows
    )
    written = lake.merge(
        table,
        pa.Table.from_pylist(rows, schema=table.rows_schema),
        run=run,
        delete_unmatched=f"target.date = DATE '{windows[0].date}' AND ({spans})",
    )
    return written.inserted + written.updated + written.deleted


@dataclass(frozen=True)
class Summary:
    """Metrics of one release and index build in one window; the columns of `gold/metrics_hourly`."""

    exchanges: int
    simulated: int
    pinned: int
    failed: int
    left_early: int
    unfinished: int
    fell_back: int
    from_cache: int
    errors: int
    rated: int
    feedback_rate: float | None
    rating_mean: float | None
    seconds_mean: float | None
    seconds_p50: float | None
    seconds_p95: float | None
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float


def summarise(exchanges: Sequence[Exchange]) -> Summary:
    """Pure: the metrics of these exchanges."""
    completed = [one for one in exchanges if one.completed]
    ratings = [one.rating for one in exchanges if one.rating is not None]
    seconds = np.array([one.seconds for one in completed if one.seconds is not None])
    p50, p95 = np.quantile(seconds, [0.5, 0.95]).tolist() if seconds.size else (None, None)
    return Summary(
        exchanges=len(exchanges),
        simulated=sum(one.simulated for one in exchanges),
        pinned=sum(one.pinned for one in exchanges),
        failed=sum(one.failed for one in exchanges),
        left_early=sum(one.left for one in exchanges),
        unfinished=sum(one.state == "accepted" for one in exchanges),
        fell_back=sum(one.fell_back for one in exchanges),
        from_cache=sum(one.from_cache for one in exchanges),
        errors=sum(one.error is not None and not one.left for one in exchanges),
        rated=len(ratings),
        feedback_rate=sum(one.rating is not None for one in completed) / len(completed) if completed else None,
        rating_mean=float(np.mean(ratings)) if ratings else None,
        seconds_mean=float(seconds.mean()) if seconds.size else None,
        seconds_p50=p50,
        seconds_p95=p95,
        prompt_tokens=sum(one.prompt_tokens for one in exchanges),
        completion_tokens=sum(one.completion_tokens for one in exchanges),
        cost_usd=sum(one.cost_usd for one in exchanges),
    )


def metrics_of(window: Window, exchanges: Sequence[Exchange]) -> list[dict[str, Any]]:
    """The rows of one window, one for each release and index build."""
    groups: dict[tuple[str, str], list[Exchange]] = defaultdict(list)
    for one in exchanges:
        groups[one.release_id, one.index_build].append(one)
    return [
        hashed(
            window,
            {"release_id": release_id, "index_build": build, "release_version": those[-1].release_version}
            | vars(summarise(those)),
        )
        for (release_id, build), those in sorted(groups.items())
    ]


def hashed(window: Window, row: dict[str, Any]) -> dict[str, Any]:
    """`row` with its window and with the hash of it all, by which an unchanged window writes nothing."""
    row = {"date": window.date, "interval_start": window.start, "interval_end": window.end} | row
    return row | {"content_hash": content_hash(json.dumps(row, sort_keys=True, default=str))}


def _sql(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M:%SZ")
