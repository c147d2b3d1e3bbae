"""Bounds: a breach is certain, by the confidence that the policy states."""

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from millrace.applications import Application
from millrace.monitoring.bounds import bounds_of, breaches, estimate
from millrace.monitoring.observed import Exchange
from millrace.monitoring.windows import Window
from millrace.policies import Bound, Monitor
from millrace.sources.event_log import CLIENT_LEFT
from tests.monitoring.silver import HOUR, NOON

WINDOW = Window(NOON, NOON + HOUR)


def one(n: int, **changed: Any) -> Exchange:
    fields: dict[str, Any] = {
        "completion_id": f"c{n}",
        "occurred_at": NOON,
        "user": f"u{n}",
        "simulated": False,
        "question": "?",
        "answer": "!",
        "state": "completed",
        "error": None,
        "release_id": "rel-1",
        "release_version": "1",
        "index_build": "b",
        "rollout_id": None,
        "pinned": False,
        "fell_back": False,
        "from_cache": False,
        "prompt_tokens": 1,
        "completion_tokens": 1,
        "seconds": 1.0,
        "cost_usd": 0.001,
        "rating": None,
    }
    return Exchange(**fields | changed)


def found(bound: Bound, exchanges: list[Exchange], confidence: float = 0.99) -> list[str]:
    return [breach.release_version for breach in breaches(WINDOW, exchanges, [], [bound], confidence)]


FAILED = Bound(metric="failed_share", above=0.1)


def test_a_share_beyond_its_bound_is_a_breach_only_once_it_is_certain() -> None:
    def failing(n: int, of: int) -> list[Exchange]:
        return [one(i, state="failed" if i < n else "completed", error="broke" if i < n else None) for i in range(of)]

    assert found(FAILED, failing(6, 40)) == []  # 15 %, and it may be less than 10
    assert found(FAILED, failing(60, 400)) == ["1"]
    assert found(FAILED, failing(20, 20)) == [], "fewer than the minimum say nothing"


def test_callers_who_left_and_exchanges_that_were_pinned_are_no_failures() -> None:
    left = [one(i, state="failed", error=CLIENT_LEFT) for i in range(100)]
    pinned = [one(100 + i, state="failed", error="broke", pinned=True) for i in range(100)]
    assert found(FAILED, left + pinned + [one(300 + i) for i in range(50)]) == []


def test_each_release_is_held_against_the_bound_alone() -> None:
    good = [one(i) for i in range(100)]
    bad = [
        one(100 + i, state="failed", error="broke", release_id="rel-2", release_version="2", index_build=f"b{i % 2}")
        for i in range(100)
    ]
    (breach,) = breaches(WINDOW, good + bad, [], [FAILED], 0.999)
    assert (breach.release_id, breach.release_version, breach.value) == ("rel-2", "2", 1.0)
    assert "failed_share was 1 on 100 users, at least 0.93" in breach.reason
    assert breach.reason.endswith("the policy says not above 0.1")
    again = breaches(WINDOW, bad, [], [FAILED], 0.999)
    assert [b.breach_id for b in again] == [breach.breach_id]


def test_a_slow_tail_costs_and_ratings_have_bounds_of_their_own() -> None:
    slow = [one(i, seconds=20.0 if i % 5 == 0 else 1.0, cost_usd=0.5, rating=0.1) for i in range(200)]
    for bound, breached in (
        (Bound(metric="seconds_p95", above=10), True),
        (Bound(metric="seconds_p95", above=30), False),
        (Bound(metric="cost_per_exchange", above=0.4), True),
        (Bound(metric="cost_per_exchange", above=0.6), False),
        (Bound(metric="rating_mean", below=0.3), True),
        (Bound(metric="rating_mean", below=0.05), False),
        (Bound(metric="feedback_rate", below=0.5), False),
        (Bound(metric="feedback_rate", above=0.5), True),
    ):
        assert bool(found(bound, slow)) == breached, bound.told


def test_a_user_who_rates_often_counts_once() -> None:
    loud = [one(i, user="loud", rating=0.0) for i in range(500)]
    calm = [one(1000 + i, rating=0.9) for i in range(40)]
    assert found(Bound(metric="rating_mean", below=0.5), loud + calm) == []


@pytest.mark.parametrize(
    ("metric", "broken"),
    [
        ("failed_share", {"state": "failed", "error": "broke"}),
        ("unfinished_share", {"state": "accepted"}),
        ("fell_back_share", {"fell_back": True, "rollout_id": "r", "challenger": "1"}),
    ],
)
def test_one_client_that_tries_again_and_again_is_one(metric: Any, broken: dict[str, Any]) -> None:
    retried = [one(1000 + i, user="script", **broken) for i in range(60)]
    assert found(Bound(metric=metric, above=0.1), [one(i) for i in range(100)] + retried) == []
    assert found(Bound(metric=metric, above=0.1), [one(i, **broken) for i in range(100)]) == ["1"]


def test_a_challenger_that_breaks_is_not_held_against_the_champion_that_answers_for_it() -> None:
    own = [one(i) for i in range(100)]
    instead = [
        one(100 + i, fell_back=True, rollout_id="r", challenger="2", seconds=31.0, error="hung") for i in range(100)
    ]
    bounds = [Bound(metric="fell_back_share", above=0.2), Bound(metric="seconds_p95", above=10), FAILED]
    (breach,) = breaches(WINDOW, own + instead, [], bounds, 0.999)
    assert (breach.metric, breach.release_version, breach.release_id) == ("fell_back_share", "2", "rollout r")
    answered = [one(200 + i, release_id="rel-2", release_version="2", rollout_id="r") for i in range(20)]
    (breach,) = breaches(WINDOW, own + instead + answered, [], bounds, 0.999)
    assert (breach.release_id, breach.release_version, breach.value) == ("rel-2", "2", 100 / 120)


@pytest.mark.parametrize("healed", [False, True])
def test_a_users_last_exchange_is_the_last_in_time_whoever_answered_it(healed: bool) -> None:
    broken = {"fell_back": True, "rollout_id": "r", "challenger": "2"}
    answered = {"release_id": "rel-2", "release_version": "2", "rollout_id": "r"}
    first, last = (broken, answered) if healed else (answered, broken)
    # Whose exchange comes first in the window doesn't matter either.
    for before in ({}, answered):
        users = [one(1000, **before), *(one(i, **first) for i in range(60)), *(one(i, **last) for i in range(60))]
        assert found(Bound(metric="fell_back_share", above=0.2), users) == ([] if healed else ["2"])


def test_equal_ratings_show_no_more_than_that_many_can() -> None:
    mean, high = estimate("rating_mean", np.zeros(30), above=False, confidence=0.999)
    assert mean == 0
    assert high == pytest.approx(1 - 0.001 ** (1 / 30))


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["failed_share", "seconds_p95", "rating_mean", "cost_per_exchange"])
@pytest.mark.parametrize("above", [True, False])
def test_a_metric_that_lies_at_its_bound_breaches_as_rarely_as_the_confidence_says(metric: str, above: bool) -> None:
    """5 % of windows of 60 observations, at confidence 0.95; exact for shares and percentiles, near it for means."""
    rng = np.random.default_rng(11)
    draws = {
        "failed_share": (lambda: (rng.random(60) < 0.1).astype(float), 0.1),
        "seconds_p95": (lambda: rng.exponential(1, 60), -np.log(0.05)),
        "rating_mean": (lambda: (rng.random(60) < 0.8).astype(float), 0.8),
        "cost_per_exchange": (lambda: rng.gamma(4, 1, 60), 4.0),
    }
    draw, truth = draws[metric]
    wrong = 0
    for _ in range(1000):
        _, near = estimate(metric, draw(), above=above, confidence=0.95)
        wrong += near > truth if above else near < truth
    exact = metric in ("failed_share", "seconds_p95")
    assert wrong / 1000 <= 0.05 + (0.021 if exact else 0.035)


def test_drifted_columns_are_a_breach_of_the_drift_bound() -> None:
    def row(column: str, verdict: str, release: str = "-") -> dict[str, Any]:
        return {
            "column": column,
            "verdict": verdict,
            "release_id": release,
            "statistic": 0.4,
            "adjusted": 1e-6,
            "users": 90,
            "reference_users": 800,
        }

    drift = [row("question_words", "drifted"), row("seconds", "same", "rel-1"), row("answer_words", "too few", "rel-1")]
    users = [one(i) for i in range(90)]
    (breach,) = breaches(WINDOW, users, drift, [Bound(metric="drift", above=0, action="reembed")], 0.999)
    assert (breach.release_id, breach.value, breach.action) == ("-", 1.0, "reembed")
    assert "question_words (distance 0.40, adjusted p 1e-06, 90 users against 800)" in breach.reason
    assert breaches(WINDOW, users, drift, [Bound(metric="drift", above=1)], 0.999) == []


def test_the_default_bounds_know_the_rollouts_latency_budget(qa: Application) -> None:
    (slow,) = [bound for bound in bounds_of(qa) if bound.metric == "seconds_p95"]
    assert slow.above == qa.rollout.latency_budget_seconds
    own = qa.model_copy(update={"monitor": Monitor(bounds=(FAILED,))})
    assert bounds_of(own) == (FAILED,)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"metric": "failed_share"}, "needs either `above` or `below`"),
        ({"metric": "failed_share", "above": 0.1, "below": 0.2}, "needs either `above` or `below`"),
        ({"metric": "drift", "below": 1}, "how many drifted columns"),
        ({"metric": "happiness", "above": 1}, "Input should be"),
    ],
)
def test_a_bound_that_can_not_be_meant_is_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        Bound(**fields)
    with pytest.raises(ValidationError, match="must divide a day"):
        Monitor(minutes=7)
