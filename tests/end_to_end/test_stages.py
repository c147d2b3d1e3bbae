"""What the story leaves alone, in the real Airflow: every form as the UI sends it, a stream, a breach that retrains."""

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pyarrow.compute as pc
import pytest

from millrace.airflow_api import Airflow
from millrace.applications import load_application
from millrace.batch.questions import submit_questions
from millrace.demo.run import Told
from millrace.demo.users import SIMULATED
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import (
    GOLD_ANSWERS,
    GOLD_METRICS_HOURLY,
    OPS_BREACHES,
    PROVENANCE,
    SILVER_EXCHANGES,
    SILVER_FEEDBACK,
)
from millrace.settings import PROJECT
from millrace.stack import Stack

pytestmark = [pytest.mark.long, pytest.mark.stack, pytest.mark.timeout(3600)]

ELSEWHERE = {"publish_sample", "sample"}  # prod's and staging's
STAGES = sorted({path.stem for path in (PROJECT / "dags").glob("*.py")} - ELSEWHERE)


def run(airflow: Airflow, dag_id: str, form: dict[str, Any], **about: Any) -> str:
    """The id of a run that succeeded; else the last lines of the tasks that failed."""
    started = airflow.trigger(dag_id, form, **about).run_id
    if airflow.wait_for_run(dag_id, started, timeout=600).state != "success":
        failed = [task for task in airflow.tasks(dag_id, started) if task.state == "failed"]
        pytest.fail("\n".join(f"{task.task_id}: {airflow.log_tail(dag_id, started, task)}" for task in failed))
    return started


@pytest.mark.parametrize("stage", STAGES)
def test_every_dag_runs_from_its_form_as_the_ui_sends_it(running_stack: Stack, told: Told, stage: str) -> None:
    with running_stack.airflow() as airflow:
        # The form opens with the defaults, and sends all of them with the moment of the click as logical date.
        form = airflow._call("GET", f"/dags/qa.{stage}/details")["params"]
        sent = {name: field["value"] for name, field in form.items()}
        run(airflow, f"qa.{stage}", sent, logical_date=datetime.now(UTC))


def test_a_table_of_questions_is_answered_once_as_a_batch_and_as_a_stream(
    running_stack: Stack, told: Told, qa_lake: Lake, tmp_path: Path
) -> None:
    settings = running_stack.settings
    questions = [f"What is option {n} for?" for n in range(3)]
    file = tmp_path / "options.jsonl"
    file.write_text("".join(f"{json.dumps({'question': question})}\n" for question in questions))
    submit_questions(settings, load_application(settings, "qa"), file, run="test", simulated=True)
    form = {"mode": "batch", "release": None, "limit": 2, "batch": "options", "retry_errors": False}

    def answers() -> list[dict[str, Any]]:
        return qa_lake.read(GOLD_ANSWERS, where=pc.field("question").isin(questions)).to_pylist()

    with running_stack.airflow() as airflow:
        run(airflow, "qa.batch_inference", form)
        assert len(answers()) == 2
        run(airflow, "qa.batch_inference", form | {"mode": "stream", "limit": None, "batch": None})
    assert len({row["question_id"] for row in answers()}) == len(answers()) == 3
    assert sorted(row["mode"] for row in answers()) == ["batch", "batch", "stream"]


def test_a_repeat_of_the_monitor_changes_nothing(running_stack: Stack, told: Told, qa_lake: Lake) -> None:
    def content() -> list[str]:
        measured = qa_lake.read(GOLD_METRICS_HOURLY)
        return sorted(map(repr, measured.drop_columns([field.name for field in PROVENANCE]).to_pylist()))

    before = content()
    last = pc.max(qa_lake.read(GOLD_METRICS_HOURLY, ["interval_start"])["interval_start"]).as_py()
    with running_stack.airflow() as airflow:
        interval = (last, last + timedelta(hours=1))
        run(airflow, "qa.monitor", {}, logical_date=datetime.now(UTC), data_interval=interval)
    assert content() == before


def test_a_form_with_another_budget_holds_another_study(running_stack: Stack, told: Told) -> None:
    with running_stack.airflow() as airflow:
        held = run(airflow, "qa.optimize_prompt", {"trials": 1, "token_budget": 30_000})
        result = airflow.result("qa.optimize_prompt", held, "study")
    assert (result["verdict"], result["trials"]) == ("not better", 1)


def test_bad_ratings_breach_the_policy_and_start_a_retraining(running_stack: Stack, told: Told, qa_lake: Lake) -> None:
    began = datetime.now(UTC)
    # It takes 30 users of one release in one minute; what a form made may be rolling out by now, and the minute end.
    rated = rate_badly(running_stack.settings.gateway_url, users=160)
    arrived = pc.field("completion_id").isin(rated)
    until(lambda: qa_lake.read(SILVER_FEEDBACK, ["completion_id"], where=arrived).num_rows == len(rated), 180)
    asked = qa_lake.read(SILVER_EXCHANGES, ["occurred_at"], where=arrived)["occurred_at"].to_pylist()
    minute = timedelta(minutes=1)  # the window of the tests' declaration
    until(lambda: datetime.now(UTC) > max(asked) + minute, 120)
    with running_stack.airflow() as airflow:
        run(airflow, "qa.monitor", {}, logical_date=datetime.now(UTC))
        retraining = airflow.wait_for_asset_run("qa.finetune", since=began, timeout=120)
        assert airflow.wait_for_run("qa.finetune", retraining.run_id, timeout=600).state == "success"
    found = qa_lake.read(OPS_BREACHES, where=pc.field("at") >= began).to_pylist()
    assert {row["action"] for row in found if row["metric"] == "rating_mean"} == {"retrain"}
    assert all(row["simulated"] for row in found)


def rate_badly(gateway_url: str, users: int) -> list[str]:
    """Completion ids of answers that as many simulated users found worthless."""
    rated = []
    with httpx.Client(base_url=gateway_url, headers=SIMULATED, timeout=120, trust_env=False) as client:
        for number in range(users):
            question = {"role": "user", "content": "What is the default of parallelism?"}
            body = {"model": "qa", "user": f"disappointed-{number}", "messages": [question]}
            answered = client.post("/v1/chat/completions", json=body).raise_for_status().json()
            feedback = {"completion_id": answered["id"], "rating": 0.0}
            client.post("/v1/feedback", json=feedback).raise_for_status()
            rated.append(answered["id"])
    return rated


def until(done: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(1)
