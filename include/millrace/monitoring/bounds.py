"""Which metrics of a window are beyond what the policy allows, with enough certainty to say so. Pure.

A bound is on the metric that users would show in the long run, of which a window is a sample: it breaches when the
one-sided confidence bound is beyond it, so that a metric exactly at its bound breaches a window with probability at
most 1 - `confidence`, and one on the right side of it more rarely. Shares: exact (Clopper & Pearson 1934). The 95th
percentile: by order statistics (Conover 1999, §3.2), exact too. Means of ratings, over users, and of costs: Student's
t, which is approximate; of ratings never narrower than what that many equal ones can show. All rest on exchanges
(users) that don't depend on one another: an incident that hits many at once is one event, and is meant to be found.
What failed is counted by users, each by the last exchange: one who tries again and again is one.
Exchanges that a caller pinned to a release are left out: they say nothing of what users are given. Where the champion
answered because the challenger failed, that is held against the challenger, and the time it took against nobody.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from millrace.applications import Application
from millrace.lakehouse.content import content_hash
from millrace.monitoring.drift import DRIFTED, QUESTIONS
from millrace.monitoring.observed import Exchange
from millrace.monitoring.windows import Window
from millrace.policies import Bound

Floats = npt.NDArray[np.float64]

SHARES = ("failed_share", "unfinished_share", "fell_back_share", "feedback_rate")
OF_USERS = ("failed_share", "unfinished_share", "fell_back_share", "rating_mean")


@dataclass(frozen=True)
class Breach:
    """One row of `ops/breaches`, but for the date and the moment at which it was found."""

    breach_id: str
    interval_start: datetime
    interval_end: datetime
    release_id: str
    release_version: str
    metric: str
    bound: str
    value: float
    action: str
    reason: str
    simulated: bool


def bounds_of(application: Application) -> tuple[Bound, ...]:
    """The declared bounds, or the default ones: loose ones on what no application wants."""
    declared = application.monitor.bounds
    if declared is not None:
        return declared
    return (
        Bound(metric="failed_share", above=0.2, action="rollback"),
        Bound(metric="unfinished_share", above=0.2),
        Bound(metric="fell_back_share", above=0.2),
        Bound(metric="seconds_p95", above=application.rollout.latency_budget_seconds),
        Bound(metric="rating_mean", below=0.4, action="retrain"),
        Bound(metric="feedback_rate", below=0.01, minimum=500),
        Bound(metric="cost_per_exchange", above=0.01),
        Bound(metric="drift", above=0),
    )


def breaches(
    window: Window,
    exchanges: Sequence[Exchange],
    drift: Sequence[dict[str, Any]],
    bounds: Sequence[Bound],
    confidence: float,
) -> list[Breach]:
    """Every breach of one window.

    Args:
        exchanges: of the window, in order, with ratings.
        drift: the window's rows of `gold/drift_hourly`.
        confidence: of the one-sided intervals.
    """
    releases: dict[str, list[Exchange]] = defaultdict(list)
    for one in exchanges:
        if not one.pinned:
            releases[one.release_id].append(one)
    assigned = _assigned([one for one in exchanges if not one.pinned])
    found = []
    for bound in bounds:
        if bound.metric == "drift":
            found += _drifted(window, releases, drift, bound)
            continue
        for release_id, those in sorted((assigned if bound.metric == "fell_back_share" else releases).items()):
            told = _beyond(bound, those, confidence)
            if told is not None:
                found.append(_breach(window, bound, release_id, those, *told))
    return found


def _assigned(exchanges: Sequence[Exchange]) -> dict[str, list[Exchange]]:
    """Exchanges by the release that should have answered; one that never did has its rollout for an id."""
    known = {one.release_version: one.release_id for one in exchanges}
    found: dict[str, list[Exchange]] = defaultdict(list)
    for one in exchanges:
        if not one.fell_back:
            found[one.release_id].append(one)
        elif one.challenger:
            found[known.get(one.challenger, f"rollout {one.rollout_id}")].append(one)
    return found


def _beyond(bound: Bound, exchanges: Sequence[Exchange], confidence: float) -> tuple[float, str] | None:
    """The metric and what is said of it, if it is beyond `bound` for certain; None: it isn't, or nobody can tell."""
    values = observations(bound.metric, exchanges)
    if values.size < bound.minimum:
        return None
    value, near = estimate(bound.metric, values, above=bound.above is not None, confidence=confidence)
    limit = bound.above if bound.above is not None else bound.below
    assert limit is not None
    beyond = near > limit if bound.above is not None else near < limit
    if not beyond:
        return None
    side = "at least" if bound.above is not None else "at most"
    return value, (
        f"{bound.metric} was {value:.4g} on {values.size} {'users' if bound.metric in OF_USERS else 'exchanges'}, "
        f"{side} {near:.4g} with {confidence:.4g} confidence; the policy says not {bound.told.split(' ', 1)[1]}"
    )


def observations(metric: str, exchanges: Sequence[Exchange]) -> Floats:
    """The values of which the metric is share, mean or percentile."""
    completed = [one for one in exchanges if one.completed]
    match metric:
        case "failed_share":
            found = [float(one.failed) for one in _last(one for one in exchanges if one.completed or one.failed)]
        case "unfinished_share":
            found = [float(one.state == "accepted") for one in _last(exchanges)]
        case "fell_back_share":
            found = [float(one.fell_back) for one in _last(exchanges)]
        case "feedback_rate":
            found = [float(one.rating is not None) for one in completed]
        case "seconds_p95":
            found = [one.seconds for one in completed if one.seconds is not None and not one.fell_back]
        case "cost_per_exchange":
            found = [one.cost_usd for one in exchanges]
        case "rating_mean":
            users: dict[str, list[float]] = defaultdict(list)
            for one in exchanges:
                if one.rating is not None:
                    users[one.user].append(one.rating)
            found = [float(np.mean(ratings)) for ratings in users.values()]
        case _:
            raise ValueError(metric)
    return np.array(found, dtype=np.float64)


def _last(exchanges: Iterable[Exchange]) -> Iterable[Exchange]:
    """Each user's."""
    return {one.user: one for one in exchanges}.values()


def estimate(metric: str, values: Floats, *, above: bool, confidence: float) -> tuple[float, float]:
    """The metric, and its one-sided confidence bound: the low one for a bound `above`, else the high one."""
    alternative = "greater" if above else "less"
    if metric in SHARES:
        count = int(values.sum())
        interval = stats.binomtest(count, values.size, alternative=alternative).proportion_ci(confidence, "exact")
        return count / values.size, float(interval.low if above else interval.high)
    if metric == "seconds_p95":
        tested = stats.quantile_test(values, q=0.0, p=0.95, alternative=alternative)
        interval = tested.confidence_interval(confidence)
        near = float(interval.low if above else interval.high)
        # Too few to bound it on that side: then it isn't beyond anything.
        nothing = -np.inf if above else np.inf
        return float(np.quantile(values, 0.95)), nothing if np.isnan(near) else near
    mean = float(values.mean())
    reach = float(stats.t.ppf(confidence, values.size - 1) * values.std(ddof=1) / np.sqrt(values.size))
    if metric == "rating_mean":
        reach = max(reach, 1 - (1 - confidence) ** (1 / values.size))
    return mean, mean - reach if above else mean + reach


def _drifted(
    window: Window, releases: dict[str, list[Exchange]], drift: Sequence[dict[str, Any]], bound: Bound
) -> list[Breach]:
    columns: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in drift:
        if row["verdict"] == DRIFTED:
            columns[row["release_id"]].append(row)
    everybody = [one for those in releases.values() for one in those]
    found = []
    for release_id, rows in sorted(columns.items()):
        those = everybody if release_id == QUESTIONS else releases.get(release_id, [])
        if bound.above is None or len(rows) <= bound.above or len(those) < bound.minimum:
            continue
        told = ", ".join(
            f"{row['column']} (distance {row['statistic']:.2f}, adjusted p {row['adjusted']:.2g}, {row['users']} users "
            f"against {row['reference_users']})"
            for row in sorted(rows, key=lambda row: str(row["column"]))
        )
        found.append(
            _breach(window, bound, release_id, those, float(len(rows)), f"drifted from the week before: {told}")
        )
    return found


def _breach(
    window: Window, bound: Bound, release_id: str, exchanges: Sequence[Exchange], value: float, reason: str
) -> Breach:
    return Breach(
        breach_id=content_hash(window.start.isoformat(), window.end.isoformat(), release_id, bound.told),
        interval_start=window.start,
        interval_end=window.end,
        release_id=release_id,
        release_version=QUESTIONS if release_id == QUESTIONS else _version(bound, exchanges[-1]),
        metric=bound.metric,
        bound=bound.told,
        value=value,
        action=bound.action,
        reason=reason,
        simulated=any(one.simulated for one in exchanges),
    )


def _version(bound: Bound, one: Exchange) -> str:
    return one.challenger or one.release_version if bound.metric == "fell_back_share" else one.release_version
