"""Evidence from real Delta tables: one outcome per user, closed once."""

import json
from datetime import timedelta

import numpy as np
import pyarrow as pa
import pytest

from millrace.applications import Rollout
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import BRONZE_EVENTS
from millrace.rollout.evidence import Evidence, collect_evidence
from millrace.sources.event_log import CLIENT_LEFT
from tests.rollout.crowd import START, exchange, rating, write


def at(seconds: float) -> timedelta:
    return START + timedelta(seconds=seconds)


def only(evidence: Evidence) -> tuple[float, float, float]:
    assert evidence.epoch.size == 1
    return evidence.rating[0], evidence.success[0], evidence.fast[0]


def test_an_empty_lake_is_no_evidence(lake: Lake, policy: Rollout) -> None:
    evidence = collect_evidence(lake, policy, "r1")
    assert evidence.epoch.size == 0
    assert evidence.exposed == ()
    assert evidence.as_of is None
    assert not evidence.simulated


def test_a_user_counts_once_in_the_arm_met_first(lake: Lake, policy: Rollout) -> None:
    write(
        lake,
        [
            exchange("c1", "ann", 0, arm="champion"),
            exchange("c2", "ann", 5, arm="challenger", epoch=2, probability=0.5),
            exchange("c3", "ann", 6, arm="challenger", epoch=2, probability=0.5),
            exchange("c4", "later", 100),
        ],
        [rating("c1", "ann", 2, 0.2), rating("c2", "ann", 7, 1.0), rating("c3", "ann", 8, 1.0)],
    )
    evidence = collect_evidence(lake, policy, "r1")
    assert only(evidence)[0] == 0.2
    assert not evidence.challenger[0]
    assert evidence.epoch[0] == 1
    assert evidence.probability[0] == 0.25
    assert evidence.simulated
    assert [(e.epoch, e.champion, e.challenger) for e in evidence.exposed] == [(1, 1, 1)]


def test_a_users_ratings_within_the_window_are_one_outcome(lake: Lake, policy: Rollout) -> None:
    write(
        lake,
        [exchange("c1", "ann", 0), exchange("c2", "ann", 10), exchange("c3", "ann", 15), exchange("c4", "later", 100)],
        [rating("c1", "ann", 2, 0.2), rating("c2", "ann", 19, 1.0), rating("c3", "ann", 21, 0.0)],
    )
    assert only(collect_evidence(lake, policy, "r1"))[0] == pytest.approx(0.6)


def test_pinned_exchanges_other_rollouts_and_certain_assignments_are_no_evidence(lake: Lake, policy: Rollout) -> None:
    write(
        lake,
        [
            exchange("c1", "ann", 0, pinned=True),
            exchange("c2", "bob", 0, rollout_id="r0"),
            exchange("c3", "cid", 0, probability=0.0),
            exchange("c4", "dot", 0, arm=None, epoch=None, probability=None, rollout_id=None),
            exchange("c5", "later", 100),
        ],
    )
    evidence = collect_evidence(lake, policy, "r1")
    assert evidence.epoch.size == 0
    assert sum(e.champion + e.challenger for e in evidence.exposed) == 1


def test_a_user_without_rating_counts_for_response_and_not_for_quality(lake: Lake, policy: Rollout) -> None:
    write(lake, [exchange("c1", "ann", 0), exchange("c2", "later", 100)])
    evidence = collect_evidence(lake, policy, "r1")
    assert len(evidence.quality()) == 0
    assert evidence.responses().outcome.tolist() == [0.0]


@pytest.mark.parametrize(
    ("fields", "success", "fast"),
    [
        ({}, 1.0, 1.0),
        ({"seconds": 11.0}, 1.0, 0.0),
        ({"fell_back": True, "release_version": "1"}, 0.0, 1.0),
        ({"state": "failed", "error": "engine died", "answer": None}, 0.0, 0.0),
        ({"state": "failed", "error": CLIENT_LEFT}, 1.0, 1.0),
        ({"state": "failed", "error": CLIENT_LEFT, "seconds": 11.0}, 1.0, 0.0),
        ({"state": "accepted", "completed_at": None, "seconds": None, "answer": None}, 0.0, 0.0),
        ({"completed_at": START + timedelta(seconds=50), "seconds": 50.0}, 0.0, 0.0),
    ],
)
def test_success_and_latency_are_those_of_the_first_exchange(
    lake: Lake, policy: Rollout, fields: dict[str, object], success: float, fast: float
) -> None:
    write(lake, [exchange("c1", "ann", 0, **fields), exchange("c2", "ann", 1), exchange("c3", "later", 100)])
    assert only(collect_evidence(lake, policy, "r1"))[1:] == (success, fast)


def test_a_user_is_open_until_something_later_than_the_window_was_ingested(lake: Lake, policy: Rollout) -> None:
    write(lake, [exchange("c1", "ann", 0), exchange("c2", "bob", 18)])
    assert collect_evidence(lake, policy, "r1").epoch.size == 0
    write(lake, [exchange("c3", "cid", 25)])
    assert collect_evidence(lake, policy, "r1").epoch.size == 1
    assert collect_evidence(lake, policy, "r1", as_of=at(10)).epoch.size == 0


def test_a_rating_changed_after_the_closing_leaves_the_outcome_as_it_closed(lake: Lake, policy: Rollout) -> None:
    write(lake, [exchange("c1", "ann", 0), exchange("c2", "later", 100)], [rating("c1", "ann", 2, 0.25)])
    closed = only(collect_evidence(lake, policy, "r1"))

    def said(event_id: str, seconds: float, value: float | None) -> dict[str, object]:
        event = {
            "format": 1,
            "event_id": event_id,
            "completion_id": "c1",
            "application": "qa",
            "simulated": True,
            "kind": "feedback",
            "rating": value,
            "occurred_at": at(seconds).isoformat(),
        }
        return {
            "event_id": event_id,
            "kind": "feedback",
            "completion_id": "c1",
            "occurred_at": at(seconds),
            "date": START.date(),
            "payload": json.dumps(event),
            "segment": "s",
        }

    rows = [said("e1", 2, 0.25), said("e2", 3, 7.0), said("e3", 4, None), said("e4", 50, 1.0)]
    lake.merge(BRONZE_EVENTS, pa.Table.from_pylist(rows, schema=BRONZE_EVENTS.rows_schema), run="test")
    write(lake, [], [rating("c1", "ann", 50, 1.0, events_seen=4)])
    assert only(collect_evidence(lake, policy, "r1")) == closed


def test_looking_later_adds_users_at_the_end_and_changes_none(lake: Lake, policy: Rollout) -> None:
    rng = np.random.default_rng(0)
    exchanges = [
        exchange(
            f"c{i}", f"u{rng.integers(60)}", float(rng.integers(200)), arm=str(rng.choice(["champion", "challenger"]))
        )
        for i in range(150)
    ]
    ratings = [
        rating(
            e["completion_id"], e["user"], (e["occurred_at"] - START).seconds + float(rng.integers(1, 40)), rng.random()
        )
        for e in exchanges[::2]
    ]
    write(lake, exchanges, ratings)
    early, late = (collect_evidence(lake, policy, "r1", as_of=at(seconds)) for seconds in (90, 190))
    count = early.epoch.size
    assert 0 < count < late.epoch.size
    for name in ("epoch", "challenger", "probability", "rating", "success", "fast"):
        np.testing.assert_array_equal(getattr(early, name), getattr(late, name)[:count])
