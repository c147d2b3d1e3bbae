"""A second application beside `qa`, declared in a file: its loop, and the people that its policy asks."""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import openai
import pyarrow as pa
import pytest

from millrace.airflow_api import Airflow
from millrace.applications import load_application
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_EVALUATIONS, SILVER_CHUNKS
from millrace.releases.registry import BUILDER_TAG, tag_release
from millrace.rollout.decisions import fold, read_journal
from millrace.stack import Stack
from tests.conftest import Webhook

pytestmark = [pytest.mark.stack, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def handbook(running_stack: Stack) -> Lake:
    """The application's lake, after its DAGs have made documents, an index build and a champion."""
    with running_stack.airflow() as airflow:
        for dag in ("refresh_embeddings", "evaluate_candidate"):
            airflow.wait_for_dag(f"handbook.{dag}")
            airflow.unpause(f"handbook.{dag}")
        succeed(airflow, "handbook.ingest_documents")
        run = airflow.wait_for_asset_run(
            "handbook.refresh_embeddings", since=airflow.runs("handbook.ingest_documents")[0].run_after, timeout=120
        )
        ends(airflow, run.dag_id, run.run_id, "success")
        succeed(airflow, "handbook.declare_release")
        succeed(airflow, "handbook.rollout")
    return Lake.of(running_stack.settings, "handbook")


def test_a_second_application_runs_beside_the_first_without_a_line_of_code(
    running_stack: Stack, handbook: Lake
) -> None:
    settings = running_stack.settings
    until(lambda: "handbook" in ready(settings.gateway_url), 180)
    client = openai.OpenAI(base_url=f"{settings.gateway_url}/v1", api_key="unused")

    answer = client.chat.completions.create(
        model="handbook", user="a test", messages=[{"role": "user", "content": "Who may freeze a rollout?"}]
    )

    assert answer.choices[0].message.content
    assert handbook.read(SILVER_CHUNKS).num_rows
    assert "handbook" in answer.model_extra["millrace"]["citations"][0]["uri"]


def test_a_run_that_is_late_is_said_with_its_state_and_runbook(handbook: Lake, webhook: Webhook) -> None:
    def late() -> list[dict]:
        return [alert for alert in webhook.received if alert["title"] == "handbook.ingest_documents is late"]

    until(late, 60)
    assert "has not ended 0.05 minutes after it was queued" in late()[0]["message"]
    assert "/dags/handbook.ingest_documents" in late()[0]["message"]


@pytest.mark.long
def test_a_run_that_failed_without_a_word_is_said_by_the_next_look(
    running_stack: Stack, handbook: Lake, webhook: Webhook
) -> None:
    with running_stack.airflow() as airflow:

        def look() -> None:
            run = airflow.trigger("handbook.monitor", logical_date=datetime.now(UTC)).run_id
            ends(airflow, "handbook.monitor", run, "success")

        look()
        run = airflow.trigger("handbook.optimize_prompt").run_id
        # As when its process is killed: no callback of the task's runs.
        airflow._call("PATCH", f"/dags/handbook.optimize_prompt/dagRuns/{run}", json={"state": "failed"})
        look()
        look()
    said = [alert for alert in webhook.received if alert["title"].startswith("handbook.optimize_prompt")]
    assert [alert["title"] for alert in said] == ["handbook.optimize_prompt failed"]
    assert "1 more of its runs failed, and no task said why" in said[0]["message"]


@pytest.mark.long
def test_a_question_that_nobody_answers_is_reminded_of_then_fails_and_decides_nothing(
    running_stack: Stack, handbook: Lake, webhook: Webhook
) -> None:
    declaration = running_stack.settings.applications / "handbook.toml"
    declared = declaration.read_text()
    hurried = declared.replace("[promotion]\n", "[promotion]\ntimeout_hours = 0.01\n") + "approve = 0.1\n"
    with running_stack.airflow() as airflow:
        built = airflow.trigger("handbook.declare_release", {"variant": "short"})
        ends(airflow, built.dag_id, built.run_id, "success")
        passed(handbook, airflow.result(built.dag_id, built.run_id, "declare")["version"])
        try:
            declare(airflow, declaration, hurried)
            unanswered = airflow.trigger("handbook.approve").run_id
            until(lambda: [one for one in webhook.received if one["title"] == "handbook.approve is late"], 60)
            ends(airflow, "handbook.approve", unanswered, "failed")
            until(lambda: [one for one in webhook.received if one["title"] == "handbook.approve.approve failed"], 60)
        finally:
            declare(airflow, declaration, declared)
    assert [one.kind for one in read_journal(handbook) if one.kind == "admit"] == []
    assert fold(read_journal(handbook)).waiting == ()


def test_a_person_who_did_not_build_it_lets_a_release_roll_out_and_the_journal_says_who_and_why(
    running_stack: Stack, handbook: Lake, webhook: Webhook
) -> None:
    with Airflow(running_stack.settings.airflow_url, "admin", running_stack.airflow_password) as airflow:
        built = airflow.trigger("handbook.declare_release", {"variant": "short"})
        ends(airflow, built.dag_id, built.run_id, "success")
        version = airflow.result(built.dag_id, built.run_id, "declare")["version"]
        passed(handbook, version)

        # This Airflow's one person built it by hand, so that person may not answer.
        refused = asked(airflow)
        until(lambda: any("waits" in alert["title"] for alert in webhook.received), 60)
        airflow.answer("handbook.approve", refused, "approve", "Approve", reason="mine is fine")
        ends(airflow, "handbook.approve", refused, "failed")
        until(lambda: any("admin built version" in alert["message"] for alert in webhook.received), 60)
        assert fold(read_journal(handbook)).waiting == ()

        # As if ann had.
        settings = running_stack.settings
        tag_release(settings, load_application(settings, "handbook"), version, {BUILDER_TAG: "ann"})
        airflow.answer("handbook.approve", again := asked(airflow), "approve", "Approve", reason="short is good")
        ends(airflow, "handbook.approve", again, "success")

    admitted = [decision for decision in read_journal(handbook) if decision.kind == "admit"][-1]
    assert (admitted.challenger, admitted.actor, admitted.reason) == (version, "admin", "short is good")


def declare(airflow: Airflow, path: Path, declaration: str) -> None:
    """Write another declaration, and wait until Airflow has read its DAG."""

    path.write_text(declaration)
    # What began to be parsed before ends within seconds.
    written = datetime.now(UTC) + timedelta(seconds=5)

    def parsed() -> datetime:
        return datetime.fromisoformat(airflow._call("GET", "/dags/handbook.approve")["last_parsed_time"])

    until(lambda: parsed() > written, 120)


def passed(lake: Lake, candidate: str) -> None:
    """What the gate writes of a release that passed: this application has no question to compare releases on."""
    row = {field.name: "x" for field in OPS_EVALUATIONS.columns} | {
        "champion": fold(read_journal(lake)).champion,
        "candidate": candidate,
        "passed": True,
        "criteria": "[]",
        "evaluated_at": datetime.now(UTC),
    }
    lake.merge(OPS_EVALUATIONS, pa.Table.from_pylist([row], schema=OPS_EVALUATIONS.rows_schema), run="test")


def asked(airflow: Airflow) -> str:
    """A run of the promotion that waits for an answer."""
    run = airflow.trigger("handbook.approve").run_id

    def waiting() -> bool:
        states = {task.task_id: task.state for task in airflow.tasks("handbook.approve", run)}
        return states["approve"] == "awaiting_input"

    until(waiting, 120)
    time.sleep(5)  # Airflow fails a task that is answered before its worker has left; no person is that quick.
    return run


def succeed(airflow: Airflow, dag_id: str) -> None:
    ends(airflow, dag_id, airflow.trigger(dag_id).run_id, "success")


def ends(airflow: Airflow, dag_id: str, run_id: str, state: str) -> None:
    """Or the last lines of the tasks that failed."""
    if airflow.wait_for_run(dag_id, run_id, timeout=600).state != state:
        tasks = [task for task in airflow.tasks(dag_id, run_id) if task.state == "failed"]
        pytest.fail("\n".join(f"{task.task_id}: {airflow.log_tail(dag_id, run_id, task)}" for task in tasks))


def ready(url: str) -> set[str]:
    """Applications that the gateway answers for."""
    return {name for name, state in httpx.get(f"{url}/readyz").json()["applications"].items() if state == "ready"}


def until(holds: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(1)
