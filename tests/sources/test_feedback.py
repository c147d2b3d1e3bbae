"""From log to tables: everything acknowledged arrives, once, however often and in whatever order it is brought."""

import json
import multiprocessing
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pendulum
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from millrace.applications import Application
from millrace.errors import SourceError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import BRONZE_EVENTS, QUARANTINE_FEEDBACK, SILVER_EXCHANGES, SILVER_FEEDBACK
from millrace.settings import Settings
from millrace.sources.completion_id import issue
from millrace.sources.event_log import Accepted, Completed, EventLog, Failed, Feedback
from millrace.sources.feedback import land_events, refine_feedback
from millrace.sources.pseudonym import pseudonym

pytestmark = pytest.mark.slow

KEY = b"test completion key"
START = datetime(2026, 11, 24, 22, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
END = START + timedelta(hours=4)


class Gateway:
    """Writes events at chosen minutes after START, as a gateway would."""

    def __init__(self, folder: Path) -> None:
        self.minute = 0.0
        self.log = EventLog(folder, clock=lambda: START + self.minute * MINUTE)

    def at(self, minute: float) -> "Gateway":
        self.minute = minute
        return self

    def ask(self, question: str = "why?", **changes: object) -> dict[str, object]:
        at = START + self.minute * MINUTE
        about = {
            "completion_id": issue(KEY, "qa", at),
            "application": "qa",
            "simulated": True,
            "user": pseudonym(b"test pseudonym key", "ann"),
            "question": question,
            "release_id": "rel-1",
            "release_version": "1",
            "index_build": "build-1",
            "prompt_version": "qa/1",
            "rollout_id": "r",
            "epoch": 1,
            "arm": "challenger",
            "assignment_probability": 0.25,
            "pinned": False,
            "accepted_at": at,
        } | changes
        self.log.append(Accepted(**about))
        return about

    def answer(self, about: dict[str, object], answer: str = "because", **changes: object) -> None:
        done = {
            "answer": answer,
            "citations": ("chunk-1", "chunk-2"),
            "prompt_tokens": 100,
            "completion_tokens": 7,
            "seconds": 0.5,
            "cost_usd": 0.001,
            "from_cache": False,
            "fell_back": False,
        }
        self.log.append(Completed(**(about | done | changes)))

    def rate(self, about: dict[str, object], rating: float | None, **changes: object) -> Feedback:
        event = Feedback(
            **(
                {"completion_id": about["completion_id"], "application": "qa", "simulated": True, "rating": rating}
                | changes
            )
        )
        return self.log.append(event)


@pytest.fixture
def gateway(settings: Settings) -> Gateway:
    return Gateway(settings.event_log("qa"))


@pytest.fixture
def ingest(settings: Settings, qa: Application) -> Callable[..., dict[str, dict]]:
    def run(start: datetime = START, end: datetime = END) -> dict[str, dict]:
        landed = land_events(settings, qa, start, end, run="test")
        return {"landed": landed, "refined": refine_feedback(settings, qa, start, end, run="test")}

    return run


def rows(lake: Lake, table, key: str) -> dict[str, dict]:
    wanted = [column.name for column in table.columns]
    return {row[key]: row for row in lake.read(table, wanted).to_pylist()}


def test_an_exchange_and_its_feedback_reach_silver_with_everything_that_was_known(
    gateway: Gateway, ingest, lake: Lake
) -> None:
    about = gateway.at(1).ask()
    gateway.at(2).answer(about)
    gateway.at(3).rate(about, 0.75, comment="nearly", correction="because of that")
    assert ingest() == {
        "landed": {"lines": 3, "landed": 3, "quarantined": 0, "erased": 0, "changed": True},
        "refined": {"exchanges": 1, "feedback": 1, "quarantined": 0, "waiting": 0, "changed": True},
    }
    exchange = rows(lake, SILVER_EXCHANGES, "completion_id")[about["completion_id"]]
    assert exchange["state"] == "completed"
    assert exchange["occurred_at"] == START + MINUTE
    assert exchange["completed_at"] == START + 2 * MINUTE
    assert exchange["citations"] == ["chunk-1", "chunk-2"]
    assert {name: exchange[name] for name in ("arm", "epoch", "assignment_probability", "simulated", "answer")} == {
        "arm": "challenger",
        "epoch": 1,
        "assignment_probability": 0.25,
        "simulated": True,
        "answer": "because",
    }
    said = rows(lake, SILVER_FEEDBACK, "completion_id")[about["completion_id"]]
    assert (said["rating"], said["comment"], said["correction"]) == (0.75, "nearly", "because of that")
    assert (said["user"], said["question"], said["release_version"]) == (exchange["user"], "why?", "1")


def test_running_an_interval_again_commits_nothing(gateway: Gateway, ingest, lake: Lake) -> None:
    about = gateway.at(1).ask()
    gateway.answer(about)
    gateway.rate(about, 7)
    gateway.rate(about, 1)
    ingest()
    tables = (BRONZE_EVENTS, SILVER_EXCHANGES, SILVER_FEEDBACK, QUARANTINE_FEEDBACK)
    before = [lake.version(table) for table in tables]
    again = ingest()
    assert not again["landed"]["changed"]
    assert not again["refined"]["changed"]
    assert [lake.version(table) for table in tables] == before


def test_an_exchange_without_its_accepted_line_and_one_that_never_completed_are_both_kept(
    gateway: Gateway, ingest, lake: Lake
) -> None:
    lost = gateway.at(1).ask()
    silent = gateway.at(61).ask()
    gateway.at(62).answer(lost)
    broken = gateway.at(63).ask()
    gateway.log.append(Failed(**broken, answer="bec", seconds=2.0, error="the engine broke"))
    ingest(START + timedelta(hours=1), END)
    exchanges = rows(lake, SILVER_EXCHANGES, "completion_id")
    assert exchanges[lost["completion_id"]]["state"] == "completed"
    assert exchanges[lost["completion_id"]]["occurred_at"] == START + MINUTE
    assert exchanges[silent["completion_id"]]["state"] == "accepted"
    assert exchanges[broken["completion_id"]]["state"] == "failed"
    assert exchanges[broken["completion_id"]]["error"] == "the engine broke"


def test_the_last_feedback_on_an_answer_wins_and_counts_once(gateway: Gateway, ingest, lake: Lake) -> None:
    about = gateway.at(1).ask()
    gateway.answer(about)
    gateway.at(2).rate(about, 0)
    gateway.at(70).rate(about, 1)
    ingest(START + timedelta(hours=1), END)
    ingest(START, START + timedelta(hours=1))
    (said,) = rows(lake, SILVER_FEEDBACK, "completion_id").values()
    assert (said["rating"], said["occurred_at"]) == (1, START + 70 * MINUTE)


def test_feedback_that_comes_before_its_exchange_waits_and_is_written_with_it(
    gateway: Gateway, ingest, lake: Lake
) -> None:
    about = gateway.at(1).ask()
    gateway.answer(about)
    gateway.at(70).rate(about, 0.5)
    assert ingest(START + timedelta(hours=1), END)["refined"]["waiting"] == 1
    assert not lake.read(SILVER_FEEDBACK).num_rows
    assert ingest(START, START + timedelta(hours=1))["refined"]["feedback"] == 1


def test_what_the_suite_refuses_is_in_quarantine_with_its_reason_and_the_rest_goes_on(
    gateway: Gateway, ingest, lake: Lake
) -> None:
    about = gateway.at(1).ask()
    gateway.answer(about)
    good = gateway.rate(about, 0.5)
    high = gateway.rate(about, 1.5)
    forged = gateway.rate(about | {"completion_id": about["completion_id"][:-1] + "!"}, 1)
    foreign = gateway.rate(about | {"completion_id": issue(KEY, "other", START)}, 1)
    by_hand = json.loads(good.model_dump_json()) | {"event_id": "f" * 32, "rating": 0.123}
    with next(iter(gateway.log._folder.iterdir())).open("a") as segment:
        segment.write(json.dumps(by_hand).replace("0.123", "NaN") + "\n")
        segment.write("what?\n")
        segment.write(json.dumps(by_hand | {"format": 2}) + "\n")
        segment.write(json.dumps(by_hand | {"event_id": good.event_id}) + "\n")
    result = ingest()
    assert (result["landed"]["quarantined"], result["refined"]["quarantined"]) == (3, 4)
    reasons = {item: row["reason"] for item, row in rows(lake, QUARANTINE_FEEDBACK, "item_id").items()}
    assert reasons[high.event_id] == "rating 1.5 is not between 0 and 1"
    assert reasons[forged.event_id] == "the completion id was not issued by this deployment"
    assert reasons[foreign.event_id] == "the completion id belongs to another application"
    assert reasons["f" * 32] == "the rating is missing or not a number"
    unread = sorted(reason for item, reason in reasons.items() if ":" in item)
    assert unread[0] == f"event id {good.event_id} belongs to another line already"
    assert unread[1].startswith("not JSON")
    assert unread[2].startswith("written by a newer Millrace")
    (said,) = rows(lake, SILVER_FEEDBACK, "completion_id").values()
    assert said["rating"] == 0.5


@pytest.mark.parametrize(
    ("start", "end"), [(START, START), (END, START), (START.replace(tzinfo=None), END.replace(tzinfo=None))]
)
def test_an_interval_that_is_none_is_refused(ingest, start: datetime, end: datetime) -> None:
    with pytest.raises(SourceError, match="is not an interval"):
        ingest(start, end)


def test_an_application_without_any_event_has_an_interval_without_rows(ingest) -> None:
    assert ingest()["refined"] == {"exchanges": 0, "feedback": 0, "quarantined": 0, "waiting": 0, "changed": False}


def test_events_that_were_written_after_their_interval_was_read_are_not_lost(
    gateway: Gateway, ingest, lake: Lake
) -> None:
    about = gateway.at(29).ask()
    gateway.answer(about)
    between, end = START + 30 * MINUTE, START + 60 * MINUTE
    ingest(START, between)
    gateway.at(29.9).rate(about, 0.5)  # its gateway was held up: the stamp is of the interval that was read
    late = gateway.ask("and this?")
    bad = gateway.rate(about, 7)
    with next(iter(gateway.log._folder.iterdir())).open("a") as segment:
        segment.write(json.dumps(json.loads(bad.model_dump_json()) | {"format": 2, "event_id": "e" * 32}) + "\n")
    told = ingest(between, end)
    assert (told["landed"]["lines"], told["landed"]["landed"]) == (0, 3)
    assert (told["landed"]["quarantined"], told["refined"]["quarantined"]) == (1, 1)
    quarantined = rows(lake, QUARANTINE_FEEDBACK, "item_id")
    assert {row["found_in"] for row in quarantined.values()} == {START}, "as its own interval would have said"
    assert set(rows(lake, SILVER_EXCHANGES, "completion_id")) == {about["completion_id"], late["completion_id"]}
    assert [row["rating"] for row in rows(lake, SILVER_FEEDBACK, "completion_id").values()] == [0.5]
    assert not ingest(START, between)["landed"]["changed"]


def test_an_interval_may_be_given_as_airflow_gives_it(gateway: Gateway, ingest, lake: Lake) -> None:
    gateway.at(5).rate(gateway.at(1).ask(), 0.5)
    ingest(pendulum.instance(START), pendulum.instance(END))
    assert len(rows(lake, SILVER_FEEDBACK, "completion_id")) == 1


EDGES = [START + timedelta(minutes=45 * n) for n in range(6)]
INTERVALS = list(pairwise(EDGES))


def busy_evening(gateway: Gateway) -> None:
    """Exchanges and feedback spread over the intervals, some crossing from one into another, some bad."""
    abouts = []
    for number in range(6):
        abouts.append(gateway.at(number * 30).ask(f"question {number}"))
        if number % 3 != 2:
            gateway.at(number * 30 + 20).answer(abouts[-1], f"answer {number}")
        gateway.at(number * 30 + 21).rate(abouts[number // 2], number / 5)
    gateway.at(200).rate(abouts[0], 2.5)
    gateway.rate({"completion_id": "chatcmpl-forged"}, 1)
    gateway.at(201).rate(abouts[1], 0.4)


def content(lake: Lake) -> dict[str, object]:
    return {
        "events": rows(lake, BRONZE_EVENTS, "event_id"),
        "exchanges": rows(lake, SILVER_EXCHANGES, "completion_id"),
        "feedback": rows(lake, SILVER_FEEDBACK, "completion_id"),
        "quarantine": rows(lake, QUARANTINE_FEEDBACK, "item_id"),
    }


@pytest.fixture(scope="module")
def evening(tmp_path_factory: pytest.TempPathFactory, qa: Application) -> tuple[Path, dict[str, object]]:
    """An event log, and the tables that one pass over its intervals in order makes of it."""
    home = tmp_path_factory.mktemp("evening")
    settings = a_home(home)
    busy_evening(Gateway(settings.event_log("qa")))
    for start, end in INTERVALS:
        land_events(settings, qa, start, end, run="test")
        refine_feedback(settings, qa, start, end, run="test")
    return settings.event_log("qa"), content(Lake.of(settings, "qa"))


def a_home(home: Path) -> Settings:
    return Settings(
        home=home,
        spark_tables=frozenset(),
        completion_key="test completion key",
        pseudonym_key="test pseudonym key",
    )


def a_home_with(events: Path, home: Path) -> Settings:
    settings = a_home(home)
    settings.event_log("qa").parent.mkdir(parents=True)
    settings.event_log("qa").symlink_to(events)
    return settings


@hypothesis_settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.lists(st.tuples(st.sampled_from(range(len(INTERVALS))), st.booleans()), max_size=4))
def test_the_tables_are_the_same_in_whatever_order_and_however_often_intervals_run(
    evening: tuple[Path, dict[str, object]],
    qa: Application,
    tmp_path_factory: pytest.TempPathFactory,
    order: list[tuple[int, bool]],
) -> None:
    events, expected = evening
    settings = a_home_with(events, tmp_path_factory.mktemp("order"))
    # Some stages by themselves first (a task killed before the next), then each interval once, backwards.
    for number, lands in order:
        (land_events if lands else refine_feedback)(settings, qa, *INTERVALS[number], run="test")
    for interval in reversed(INTERVALS):
        land_events(settings, qa, *interval, run="test")
        refine_feedback(settings, qa, *interval, run="test")
    assert_same(content(Lake.of(settings, "qa")), expected)


def _ingest_interval(settings: Settings, qa: Application, interval: tuple[datetime, datetime]) -> None:
    land_events(settings, qa, *interval, run="test")
    refine_feedback(settings, qa, *interval, run="test")


@pytest.mark.stack
def test_processes_that_run_all_intervals_beside_one_another_make_the_same_tables(
    evening: tuple[Path, dict[str, object]], qa: Application, tmp_path: Path
) -> None:
    events, expected = evening
    settings = a_home_with(events, tmp_path / "home")
    # Processes of a server that has imported what is slow to import, but opened no table yet.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["great_expectations", "millrace.sources.feedback"])
    with processes.Pool(4) as pool:
        pool.starmap(_ingest_interval, [(settings, qa, interval) for interval in INTERVALS * 2], chunksize=1)
    assert_same(content(Lake.of(settings, "qa")), expected)


def assert_same(found: dict[str, object], expected: dict[str, object]) -> None:
    for table, wanted in expected.items():
        assert found[table] == wanted, table
