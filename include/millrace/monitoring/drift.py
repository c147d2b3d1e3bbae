"""Do users ask, and do releases answer, as they did the week before? Two-sample tests per window: `gold/drift_hourly`.

Compared are distributions (two-sample Kolmogorov-Smirnov, scipy) of cheap columns: of questions, whatever answered
them, their length and the share of their words that are new; of each release, its answers' length and seconds. The
unit is a user, with one exchange on each side, since what one user sends is not independent. p-values of a window
are corrected together (Benjamini & Hochberg, JRSS B 57, 1995), which keeps the probability that a window without any
drift is called drifted at most `drift_error_rate`, as long as users are exchangeable; a distance below `drift_size`
is no drift, however certain. The reference is a bounded, deterministic sample of the week before, the newest days
first. Nothing here says whether what drifted is bad: bounds on quality do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from millrace.applications import Application
from millrace.lakehouse.content import content_hash
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import GOLD_DRIFT_HOURLY
from millrace.monitoring.metrics import hashed, replace_windows
from millrace.monitoring.observed import Exchange, read_exchanges
from millrace.monitoring.windows import Window, by_date, from_text
from millrace.policies import Monitor
from millrace.settings import Settings

Floats = npt.NDArray[np.float64]

REFERENCE_DAYS = 7
QUESTIONS = "-"
"""Stands for a release where users' questions are compared."""
DRIFTED, SAME, TOO_FEW = "drifted", "same", "too few"


@dataclass(frozen=True)
class Compared:
    """One column of one window against the reference."""

    column: str
    users: int
    reference_users: int
    statistic: float | None = None
    p_value: float | None = None
    adjusted: float | None = None
    verdict: str = TOO_FEW


def measure_drift(
    settings: Settings, application: Application, measured: Mapping[str, Any], *, run: str, now: datetime
) -> dict[str, Any]:
    """Compare every window that is over with the week before it.

    Args:
        measured: as `measure` returns it.

    Returns: `rows` written or removed, `drifted` (how many comparisons), `changed`.
    """
    lake = Lake.of(settings, application.name)
    changed = drifted = 0
    over = [window for window in from_text(measured["windows"]) if window.end <= now]
    for those in by_date(over).values():
        rows = [row for window in those for row in _window(lake, window, application.monitor)]
        drifted += sum(row["verdict"] == DRIFTED for row in rows)
        changed += replace_windows(lake, GOLD_DRIFT_HOURLY, those, rows, run=run)
    return {"rows": changed, "drifted": drifted, "changed": changed > 0}


def _window(lake: Lake, window: Window, policy: Monitor) -> list[dict[str, Any]]:
    exchanges = [one for one in read_exchanges(lake, window) if not one.pinned]
    if not exchanges:
        return []
    found = compare_window(exchanges, _reference(lake, window, policy), policy)
    simulated = any(one.simulated for one in exchanges)
    return [
        hashed(window, {"release_id": release_id, "simulated": simulated} | vars(compared))
        for release_id, compared in found
    ]


def _reference(lake: Lake, window: Window, policy: Monitor) -> list[Exchange]:
    """Exchanges before the window, whole days from the newest on, until they hold enough users; at least a day."""
    found: list[Exchange] = []
    end = window.start
    first = window.start - timedelta(days=REFERENCE_DAYS)
    while end > first:
        start = max(first, (end - timedelta(microseconds=1)).replace(hour=0, minute=0, second=0, microsecond=0))
        found += [one for one in read_exchanges(lake, Window(start, end)) if not one.pinned]
        end = start
        if window.start - end >= timedelta(days=1) and len({one.user for one in found}) >= policy.drift_reference:
            break
    return found


def compare_window(
    exchanges: Sequence[Exchange], reference: Sequence[Exchange], policy: Monitor
) -> list[tuple[str, Compared]]:
    """Pure: every comparison of a window, with the release that it is about, corrected together."""
    found: list[tuple[str, Compared]] = []
    before = _one_each(reference, policy.drift_reference)
    vocabulary, rest = _split(before)
    new_words: Callable[[Exchange], float | None] = lambda one: _novelty(one.question, vocabulary)  # noqa: E731
    now = _one_each(exchanges)
    known = {one.user for one in before[: len(before) // 2]}  # who gave the vocabulary: nothing of theirs is new to it
    others = [one for one in now if one.user not in known]
    found.append((QUESTIONS, _compare("question_words", now, before, lambda one: len(one.question.split()), policy)))
    found.append((QUESTIONS, _compare("question_new_words", others, rest, new_words, policy)))
    for release_id in sorted({one.release_id for one in exchanges}):
        ours = _one_each([one for one in exchanges if one.release_id == release_id and one.completed])
        theirs = _one_each(
            [one for one in reference if one.release_id == release_id and one.completed], policy.drift_reference
        )
        found.append((release_id, _compare("answer_words", ours, theirs, _answer_words, policy)))
        found.append((release_id, _compare("seconds", ours, theirs, _seconds, policy)))
    return _corrected(found, policy)


def _compare(
    column: str,
    now: Sequence[Exchange],
    before: Sequence[Exchange],
    value: Callable[[Exchange], float | None],
    policy: Monitor,
) -> Compared:
    ours, theirs = _values(now, value), _values(before, value)
    if min(ours.size, theirs.size) < policy.drift_minimum:
        return Compared(column, ours.size, theirs.size)
    tested = stats.ks_2samp(ours, theirs, method="auto")
    return Compared(column, ours.size, theirs.size, float(tested.statistic), float(tested.pvalue))


def _corrected(found: list[tuple[str, Compared]], policy: Monitor) -> list[tuple[str, Compared]]:
    tested = [compared.p_value for _, compared in found if compared.p_value is not None]
    adjusted = iter(stats.false_discovery_control(tested).tolist() if tested else [])
    corrected = []
    for release_id, compared in found:
        if compared.p_value is not None and compared.statistic is not None:
            value = float(next(adjusted))
            drifted = value <= policy.drift_error_rate and compared.statistic >= policy.drift_size
            compared = Compared(**vars(compared) | {"adjusted": value, "verdict": DRIFTED if drifted else SAME})
        corrected.append((release_id, compared))
    return corrected


def _one_each(exchanges: Sequence[Exchange], most: int | None = None) -> list[Exchange]:
    """One exchange a user, and at most so many users: chosen by hash, so that the same ones are chosen every time."""
    chosen: dict[str, tuple[str, Exchange]] = {}
    for one in exchanges:
        rank = content_hash(one.completion_id)
        if one.user not in chosen or rank < chosen[one.user][0]:
            chosen[one.user] = (rank, one)
    return [one for _, one in sorted(chosen.values(), key=lambda ranked: ranked[0])][:most]


def _split(exchanges: Sequence[Exchange]) -> tuple[frozenset[str], list[Exchange]]:
    """Words of one half, and the other half: whose questions are as new to those words as a later user's."""
    half = len(exchanges) // 2
    words = frozenset(word for one in exchanges[:half] for word in one.question.lower().split())
    return words, list(exchanges[half:])


def _novelty(question: str, vocabulary: frozenset[str]) -> float | None:
    words = question.lower().split()
    return sum(word not in vocabulary for word in words) / len(words) if words else None


def _answer_words(one: Exchange) -> float | None:
    return None if one.answer is None else len(one.answer.split())


def _seconds(one: Exchange) -> float | None:
    """Of answers that were computed: the share that a cache gave says nothing of the release."""
    return None if one.from_cache else one.seconds


def _values(exchanges: Sequence[Exchange], value: Callable[[Exchange], float | None]) -> Floats:
    return np.array([found for one in exchanges if (found := value(one)) is not None], dtype=np.float64)
