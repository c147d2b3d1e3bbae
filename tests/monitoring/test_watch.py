"""A breach is written once, told once, and starts what the policy names, whatever dies in between."""

import logging
from collections.abc import Callable, Collection
from datetime import datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest

from millrace.applications import Application
from millrace.errors import LakehouseError, ReleaseError
from millrace.lakehouse.cursors import read_cursor
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import (
    GOLD_DRIFT_HOURLY,
    GOLD_METRICS_HOURLY,
    OPS_BREACHES,
    OPS_DECISIONS,
    SILVER_EXCHANGES,
)
from millrace.monitoring.drift import measure_drift
from millrace.monitoring.metrics import measure
from millrace.monitoring.observed import read_windows
from millrace.monitoring.watch import check
from millrace.monitoring.windows import READER, Window
from millrace.policies import Bound, Monitor
from millrace.settings import Settings
from tests.monitoring.silver import HOUR, NOON, exchange, rating, write

pytestmark = pytest.mark.slow

Turn = Callable[..., dict[str, Any]]


@pytest.fixture
def application(qa: Application) -> Application:
    bounds = (
        Bound(metric="failed_share", above=0.2, action="rollback"),
        Bound(metric="rating_mean", below=0.4, action="retrain"),
        Bound(metric="seconds_p95", above=10),
    )
    return qa.model_copy(update={"monitor": Monitor(bounds=bounds)})


@pytest.fixture
def turn(settings: Settings, application: Application) -> Turn:
    """One run of the DAG: its three tasks."""

    def turn(
        start: datetime = NOON,
        *,
        run: str = "run",
        now: datetime | None = None,
        answering: Collection[str] = ("1",),
        asked: Callable[..., Collection[str]] | None = None,
    ) -> dict[str, Any]:
        now = now or start + HOUR
        measured = measure(settings, application, start, start + HOUR, run=f"{run}/metrics")
        measure_drift(settings, application, measured, run=f"{run}/drift", now=now)
        who = asked or (lambda *_: answering)
        return check(settings, application, measured, run=f"{run}/bounds", now=now, answering=who)

    return turn


def failing(at: datetime, users: int = 60, **fields: Any) -> list[dict[str, Any]]:
    return [
        exchange(at + timedelta(seconds=n), state="failed", error="the engine broke", answer=None, **fields)
        for n in range(users)
    ]


def rated(lake: Lake, at: datetime, value: float, users: int = 60) -> None:
    asked = [exchange(at + timedelta(seconds=n)) for n in range(users)]
    write(lake, asked, [rating(one, one["occurred_at"] + timedelta(seconds=5), value) for one in asked])


def alerts(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("ALERT")]


def test_who_should_have_answered_is_the_challenger_that_the_journal_names(lake: Lake) -> None:
    row = {
        "sequence": 0, "decided_at": NOON, "kind": "start", "actor": "a", "reason": "r", "rollout_id": "r-1",
        "epoch": 1, "champion": "1", "challenger": "2", "share": 0.5, "evidence": "{}", "simulated": False,
    }  # fmt: skip
    lake.merge(OPS_DECISIONS, pa.Table.from_pylist([row], schema=OPS_DECISIONS.rows_schema), run="test")
    arm = {"arm": "challenger", "rollout_id": "r-1"}
    write(lake, [exchange(NOON, **arm, fell_back=True), exchange(NOON, **arm, release_version="2")], [])
    window = Window(NOON, NOON + HOUR)
    observed = read_windows(lake, NOON.date(), [window])[window]
    assert {(one.release_version, one.challenger) for one in observed} == {("1", "2"), ("2", None)}


def test_a_breach_is_one_row_one_alert_and_the_action_that_the_policy_names(
    lake: Lake, turn: Turn, caplog: pytest.LogCaptureFixture
) -> None:
    write(lake, failing(NOON, release_version="7"))
    with caplog.at_level(logging.ERROR, "millrace.alerts"):
        first = turn(run="first")
        again = turn(run="again")
    assert (first, again) == ({"breaches": 1, "actions": ["rollback"]}, {"breaches": 0, "actions": []})
    (row,) = lake.read(OPS_BREACHES).to_pylist()
    assert (row["metric"], row["bound"], row["action"]) == ("failed_share", "failed_share above 0.2", "rollback")
    assert (row["release_version"], row["value"], row["simulated"]) == ("7", 1.0, True)
    assert (row["interval_start"], row["at"]) == (NOON, NOON + HOUR)
    (alert,) = alerts(caplog)
    assert "qa: version 7: failed_share above 0.2" in alert
    assert "2026-11-24 12:00 to 13:00 UTC: failed_share was 1 on 60 users" in alert
    assert "the policy asks for rollback" in alert
    assert "/dags/qa.monitor" in alert


def test_a_run_that_died_after_writing_the_breach_starts_its_action_when_it_is_repeated(lake: Lake, turn: Turn) -> None:
    write(lake, failing(NOON))
    assert turn(run="the same")["actions"] == ["rollback"]
    assert turn(run="the same") == {"breaches": 0, "actions": ["rollback"]}


def test_a_run_that_died_before_writing_the_breach_has_alerted_and_finds_it_again(
    lake: Lake, turn: Turn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(lake, failing(NOON))
    with monkeypatch.context() as patched, caplog.at_level(logging.ERROR, "millrace.alerts"):
        merge = Lake.merge

        def dying(self: Lake, table: Any, *args: Any, **kwargs: Any) -> Any:
            if table is OPS_BREACHES:
                raise KeyboardInterrupt
            return merge(self, table, *args, **kwargs)

        patched.setattr(Lake, "merge", dying)
        with pytest.raises(KeyboardInterrupt):
            turn()
    assert len(alerts(caplog)) == 1
    assert read_cursor(lake, READER, SILVER_EXCHANGES) is None
    assert turn() == {"breaches": 1, "actions": ["rollback"]}
    assert read_cursor(lake, READER, SILVER_EXCHANGES) is not None


def test_ratings_that_stay_low_start_one_retraining_until_they_recover(lake: Lake, turn: Turn) -> None:
    started = []
    for hour, value in enumerate([0.1, 0.1, 0.9]):
        at = NOON + hour * HOUR
        rated(lake, at, value)
        started.append(turn(at, run=f"run {hour}")["actions"])
    assert started == [["retrain"], [], []]
    assert lake.read(OPS_BREACHES).num_rows == 2
    later = NOON + 30 * HOUR
    rated(lake, later, 0.1)
    assert turn(later, run="a day later")["actions"] == ["retrain"]


def test_a_release_that_answers_nobody_any_more_starts_no_retraining(lake: Lake, turn: Turn) -> None:
    rated(lake, NOON, 0.1)
    assert turn(answering=("2",)) == {"breaches": 1, "actions": []}
    assert turn(answering=("2", "1")) == {"breaches": 0, "actions": ["retrain"]}


def test_late_ratings_make_a_breach_in_the_hour_of_their_exchanges(lake: Lake, turn: Turn) -> None:
    asked = [exchange(NOON + timedelta(seconds=n)) for n in range(60)]
    write(lake, asked)
    assert turn() == {"breaches": 0, "actions": []}
    write(lake, [], [rating(one, NOON + 5 * HOUR, 0.0) for one in asked])
    assert turn(NOON + 5 * HOUR) == {"breaches": 1, "actions": ["retrain"]}
    assert lake.read(OPS_BREACHES)["interval_start"].to_pylist() == [NOON]


def test_a_late_rating_is_not_lost_when_storage_fails_once(
    lake: Lake, turn: Turn, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [exchange(NOON + timedelta(seconds=n)) for n in range(60)]
    write(lake, asked)
    turn()
    write(lake, [], [rating(one, NOON + 5 * HOUR, 0.0) for one in asked])

    def unavailable(*_: Any) -> None:
        raise LakehouseError("503 Service Unavailable")

    with monkeypatch.context() as patched:
        patched.setattr(Lake, "changes", unavailable)
        with pytest.raises(LakehouseError, match="503"):
            turn(NOON + 5 * HOUR)
    assert turn(NOON + 6 * HOUR) == {"breaches": 1, "actions": ["retrain"]}


def test_what_a_backfill_finds_in_the_past_is_written_down_and_nobody_is_woken(
    lake: Lake, turn: Turn, caplog: pytest.LogCaptureFixture
) -> None:
    write(lake, failing(NOON))
    with caplog.at_level(logging.ERROR, "millrace.alerts"):
        found = turn(now=NOON + 40 * HOUR)
    assert found == {"breaches": 1, "actions": []}
    assert alerts(caplog) == []


def test_trouble_that_is_found_late_starts_its_action_once_in_the_first_hour_that_is_recent(
    lake: Lake, turn: Turn
) -> None:
    """As after feedback was not ingested for 30 hours."""
    rated(lake, NOON - HOUR, 0.9)
    turn(NOON - HOUR, run="before")
    for hour in range(30):
        rated(lake, NOON + hour * HOUR, 0.1)
    assert turn(NOON + 29 * HOUR) == {"breaches": 30, "actions": ["retrain"]}


def test_a_breach_waits_for_who_answers_to_be_known(lake: Lake, turn: Turn) -> None:
    rated(lake, NOON, 0.1)

    def away(*_: Any) -> Collection[str]:
        raise ReleaseError("MLflow does not answer")

    with pytest.raises(ReleaseError, match="MLflow does not answer"):
        turn(asked=away)
    assert turn(run="the next") == {"breaches": 1, "actions": ["retrain"]}


def test_a_window_that_is_not_over_is_not_judged(lake: Lake, turn: Turn) -> None:
    write(lake, failing(NOON))
    assert turn(now=NOON + HOUR / 2)["breaches"] == 0
    assert turn()["breaches"] == 1


def test_hours_twice_and_backwards_leave_equal_tables(
    lake: Lake, turn: Turn, settings: Settings, tmp_path: Any
) -> None:
    hours = [NOON - n * HOUR for n in range(8)]
    for at in hours[::3]:
        rated(lake, at, 0.2, users=40)
    write(lake, failing(hours[3]))
    for at in reversed(hours):
        turn(at, run=f"scheduled {at}", now=NOON + HOUR)
    tables = (GOLD_METRICS_HOURLY, GOLD_DRIFT_HOURLY, OPS_BREACHES)
    before = {table.path: (lake.version(table), content(lake, table)) for table in tables}
    assert before[OPS_BREACHES.path][1]
    for at in hours:
        turn(at, run=f"backfill {at}", now=NOON + 2 * HOUR)
    assert {table.path: (lake.version(table), content(lake, table)) for table in tables} == before


def content(lake: Lake, table: Any) -> list[str]:
    return sorted(map(repr, lake.read(table).to_pylist()))
