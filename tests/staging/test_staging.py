"""Staging as prod's mirror: what runs in prod runs here, in the real Airflow, on a sample of prod (`make staging`).

The tests are one after the other: each goes on from what the one before has left.
"""

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pyarrow.compute as pc
import pytest
from pydantic import SecretStr

from millrace.airflow_api import Airflow
from millrace.applications import Application
from millrace.demo.users import SimulatedUsers, Visit
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import (
    GOLD_EVALUATION_EXAMPLES,
    GOLD_METRICS_HOURLY,
    OPS_EVALUATIONS,
    SILVER_CHUNKS,
    SILVER_DOCUMENTS,
    SILVER_EXCHANGES,
    SILVER_FEEDBACK,
    Table,
)
from millrace.retrieval.builds import current
from millrace.retrieval.index import declared_builds
from millrace.rollout.decisions import fold, read_journal
from millrace.sources.questions import derive_questions
from millrace.stack import Stack
from tests.environments.production import SECRETS
from tests.staging.conftest import RunDag

pytestmark = [pytest.mark.long, pytest.mark.stack, pytest.mark.timeout(1800)]


def test_the_sample_is_here_a_part_of_prod_with_nobody_in_it(
    run_dag: RunDag, prod: Lake | None, sample: Lake, staging: Lake
) -> None:
    run_dag("sample")
    for table in (GOLD_EVALUATION_EXAMPLES, SILVER_DOCUMENTS, SILVER_EXCHANGES, SILVER_FEEDBACK):
        ours, published = keys(staging, table), keys(sample, table)
        assert published, table.path
        assert published <= ours, table.path
    for table in (SILVER_EXCHANGES, SILVER_FEEDBACK):
        text = json.dumps(staging.read(table).to_pylist(), default=str)
        assert [secret for secret in SECRETS if secret in text] == []
    if prod:
        for table in (SILVER_DOCUMENTS, SILVER_EXCHANGES, SILVER_FEEDBACK):
            assert staging.read(table).num_rows < prod.read(table).num_rows, table.path
        for table in (SILVER_EXCHANGES, SILVER_FEEDBACK):
            ours, theirs = (lake.read(table, ["user"])["user"].to_pylist() for lake in (staging, prod))
            assert set(ours).isdisjoint(theirs)
        sets = (lake.read(GOLD_EVALUATION_EXAMPLES).num_rows for lake in (staging, prod))
        assert len(set(sets)) == 1
    assert set(staging.read(SILVER_CHUNKS)["document_id"].to_pylist()) == set(
        staging.read(SILVER_DOCUMENTS)["document_id"].to_pylist()
    )


def test_a_second_copy_and_an_ingestion_find_nothing_new(run_dag: RunDag, staging: Lake) -> None:
    tables = (SILVER_DOCUMENTS, SILVER_CHUNKS, SILVER_EXCHANGES, SILVER_FEEDBACK)
    versions = [staging.version(table) for table in tables]
    run_dag("sample")
    assert run_dag("ingest_documents")["land"]["seen"] == staging.read(SILVER_DOCUMENTS).num_rows
    assert [staging.version(table) for table in tables] == versions


def test_the_sample_becomes_an_index_and_a_champion(
    run_dag: RunDag, stack: Stack, airflow: Airflow, application: Application, staging: Lake
) -> None:
    run_dag("refresh_embeddings")
    assert current(declared_builds(stack.settings, application))
    run_dag("declare_release", {"variant": "declared"})
    run_dag("rollout")
    assert fold(read_journal(staging)).champion
    until(lambda: ready(stack, application), 240)


def test_the_gateway_answers_to_a_key_only_and_from_the_sample(
    stack: Stack, application: Application, api_key: SecretStr, staging: Lake
) -> None:
    question = questions(staging, application)[0].question
    body = {"model": application.name, "user": "a user", "messages": [{"role": "user", "content": question}]}
    with httpx.Client(base_url=stack.settings.gateway_url, timeout=120, trust_env=False) as client:
        assert client.post("/v1/chat/completions", json=body).status_code == 401
        shown = {"Authorization": f"Bearer {api_key.get_secret_value()}"}
        answered = client.post("/v1/chat/completions", json=body, headers=shown).raise_for_status().json()
    cited = {one["uri"] for one in answered["millrace"]["citations"]}
    assert cited
    assert cited <= set(staging.read(SILVER_DOCUMENTS)["uri"].to_pylist())


@pytest.fixture(scope="session")
def visits(stack: Stack, airflow: Airflow, application: Application, api_key: SecretStr, staging: Lake) -> list[Visit]:
    airflow.unpause(f"{application.name}.ingest_feedback")  # before they come: it catches up on one interval only
    users = SimulatedUsers(
        stack.settings.gateway_urls,
        application.name,
        questions(staging, application),
        application.demo,
        crowd="staging",
        corrections=True,
        api_key=api_key.get_secret_value(),
    )
    return users.visits(8)


def test_what_users_of_staging_say_joins_the_sample(visits: list[Visit], staging: Lake) -> None:
    ids = [visit.completion_id for visit in visits]
    asked = pc.field("completion_id").isin(ids)
    sampled = staging.read(SILVER_EXCHANGES, ["completion_id"], where=~asked).num_rows
    until(lambda: staging.read(SILVER_EXCHANGES, ["completion_id"], where=asked).num_rows == len(ids), 240)
    assert staging.read(SILVER_EXCHANGES, ["completion_id"]).num_rows >= sampled + len(ids)


def test_a_candidate_meets_the_gate_then_a_person_then_users(
    run_dag: RunDag, stack: Stack, airflow: Airflow, person: Airflow, application: Application, staging: Lake
) -> None:
    for stage in ("evaluate_candidate", "approve"):
        airflow.unpause(f"{application.name}.{stage}")
    began = datetime.now(UTC)
    variant = "same" if "same" in application.prompt.variants else min(application.prompt.variants)
    declared = run_dag("declare_release", {"variant": variant})["declare"]
    if not declared["changed"]:
        pytest.skip(f"this staging has met version {declared['version']} before")
    candidate = declared["version"]
    verdict = evaluated(staging, candidate)
    if not verdict["passed"]:
        assert variant != "same", verdict["criteria"]
        assert fold(read_journal(staging)).waiting == ()
        return
    asked = airflow.wait_for_asset_run(f"{application.name}.approve", since=began, timeout=180)
    until(lambda: state(airflow, asked.dag_id, asked.run_id, "approve") == "awaiting_input", 180)
    assert fold(read_journal(staging)).waiting == ()
    time.sleep(15)  # Airflow fails a task that is answered before its worker has left; no person is that quick.
    person.answer(asked.dag_id, asked.run_id, "approve", "Approve", reason="good in staging")
    assert airflow.wait_for_run(asked.dag_id, asked.run_id, timeout=300).state == "success"
    [admitted] = [one for one in read_journal(staging) if one.kind == "admit" and one.challenger == candidate]
    assert admitted.actor in stack.settings.airflow_users
    assert admitted.reason == "good in staging"
    run_dag("rollout")
    assert fold(read_journal(staging)).challenger == candidate


def test_what_else_a_week_brings_runs_on_the_sample(run_dag: RunDag, visits: list[Visit], staging: Lake) -> None:
    now = datetime.now(UTC)
    run_dag("monitor", logical_date=now, data_interval=(now - timedelta(hours=1), now))
    measured = staging.read(GOLD_METRICS_HOURLY, ["exchanges"])["exchanges"]
    assert pc.sum(measured).as_py() >= len(visits)
    kept = run_dag("maintain_lakehouse")["tidy"]
    assert {SILVER_EXCHANGES.path, GOLD_METRICS_HOURLY.path} <= kept.keys()
    assert run_dag("optimize_prompt")["study"]["trials"]


def test_a_fine_tune_on_the_sample_is_a_candidate_that_the_gate_judges(run_dag: RunDag, staging: Lake) -> None:
    result = run_dag("finetune")
    assert result["build_set"]["corrections"]  # of prod's users, on questions that were scrubbed
    assert evaluated(staging, result["release"]["version"])["champion"] == fold(read_journal(staging)).champion


def keys(lake: Lake, table: Table) -> set[tuple[object, ...]]:
    return {tuple(row.values()) for row in lake.read(table, list(table.key)).to_pylist()}


def evaluated(staging: Lake, candidate: str) -> dict[str, Any]:
    """The gate's latest verdict on a candidate, once there is one."""
    about = pc.field("candidate") == candidate
    until(lambda: staging.read(OPS_EVALUATIONS, ["candidate"], where=about).num_rows, 900)
    return staging.read(OPS_EVALUATIONS, where=about).sort_by("evaluated_at").to_pylist()[-1]


def questions(staging: Lake, application: Application) -> list[Any]:
    """What users may ask: not what a fine-tune learns, nor what the gate asks."""
    known = derive_questions(staging.read(SILVER_DOCUMENTS), application)
    return [one for one in known if one.split == "live"]


def ready(stack: Stack, application: Application) -> bool:
    try:
        answer = httpx.get(f"{stack.settings.gateway_url}/readyz", timeout=5, trust_env=False).json()
    except httpx.HTTPError:
        return False
    return answer["applications"].get(application.name) == "ready"


def state(airflow: Airflow, dag_id: str, run_id: str, task_id: str) -> str | None:
    return {task.task_id: task.state for task in airflow.tasks(dag_id, run_id)}[task_id]


def until(holds: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s"
        time.sleep(1)
