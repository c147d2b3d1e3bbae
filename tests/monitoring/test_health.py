"""Data that stopped coming in and a disk that runs full are said; what was never started is not."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from millrace.alerts import Alert, send
from millrace.applications import Application
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_ALERTS, PLATFORM
from millrace.monitoring.health import MISSED, check_health, last_intervals
from millrace.settings import Settings
from tests.conftest import Webhook

NOON = datetime(2026, 3, 2, 12, 5, tzinfo=UTC)
HOURS = [NOON.replace(minute=0) - timedelta(hours=back) for back in range(1, 30)]
NIGHTS = [datetime(2026, 3, 2, 2, 30, tzinfo=UTC) - timedelta(days=back) for back in range(1, 30)]
"""Starts of intervals that are over."""


class Runs:
    """Which intervals succeeded, by stage."""

    def __init__(self, documents: Sequence[datetime], feedback: Sequence[datetime]) -> None:
        self.by_dag = {"qa.ingest_documents": set(documents), "qa.ingest_feedback": set(feedback)}

    def __call__(self, dag_id: str, dates: Sequence[datetime] | None) -> int:
        ran = self.by_dag[dag_id]
        return len(ran if dates is None else ran.intersection(dates))


def look(settings: Settings, application: Application, runs: Runs, **failed: int) -> dict[str, Any]:
    """A look at noon, with so many failed runs by stage, after one that found none."""
    counts = {f"qa.{stage}": count for stage, count in failed.items()}
    before = {"at": (NOON - timedelta(hours=1)).isoformat(), "failed": dict.fromkeys(counts, 0)}
    return check_health(settings, application, runs, lambda dag: counts.get(dag, 0), before=before, now=NOON)


@pytest.fixture
def home(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A home on a disk that isn't full, whatever this machine's is."""
    settings.home.mkdir(parents=True)
    monkeypatch.setattr("millrace.monitoring.health.FREE_SHARE", 0.0)
    return settings


def alerts(settings: Settings) -> list[str]:
    return sorted(Lake.of(settings, PLATFORM).read(OPS_ALERTS)["title"].to_pylist())


def test_a_stage_that_missed_its_last_intervals_is_stale_and_one_late_run_is_not(
    home: Settings, qa: Application
) -> None:
    assert look(home, qa, Runs(NIGHTS, HOURS))["stale"] == []
    assert look(home, qa, Runs(NIGHTS[:1], HOURS[MISSED:]))["stale"] == []
    assert alerts(home) == []
    found = look(home, qa, Runs(NIGHTS[MISSED + 1 :], HOURS[MISSED + 1 :]))
    assert found["stale"] == ["qa.ingest_documents", "qa.ingest_feedback"]
    assert alerts(home) == ["qa.ingest_documents is stale", "qa.ingest_feedback is stale"]


def test_what_was_never_started_is_nobodys_trouble(home: Settings, qa: Application) -> None:
    assert look(home, qa, Runs([], []))["stale"] == []


def test_a_run_that_failed_without_a_word_is_said_and_one_whose_task_told_of_it_is_not(
    home: Settings, qa: Application
) -> None:
    assert look(home, qa, Runs([], []), finetune=0)["failed"]["qa.finetune"] == 0
    assert alerts(home) == []
    task = Alert("qa.rollout.tick failed", "no reason was given", "qa.rollout/scheduled__1", "http://runbook")
    send(task, home, now=NOON - timedelta(minutes=20))
    found = look(home, qa, Runs([], []), finetune=2, rollout=1)
    assert (found["failed"]["qa.finetune"], found["failed"]["qa.rollout"]) == (2, 1)
    assert alerts(home) == ["qa.finetune failed", "qa.rollout.tick failed"]


def test_what_was_never_counted_is_counted_from_now_on(home: Settings, qa: Application) -> None:
    found = check_health(home, qa, Runs([], []), lambda dag: 7, before={}, now=NOON)
    assert set(found["failed"].values()) == {7}
    assert alerts(home) == []


def test_a_failure_that_was_told_since_the_look_before_is_told_however_long_ago_that_was(
    home: Settings, qa: Application
) -> None:
    """As after a weekend without the monitor, or in a backfill of it."""
    before = {"at": (NOON - timedelta(days=3)).isoformat(), "failed": {"qa.rollout": 0, "qa.finetune": 0}}
    task = Alert("qa.rollout.tick failed", "no reason was given", "qa.rollout/scheduled__1", "http://runbook")
    send(task, home, now=NOON - timedelta(days=2))
    check_health(home, qa, Runs([], []), lambda dag: 1, before=before, now=NOON)
    assert alerts(home) == ["qa.finetune failed", "qa.rollout.tick failed"]


def test_an_alert_that_reached_nobody_is_sent_again_once_somebody_takes_it(
    home: Settings, qa: Application, webhook: Webhook
) -> None:
    send(Alert("the gate refused", "version 3", "qa.evaluate_candidate/1", "http://runbook"), home, now=NOON)
    heard = home.model_copy(update={"alert_urls": SecretStr(webhook.url)})
    for _ in range(2):
        look(heard, qa, Runs([], []))
    assert [message["title"] for message in webhook.received].count("the gate refused") == 1


def test_a_disk_that_is_nearly_full_is_said(
    home: Settings, qa: Application, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert look(home, qa, Runs([], []))["disk_free"] > 0
    monkeypatch.setattr("millrace.monitoring.health.FREE_SHARE", 1.0)
    look(home, qa, Runs([], []))
    assert alerts(home) == [f"the disk of {home.home} is nearly full"]


@given(st.datetimes(datetime(2026, 1, 1), datetime(2026, 12, 31)), st.sampled_from(["0 * * * *", "30 2 * * *"]))
def test_the_last_intervals_are_over_and_follow_one_another(moment: datetime, cron: str) -> None:
    now = moment.replace(tzinfo=UTC)
    starts = last_intervals(cron, now)
    step = starts[0] - starts[1]
    assert len(starts) == MISSED + 1
    assert all(sooner - later == step for sooner, later in pairwise(starts))
    assert step <= now - starts[0] + timedelta(seconds=1) <= 2 * step + timedelta(seconds=1), "the newest that is over"
