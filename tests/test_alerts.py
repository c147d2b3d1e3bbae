"""Alerts leave the process by HTTP to a real receiver, once a trouble, and never break what they are about."""

import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.alerts import Alert, check_addresses, following, send
from millrace.errors import SettingsError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_ALERTS, PLATFORM
from millrace.settings import Settings
from tests.conftest import Webhook, free_port

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
ALERT = Alert("qa.land failed", "the segment is torn", "qa.ingest_feedback/run-1", "http://airflow/dags/qa")


@pytest.fixture
def receiver(webhook: Webhook) -> Webhook:
    webhook.received.clear()
    return webhook


def to(settings: Settings, *urls: str, hours: float = 6) -> Settings:
    return Settings(**{**settings.model_dump(), "alert_urls": " ".join(urls), "alert_repeat_hours": hours})


@pytest.mark.slow
def test_an_alert_arrives_with_what_happened_since_when_and_the_runbook(settings: Settings, receiver: Webhook) -> None:
    assert send(ALERT, to(settings, receiver.url), now=NOON)

    (arrived,) = receiver.received
    assert arrived["title"] == ALERT.title
    for said in (ALERT.what, "since 2026-03-01 12:00 UTC", ALERT.source, ALERT.runbook):
        assert said in arrived["message"]


@pytest.mark.slow
def test_what_goes_on_is_counted_and_sent_again_only_after_the_repeat_time(
    settings: Settings, receiver: Webhook
) -> None:
    here = to(settings, receiver.url)
    sent = [send(ALERT, here, now=NOON + timedelta(hours=hour)) for hour in range(8)]

    assert sent == [True, False, False, False, False, False, True, False]
    assert "since 2026-03-01 12:00 UTC, 7 times" in receiver.received[1]["message"]
    (row,) = Lake.of(settings, PLATFORM).read(OPS_ALERTS).to_pylist()
    assert (row["count"], row["since"], row["sent_at"]) == (8, NOON, NOON + timedelta(hours=6))


@pytest.mark.slow
def test_another_title_and_the_same_one_after_a_long_silence_are_new_troubles(
    settings: Settings, receiver: Webhook
) -> None:
    here = to(settings, receiver.url)
    other = Alert("qa.refine failed", ALERT.what, ALERT.source, ALERT.runbook)

    assert send(ALERT, here, now=NOON)
    assert send(other, here, now=NOON)
    assert send(ALERT, here, now=NOON + timedelta(hours=7))
    assert "since 2026-03-01 19:00 UTC" in receiver.received[2]["message"]


def test_an_address_that_does_not_answer_is_logged_without_its_secret_and_tried_again(
    settings: Settings, receiver: Webhook, caplog: pytest.LogCaptureFixture
) -> None:
    dead = to(settings, f"json://user:secret@127.0.0.1:{free_port()}/")
    with caplog.at_level(logging.ERROR, "millrace.alerts"):
        assert not send(ALERT, dead, now=NOON)

    assert "address 1 of MILLRACE_ALERT_URLS (json:…) did not take the alert" in caplog.text
    assert "secret" not in caplog.text
    assert send(ALERT, to(settings, receiver.url), now=NOON + timedelta(minutes=1)), "nobody has heard of it yet"
    assert "2 times" in receiver.received[0]["message"]


def test_an_address_that_does_not_answer_keeps_nothing_from_the_others(settings: Settings, receiver: Webhook) -> None:
    assert send(ALERT, to(settings, f"json://127.0.0.1:{free_port()}/", receiver.url), now=NOON)
    assert len(receiver.received) == 1


def test_without_an_address_alerts_are_in_the_log_and_in_the_lake(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "millrace.alerts"):
        assert not send(ALERT, settings, now=NOON)
    assert "ALERT qa.land failed: the segment is torn" in caplog.text
    assert Lake.of(settings, PLATFORM).read(OPS_ALERTS)["sent_at"].to_pylist() == [None]


def test_an_alert_that_cannot_be_written_down_is_sent_all_the_same(settings: Settings, receiver: Webhook) -> None:
    table = Path(settings.lake) / settings.environment / PLATFORM / "ops" / "alerts"
    table.parent.mkdir(parents=True)
    table.write_text("not a table")

    assert send(ALERT, to(settings, receiver.url), now=NOON)
    assert len(receiver.received) == 1


def test_an_address_whose_service_breaks_keeps_nothing_from_the_others(
    settings: Settings, receiver: Webhook, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from apprise.plugins.syslog import NotifySyslog

    def breaks(*_: object, **__: object) -> bool:
        raise ValueError("syslog://token")

    monkeypatch.setattr(NotifySyslog, "send", breaks)
    with caplog.at_level(logging.ERROR, "millrace.alerts"):
        assert send(ALERT, to(settings, "syslog://", receiver.url), now=NOON)
    assert "apprise fails with ValueError" in caplog.text
    assert "token" not in caplog.text


def test_where_the_lake_cannot_be_opened_it_is_sent_all_the_same(settings: Settings, receiver: Webhook) -> None:
    nowhere = to(settings, receiver.url).model_copy(update={"lake_uri": "s3://lake", "object_store_port": 9})
    assert send(ALERT, nowhere, now=NOON)


def test_an_address_of_an_unknown_kind_is_refused_by_its_number(settings: Settings) -> None:
    with pytest.raises(SettingsError, match=r"address 2 of MILLRACE_ALERT_URLS \(pigeon:…\) is of no kind"):
        check_addresses(to(settings, "json://127.0.0.1/", "pigeon://coop/secret"))


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=30))
def test_a_trouble_is_counted_in_full_and_never_begins_after_it_was_seen(minutes: list[int]) -> None:
    repeat = timedelta(hours=6)
    trouble, counts = None, []
    for minute in sorted(minutes):
        trouble = following(trouble, NOON + timedelta(minutes=minute), repeat)
        counts.append(trouble.count)
        assert trouble.since <= trouble.last_at
    gaps = [later - sooner >= 360 for sooner, later in zip(sorted(minutes), sorted(minutes)[1:], strict=False)]
    assert counts.count(1) == 1 + sum(gaps)
