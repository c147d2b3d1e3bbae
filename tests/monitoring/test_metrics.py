"""Metrics of a window: what they are, what they cost to make, and that the order of runs doesn't matter."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pendulum
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from millrace.applications import Application
from millrace.errors import MillraceError, SettingsError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import GOLD_METRICS_HOURLY, SILVER_EXCHANGES, SILVER_FEEDBACK
from millrace.monitoring.metrics import measure
from millrace.monitoring.windows import Window, from_text, move_on, touched, window_at
from millrace.settings import Settings
from millrace.sources.event_log import CLIENT_LEFT
from tests.monitoring.silver import HOUR, NOON, exchange, rating, write

pytestmark = pytest.mark.slow

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(settings: Settings, qa: Application) -> Run:
    return runs_in(settings, qa)


def runs_in(settings: Settings, qa: Application) -> Run:
    def run(start: datetime = NOON, end: datetime | None = None) -> dict[str, Any]:
        measured = measure(settings, qa, start, end or start + HOUR, run="test")
        move_on(Lake.of(settings, qa.name), measured["seen"], run="test")  # what the last step does
        return measured

    return run


def rows(lake: Lake) -> list[dict[str, Any]]:
    found = lake.read(GOLD_METRICS_HOURLY, GOLD_METRICS_HOURLY.rows_schema.names).to_pylist()
    return sorted(found, key=lambda row: (row["interval_start"], row["release_id"], row["index_build"]))


def test_an_hour_is_told_by_release_and_index_build(lake: Lake, run: Run) -> None:
    asked = [
        exchange(NOON, seconds=1.0),
        exchange(NOON + HOUR / 4, seconds=3.0, from_cache=True, cost_usd=0.0, pinned=True),
        exchange(NOON + HOUR / 3, state="failed", error="the engine broke", answer=None, seconds=9.0),
        exchange(NOON + HOUR / 2, state="failed", error=CLIENT_LEFT, answer=None),
        exchange(NOON + HOUR / 2, state="accepted", answer=None, seconds=None),
        exchange(NOON + HOUR / 2, fell_back=True, error="the challenger broke", index_build="other"),
        exchange(NOON + HOUR, release_id="rel-2", release_version="2"),
    ]
    write(lake, asked, [rating(asked[0], NOON + timedelta(minutes=5), 0.25)])

    run(NOON, NOON + 2 * HOUR)

    first, other, second = rows(lake)
    assert [(r["release_id"], r["index_build"]) for r in (first, other, second)] == [
        ("rel-1", "build"),
        ("rel-1", "other"),
        ("rel-2", "build"),
    ]
    assert (first["interval_start"], first["interval_end"]) == (NOON, NOON + HOUR)
    assert second["interval_start"] == NOON + HOUR
    counts = ("exchanges", "failed", "left_early", "unfinished", "from_cache", "errors", "rated", "pinned", "simulated")
    assert [first[name] for name in counts] == [5, 1, 1, 1, 1, 1, 1, 1, 5]
    assert (other["fell_back"], other["errors"]) == (1, 1)
    assert (first["feedback_rate"], first["rating_mean"]) == (0.5, 0.25)
    assert (first["seconds_mean"], first["seconds_p50"], first["seconds_p95"]) == pytest.approx((2.0, 2.0, 2.9))
    assert first["cost_usd"] == pytest.approx(0.004)
    assert (other["rating_mean"], other["feedback_rate"]) == (None, 0.0)


def test_an_hour_without_news_writes_nothing(lake: Lake, run: Run) -> None:
    write(lake, [exchange(NOON)])
    assert run()["changed"]
    version = lake.version(GOLD_METRICS_HOURLY)
    assert not run()["changed"]
    assert lake.version(GOLD_METRICS_HOURLY) == version


def test_a_rating_of_hours_later_is_brought_to_the_hour_of_its_exchange(lake: Lake, run: Run) -> None:
    asked = exchange(NOON)
    write(lake, [asked])
    run()
    assert rows(lake)[0]["rated"] == 0
    write(lake, [], [rating(asked, NOON + 20 * HOUR, 1.0)])

    found = run(NOON + 20 * HOUR)

    assert Window(NOON, NOON + HOUR) in from_text(found["windows"])
    (row,) = rows(lake)
    assert (row["interval_start"], row["rated"], row["rating_mean"]) == (NOON, 1, 1.0)


def test_a_rating_of_more_than_a_week_later_is_not_counted(lake: Lake, run: Run) -> None:
    asked = exchange(NOON)
    late = rating(asked, NOON + timedelta(days=7, seconds=5), 1.0)
    write(lake, [asked], [late])
    run()
    assert rows(lake)[0]["rated"] == 0


def test_exchanges_that_were_ingested_after_their_hour_was_measured_are_measured_by_a_later_run(
    lake: Lake, run: Run
) -> None:
    write(lake, [exchange(NOON + HOUR)])
    run()
    run(NOON + HOUR)
    write(lake, [exchange(NOON), exchange(NOON - 30 * HOUR)])
    run(NOON + 2 * HOUR)
    assert [row["interval_start"] for row in rows(lake)] == [NOON - 30 * HOUR, NOON, NOON + HOUR]


def test_what_arrives_after_a_first_run_that_found_no_tables_is_measured_by_a_later_run(lake: Lake, run: Run) -> None:
    run(NOON)
    asked = exchange(NOON + HOUR / 2)
    write(lake, [asked], [rating(asked, NOON + HOUR, 0.5)])
    run(NOON + 2 * HOUR)
    assert [(row["interval_start"], row["rated"]) for row in rows(lake)] == [(NOON, 1)]


def test_what_died_before_its_last_step_leaves_its_late_hours_to_the_next_run(
    lake: Lake, run: Run, settings: Settings, qa: Application
) -> None:
    write(lake, [exchange(NOON)])
    run()
    write(lake, [exchange(NOON - 5 * HOUR)])
    measure(settings, qa, NOON + HOUR, NOON + 2 * HOUR, run="died before the bounds were checked")
    found = from_text(run(NOON + 2 * HOUR)["windows"])
    assert window_at(NOON - 5 * HOUR, 60) in found


def test_a_release_that_an_exchange_was_taken_from_leaves_its_hour(lake: Lake, run: Run) -> None:
    asked = exchange(NOON, state="accepted", release_id="rel-2", release_version="2")
    write(lake, [asked])
    run()
    write(lake, [asked | {"state": "completed", "release_id": "rel-1", "release_version": "1", "content_hash": "new"}])
    run()
    assert [row["release_id"] for row in rows(lake)] == ["rel-1"]


def test_ingestion_that_commits_while_a_run_measures_is_measured_before_it_ends(
    lake: Lake, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import millrace.monitoring.metrics as metrics

    write(lake, [exchange(NOON)])
    late = [exchange(NOON + HOUR / 2)]
    original = metrics.read_windows

    def read_then_somebody_commits(*args: Any) -> Any:
        found = original(*args)
        if late:
            write(lake, [late.pop()])
        return found

    monkeypatch.setattr(metrics, "read_windows", read_then_somebody_commits)
    run()
    assert rows(lake)[0]["exchanges"] == 2


@contextmanager
def unreadable(lake: Lake, table: Any, *, but: set[str]) -> Iterator[int]:
    """Every data file of partitions other than `but` holds garbage; gives how many do."""
    files = [path for path in Path(lake.uri(table)).rglob("*.parquet") if "_delta_log" not in path.parts]
    spoilt = [path for path in files if not any(f"date={day}" in str(path) for day in but)]
    contents = {path: path.read_bytes() for path in spoilt}
    for path in spoilt:
        path.write_bytes(b"nobody can read this")
    yield len(spoilt)
    for path, content in contents.items():
        path.write_bytes(content)


def test_a_run_reads_no_file_of_another_day(lake: Lake, run: Run) -> None:
    for days in range(1, 6):
        before = exchange(NOON - timedelta(days=days))
        write(lake, [before], [rating(before, before["occurred_at"], 0.5)])
        run(before["occurred_at"])
    today = exchange(NOON)
    write(lake, [today], [rating(today, NOON, 0.5)])

    with (
        unreadable(lake, SILVER_EXCHANGES, but={"2026-11-24"}) as exchanges,
        unreadable(lake, SILVER_FEEDBACK, but={"2026-11-24"}) as ratings,
        unreadable(lake, GOLD_METRICS_HOURLY, but={"2026-11-24"}) as metrics,
    ):
        assert min(exchanges, ratings, metrics) >= 5
        assert run()["changed"]
        assert not run()["changed"]
    assert len(rows(lake)) == 6


HOURS = 3


@hypothesis_settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_runs_in_any_order_beside_ingestion_and_repeated_leave_equal_tables(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, settings: Settings, qa: Application
) -> None:
    """The last run of all comes after the last ingestion; nothing else is given."""
    random = Random(data.draw(st.integers(0, 10**6)))
    asked = [exchange(NOON + HOUR * random.random() * HOURS) for _ in range(4)]
    said = [rating(one, one["occurred_at"] + HOUR * random.random() * HOURS, random.random()) for one in asked[:2]]
    ingestions = [([one], []) for one in asked] + [([], [one]) for one in said]
    everything = [
        *ingestions,
        *((NOON + n * HOUR) for n in range(HOURS)),
        NOON + data.draw(st.integers(0, HOURS - 1)) * HOUR,
    ]
    shuffled = data.draw(st.permutations(everything))

    tables = []
    for steps in ([*ingestions, *(NOON + n * HOUR for n in range(HOURS))], [*shuffled, NOON + HOUR]):
        home = settings.model_copy(update={"home": tmp_path_factory.mktemp("home")})
        lake, run = Lake.of(home, "qa"), runs_in(home, qa)
        for step in steps:
            if isinstance(step, tuple):
                write(lake, *step)
            else:
                run(step)
        tables.append(rows(lake))
    assert tables[0] == tables[1]


@given(st.datetimes(datetime(2026, 1, 1), datetime(2027, 1, 1)), st.sampled_from([1, 5, 60, 1440]))
def test_every_moment_lies_in_one_window_of_one_day(moment: datetime, minutes: int) -> None:
    moment = moment.replace(tzinfo=UTC)
    window = window_at(moment, minutes)
    assert window.start <= moment < window.end
    assert window.end - window.start == timedelta(minutes=minutes)
    assert window_at(window.start, minutes) == window == window_at(window.end - timedelta(microseconds=1), minutes)
    assert (window.end - timedelta(microseconds=1)).date() == window.start.date()


def test_an_interval_of_any_length_touches_the_windows_that_it_shares_a_moment_with() -> None:
    assert touched(NOON, NOON + HOUR, 60) == [Window(NOON, NOON + HOUR)]
    late = touched(NOON + HOUR / 6, NOON + HOUR + HOUR / 6, 60)
    assert late == [Window(NOON, NOON + HOUR), Window(NOON + HOUR, NOON + 2 * HOUR)]
    assert len(touched(NOON, NOON + timedelta(minutes=1), 60)) == 1
    assert len(touched(NOON, NOON + 2 * timedelta(days=1), 60)) == 48
    airflows = pendulum.instance(NOON)
    assert touched(airflows, airflows.add(hours=1), 60) == [Window(NOON, NOON + HOUR)]
    assert type(window_at(airflows, 60).start) is datetime


def test_no_interval_and_no_key_are_one_sentence_each(settings: Settings, qa: Application) -> None:
    with pytest.raises(MillraceError, match="is not an interval with a time zone"):
        measure(settings, qa, NOON, NOON, run="test")
    with pytest.raises(SettingsError, match="MILLRACE_COMPLETION_KEY is empty"):
        measure(
            settings.model_copy(update={"completion_key": type(settings.completion_key)("")}),
            qa,
            NOON,
            NOON + HOUR,
            run="t",
        )
