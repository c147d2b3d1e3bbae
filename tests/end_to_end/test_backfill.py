"""Two days of feedback and metrics, and some days of documents, brought in by backfills of the real Airflow, twice.
What knows only the state of now refuses one."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from millrace.airflow_api import Airflow
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import (
    BRONZE_DOCUMENTS,
    BRONZE_EVENTS,
    GOLD_DRIFT_HOURLY,
    GOLD_METRICS_HOURLY,
    OPS_BREACHES,
    PROVENANCE,
    SILVER_CHUNKS,
    SILVER_DOCUMENTS,
    SILVER_EXCHANGES,
    SILVER_FEEDBACK,
    Table,
)
from millrace.settings import Settings
from millrace.sources.completion_id import issue
from millrace.sources.event_log import Accepted, Completed, EventLog, Feedback
from millrace.sources.pseudonym import pseudonym
from millrace.stack import Stack
from millrace.stack.environment import settings_variables
from tests.conftest import stack_settings

pytestmark = [pytest.mark.long, pytest.mark.stack, pytest.mark.timeout(3000)]

HOURS = 48
DAYS = 4
USERS = 5
"""Of each hour; one of them rates three hours later."""
SCHEDULES = """
[schedules]
ingest_feedback = "0 */4 * * *"
monitor = "10 */4 * * *"
"""
"""A run covers four hours: what is looked at is the two days, not Airflow's time to start a task."""
MEASURES = (BRONZE_EVENTS, SILVER_EXCHANGES, SILVER_FEEDBACK, GOLD_METRICS_HOURLY, GOLD_DRIFT_HOURLY, OPS_BREACHES)
DOCUMENTS = (BRONZE_DOCUMENTS, SILVER_DOCUMENTS, SILVER_CHUNKS)


@pytest.fixture(scope="module")
def stack(open_folder: Path) -> Iterator[Stack]:
    settings = stack_settings(Path(tempfile.mkdtemp(dir=open_folder)), pace="standard")
    declaration = settings.applications / "qa.toml"
    declaration.write_text(declaration.read_text().replace("\n[rollout]\n", f"{SCHEDULES}\n[rollout]\n"))
    with Stack(settings) as running:
        yield running


def test_two_days_are_backfilled_twice_to_equal_tables(stack: Stack) -> None:
    # Where the last interval of both schedules has ended.
    end = (datetime.now(UTC) - timedelta(minutes=15)).replace(minute=0, second=0, microsecond=0)
    end -= timedelta(hours=end.hour % 4)
    start = end - timedelta(hours=HOURS)
    write_events(stack.settings, start)
    lake = Lake.of(stack.settings, "qa")
    contents = []
    with stack.airflow() as airflow:
        for _ in range(2):
            for dag in ("qa.ingest_feedback", "qa.monitor"):
                airflow.wait_for_dag(dag)
                airflow.unpause(dag)
                backfill = airflow.backfill(dag, start - timedelta(hours=4), end)
                airflow.wait_for_backfill(backfill, timeout=1200)
                all_well(airflow, dag, at_least=HOURS // 4)
            contents.append(content(lake, MEASURES))
    assert contents[0] == contents[1]
    assert lake.read(SILVER_EXCHANGES).num_rows == lake.read(SILVER_FEEDBACK).num_rows == HOURS * USERS
    measured = lake.read(GOLD_METRICS_HOURLY, ["interval_start", "exchanges", "rated"])
    assert len(set(measured["interval_start"].to_pylist())) == HOURS
    assert set(measured["exchanges"].to_pylist()) == set(measured["rated"].to_pylist()) == {USERS}


def test_days_of_documents_are_backfilled_twice_to_equal_tables_that_say_what_sources_say_now(stack: Stack) -> None:
    dag, lake = "handbook.ingest_documents", Lake.of(stack.settings, "handbook")
    documents = sorted((stack.settings.applications / "handbook").iterdir())
    end = datetime.now(UTC)
    start = end - timedelta(days=DAYS + 2)
    contents, versions = [], []
    with stack.airflow() as airflow:
        airflow.wait_for_dag(dag)
        airflow.unpause(dag)
        for _ in range(2):
            # Ten at once, as somebody who didn't read the runbook would.
            airflow.wait_for_backfill(airflow.backfill(dag, start, end), timeout=900)
            wait_for_all(airflow, dag, at_least=DAYS)
            contents.append(content(lake, DOCUMENTS))
            versions.append([lake.version(table) for table in DOCUMENTS])
        assert contents[0] == contents[1]
        assert versions[0] == versions[1], "a run that found nothing new wrote something"
        assert lake.read(BRONZE_DOCUMENTS).num_rows == lake.read(SILVER_DOCUMENTS).num_rows == len(documents)

        documents[0].write_text("Whoever deploys on a Friday stays until Saturday.")
        first, last = (f"{start + timedelta(days=days):%Y-%m-%d}" for days in (0, 2))
        said = millrace(stack, "backfill", dag, "--from", first, "--to", last)
        assert said.returncode == 0, said.stderr
        begun = re.match(r"backfill (\d+) of", said.stdout)
        assert begun, said.stdout
        airflow.wait_for_backfill(int(begun[1]), timeout=900)
        wait_for_all(airflow, dag, at_least=DAYS)
    assert [text for text in lake.read(SILVER_CHUNKS, ["text"])["text"].to_pylist() if "Saturday" in text]
    assert lake.read(SILVER_DOCUMENTS).num_rows == len(documents)
    assert lake.read(BRONZE_DOCUMENTS).num_rows == len(documents) + 1, "what it was is gone, or was kept twice"


@pytest.mark.parametrize("name", ["finetune", "maintain_lakehouse", "optimize_prompt", "rollout"])
def test_a_stage_that_works_on_what_is_there_now_refuses_a_backfill(stack: Stack, name: str) -> None:
    with stack.airflow() as airflow:
        airflow.wait_for_dag(f"qa.{name}")
        before = len(airflow.runs(f"qa.{name}"))
    asked = millrace(stack, "backfill", f"qa.{name}", "--from", "2026-01-05", "--to", "2026-02-05")
    assert asked.returncode == 1
    assert f"'qa.{name}' does not allow backfill runs" in asked.stderr
    with stack.airflow() as airflow:
        assert len(airflow.runs(f"qa.{name}")) == before


def millrace(stack: Stack, *words: str) -> subprocess.CompletedProcess[str]:
    """A command as a person gives it."""
    return subprocess.run(
        [str(Path(sys.executable).parent / "millrace"), *words],
        env=os.environ | settings_variables(stack.settings, keys=False),
        capture_output=True,
        text=True,
    )


def wait_for_all(airflow: Airflow, dag: str, *, at_least: int) -> None:
    """Until the scheduled run beside the backfill has ended, too; all of them well."""
    deadline = time.monotonic() + 600
    while running := airflow.runs(dag, states=["queued", "running"]):
        assert time.monotonic() < deadline, running
        time.sleep(2)
    all_well(airflow, dag, at_least=at_least)


def all_well(airflow: Airflow, dag: str, *, at_least: int) -> None:
    """Whether no run has failed; else the last lines of the tasks that did."""
    ended = airflow.runs(dag, states=["success", "failed"])
    failed = [run.run_id for run in ended if run.state == "failed"]
    tasks = [(run, task) for run in failed for task in airflow.tasks(dag, run) if task.state == "failed"]
    assert not failed, "\n".join(f"{run} {task}: {airflow.log_tail(dag, run, task)}" for run, task in tasks)
    assert len(ended) >= at_least


def write_events(settings: Settings, start: datetime) -> None:
    """The event log as a gateway would have written it."""
    now = start
    log = EventLog(settings.event_log("qa"), clock=lambda: now)
    completion_key = settings.completion_key.get_secret_value().encode()
    pseudonym_key = settings.pseudonym_key.get_secret_value().encode()
    events: list[tuple[datetime, Accepted | Completed | Feedback]] = []
    for hour in range(HOURS):
        for user in range(USERS):
            at = start + timedelta(hours=hour, minutes=5 * user)
            about = {
                "completion_id": issue(completion_key, "qa", at),
                "application": "qa",
                "simulated": True,
                "user": pseudonym(pseudonym_key, f"user-{user}"),
                "question": f"What is option {user} for?",
                **{"release_id": "rel-1", "release_version": "1", "index_build": "b", "prompt_version": "p/1"},
                **{"rollout_id": None, "epoch": None, "arm": None, "assignment_probability": None, "pinned": False},
                "accepted_at": at,
            }
            answer = {
                **{"answer": "For something.", "citations": ("chunk",), "prompt_tokens": 90, "completion_tokens": 7},
                **{"seconds": 0.5, "cost_usd": 0.001, "from_cache": False, "fell_back": False},
            }
            rated = {key: about[key] for key in ("completion_id", "application", "simulated")}
            later = timedelta(hours=3) if user == 0 and hour < HOURS - 4 else timedelta(minutes=1)
            events += [
                (at, Accepted(**about)),
                (at + timedelta(seconds=1), Completed(**about, **answer)),
                (at + later, Feedback(**rated, rating=0.75)),
            ]
    for at, event in sorted(events, key=lambda one: one[0]):
        now = at
        log.append(event)
    log.close()


def content(lake: Lake, tables: tuple[Table, ...]) -> dict[str, list[str]]:
    """What the tables say, without who wrote it when."""
    stamps = [field.name for field in PROVENANCE]
    return {table.path: sorted(map(repr, lake.read(table).drop_columns(stamps).to_pylist())) for table in tables}
