"""Every stage that the story leaves alone, in the real Airflow, triggered as its form in the UI sends it."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from millrace.airflow_api import Airflow
from millrace.applications import load_application
from millrace.batch.questions import submit_questions
from millrace.demo.run import Told
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import GOLD_ANSWERS, GOLD_METRICS_HOURLY, OPS_COSTS, OPS_PROMPT_TRIALS, SILVER_EXCHANGES
from millrace.stack import Stack

pytestmark = [pytest.mark.long, pytest.mark.stack, pytest.mark.timeout(1200)]


def run(airflow: Airflow, dag_id: str, form: dict[str, Any], **about: Any) -> str:
    """The id of a run that succeeded; else the last lines of the tasks that failed."""
    started = airflow.trigger(dag_id, form, **about).run_id
    if airflow.wait_for_run(dag_id, started, timeout=600).state != "success":
        failed = [task for task in airflow.tasks(dag_id, started) if task.state == "failed"]
        pytest.fail("\n".join(f"{task.task_id}: {airflow.log_tail(dag_id, started, task)}" for task in failed))
    return started


def test_a_table_of_questions_is_answered_once_as_a_batch_and_as_a_stream(
    running_stack: Stack, told: Told, qa_lake: Lake, tmp_path: Path
) -> None:
    settings = running_stack.settings
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(f"{json.dumps({'question': f'What is option {n} for?'})}\n" for n in range(3)))
    submit_questions(settings, load_application(settings, "qa"), file, run="test", simulated=True)
    form = {"mode": "batch", "release": None, "limit": 2, "batch": None, "retry_errors": False}
    with running_stack.airflow() as airflow:
        run(airflow, "qa.batch_inference", form)
        assert qa_lake.read(GOLD_ANSWERS).num_rows == 2
        run(airflow, "qa.batch_inference", form | {"mode": "stream", "limit": None})
    answers = qa_lake.read(GOLD_ANSWERS).to_pylist()
    assert len({row["question_id"] for row in answers}) == len(answers) == 3
    assert sorted(row["mode"] for row in answers) == ["batch", "batch", "stream"]


def test_a_monitors_metrics_count_every_exchange_of_the_story_and_a_repeat_changes_nothing(
    running_stack: Stack, told: Told, qa_lake: Lake
) -> None:
    end = datetime.now(UTC).replace(second=0, microsecond=0)
    for back in (1, 0):
        interval = (end - timedelta(minutes=back + 1), end - timedelta(minutes=back))
        with running_stack.airflow() as airflow:
            run(airflow, "qa.monitor", {}, logical_date=interval[0], data_interval=interval)
        measured = qa_lake.read(GOLD_METRICS_HOURLY)
        assert sum(measured["exchanges"].to_pylist()) == qa_lake.read(SILVER_EXCHANGES).num_rows


def test_a_study_of_prompts_is_held_and_says_what_it_found(running_stack: Stack, told: Told, qa_lake: Lake) -> None:
    with running_stack.airflow() as airflow:
        held = run(airflow, "qa.optimize_prompt", {"trials": 2, "token_budget": 20_000})
        result = airflow.result("qa.optimize_prompt", held, "study")
    assert result["verdict"] in ("better", "not better")
    assert qa_lake.read(OPS_PROMPT_TRIALS).num_rows == 2
    assert "optimisation" in qa_lake.read(OPS_COSTS)["stage"].to_pylist()


def test_the_lakehouse_is_tidied_and_holds_what_it_held(running_stack: Stack, told: Told, qa_lake: Lake) -> None:
    before = sorted(qa_lake.read(SILVER_EXCHANGES)["completion_id"].to_pylist())
    with running_stack.airflow() as airflow:
        tidied = run(airflow, "qa.maintain_lakehouse", {})
        result = airflow.result("qa.maintain_lakehouse", tidied, "tidy")
    assert result["silver/exchanges"]["files"] <= result["silver/exchanges"]["files_before"]
    assert sorted(qa_lake.read(SILVER_EXCHANGES)["completion_id"].to_pylist()) == before
