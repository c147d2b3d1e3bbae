"""The loop as `make run` turns it, through the real Airflow, on a small corpus; then what an operator does to it."""

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.compute as pc
import pytest

from millrace.airflow_api import Airflow
from millrace.demo.run import Told
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import (
    BRONZE_EVENTS,
    OPS_EVALUATIONS,
    PROVENANCE,
    QUARANTINE_FEEDBACK,
    SILVER_EXCHANGES,
    SILVER_FEEDBACK,
)
from millrace.rollout.decisions import read_journal
from millrace.stack import Stack
from millrace.stack.environment import settings_variables
from tests.canaries import Canaries, CommandLines
from tests.conftest import Webhook

pytestmark = [pytest.mark.stack, pytest.mark.timeout(3600)]


def test_the_loop_turns_once_and_every_stage_does_its_work(running_stack: Stack, told: Told) -> None:
    report = json.loads((running_stack.settings.home / "report.json").read_text())

    assert [stage["state"] for stage in report["stages"] if stage["state"] in ("failed", "waiting", "running")] == []
    assert report["simulated_users"] is True
    assert {entry["field"] for entry in report["pace_differences"]} >= {"training.max_examples"}
    assert "simulated" in (running_stack.settings.home / "report.html").read_text()


def test_the_broken_release_was_refused_let_past_on_purpose_and_rolled_back(told: Told, qa_lake: Lake) -> None:
    journal = read_journal(qa_lake)
    admitted = [one for one in journal if one.kind == "admit" and "on purpose" in one.reason]
    broken = admitted[-1].challenger
    verdicts = qa_lake.read(OPS_EVALUATIONS, ["candidate", "passed"], where=pc.field("candidate") == broken)

    assert admitted[-1].simulated
    assert not any(verdicts["passed"].to_pylist())
    assert [d.kind for d in journal if d.challenger == broken][-1] == "rollback"


def test_a_refusal_by_the_gate_and_a_rollback_reach_the_webhook_with_numbers_and_runbook(
    told: Told, webhook: Webhook
) -> None:
    refusal = next(alert for alert in webhook.received if "the gate refused" in alert["title"])
    rollback = next(alert for alert in webhook.received if "rolled back" in alert["title"])

    assert refusal["title"].startswith("qa.evaluate_candidate: the gate refused version ")
    assert "quality went from" in refusal["message"]
    assert "/dags/qa.evaluate_candidate" in refusal["message"]
    assert "/dags/qa.rollout" in rollback["message"]


def test_every_exchange_and_rating_of_the_story_is_marked_as_simulated(told: Told, qa_lake: Lake) -> None:
    for table in (SILVER_EXCHANGES, SILVER_FEEDBACK):
        rows = qa_lake.read(table, ["simulated"])
        assert rows.num_rows
        assert all(rows["simulated"].to_pylist()), table.path


def test_a_clear_and_a_backfill_beside_live_runs_change_nothing(
    running_stack: Stack, told: Told, qa_lake: Lake
) -> None:
    with running_stack.airflow() as airflow:
        settle(airflow, "qa.ingest_feedback")
        ended = [run for run in airflow.runs("qa.ingest_feedback", states=["success"]) if run.data_interval_start]
        assert len(ended) >= 3, "the story takes minutes, and every minute has its run"
        first, last = ended[-3], ended[-1]
        before = content(qa_lake)

        airflow.clear_run("qa.ingest_feedback", first.run_id)
        backfill = airflow.backfill("qa.ingest_feedback", first.logical_date, last.logical_date)
        airflow.wait_for_backfill(backfill, timeout=600)
        settle(airflow, "qa.ingest_feedback")

        reran = airflow.run("qa.ingest_feedback", first.run_id)
        assert reran.state == "success"
        assert reran.start > first.start, "the run was not run again"
    assert content(qa_lake) == before


def test_a_later_try_that_finds_nothing_left_to_change_still_tells_who_waits_for_it(
    running_stack: Stack, told: Told
) -> None:
    """As one whose first try died after its commit."""
    with running_stack.airflow() as airflow:
        documents = airflow.runs("qa.ingest_documents", states=["success"])[-1]
        since = datetime.now(UTC)
        airflow.clear_run("qa.ingest_documents", documents.run_id)
        heard = airflow.wait_for_asset_run("qa.refresh_embeddings", since, timeout=300)
        airflow.wait_for_run("qa.refresh_embeddings", heard.run_id, timeout=300)
        assert airflow.result("qa.ingest_documents", documents.run_id, "chunk")["changed"] is False


def test_a_person_sees_who_answers_and_gets_an_answer_with_its_citations(running_stack: Stack, told: Told) -> None:
    settings = running_stack.settings

    def millrace(*words: str) -> str:
        ran = subprocess.run(
            [str(Path(sys.executable).parent / "millrace"), *words],
            env=os.environ | settings_variables(settings, keys=False),
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    qa = json.loads(millrace("status", "--json"))["applications"]["qa"]
    assert (qa["champion"], qa["challenger"]) == (qa["split"]["champion"], None)
    assert qa["last_decision"]["kind"] in ("rollback", "promote")
    assert {"qa.ingest_documents", "qa.finetune", "qa.rollout"} <= {run["dag"] for run in qa["last_runs"]}

    answer = millrace("ask", "What is the default of parallelism in the core section?")
    assert f"release {qa['champion']} " in answer
    assert "airflow" in answer.lower()
    assert f"champion {qa['champion']}" in millrace("status")
    assert f"{qa['champion']:>4}  " in millrace("release", "list")


@pytest.mark.slow
def test_no_secret_is_where_it_does_not_belong(
    running_stack: Stack, told: Told, canaries: Canaries, command_lines: CommandLines
) -> None:
    """Every secret of this stack is a canary; all that the story left behind is searched for them: files (logs, events,
    tables, artifacts), rows of the databases (rendered fields, XComs), and what processes were called with."""
    assert canaries.not_planted(running_stack) == []
    assert canaries.left_by(running_stack) == []
    assert [line for line in command_lines.seen if canaries.are_in(line)] == []


def settle(airflow: Airflow, dag_id: str) -> None:
    """Until no run of the DAG is queued or running."""
    deadline = time.monotonic() + 300
    while airflow.runs(dag_id, states=["queued", "running"]):
        assert time.monotonic() < deadline, f"{dag_id} does not come to rest"
        time.sleep(1)


def content(lake: Lake) -> dict[str, list[str]]:
    """What the tables of feedback say, without who wrote it when."""
    stamps = [field.name for field in PROVENANCE]
    tables = (BRONZE_EVENTS, SILVER_EXCHANGES, SILVER_FEEDBACK, QUARANTINE_FEEDBACK)
    return {table.path: sorted(map(repr, lake.read(table).drop_columns(stamps).to_pylist())) for table in tables}
