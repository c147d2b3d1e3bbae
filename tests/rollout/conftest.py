"""An application of its own for every test, with four registered versions, at the pace of a demo."""

import uuid
from datetime import UTC, datetime

import mlflow
import pyarrow as pa
import pytest

from millrace.applications import Application, Rollout
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_EVALUATIONS
from millrace.releases.registry import RELEASE_TAG
from millrace.settings import Settings


@pytest.fixture
def policy() -> Rollout:
    return Rollout.model_validate(
        {
            "steps": [{"share": 0.25, "margin": 0.4}, {"share": 0.5, "margin": 0.3}],
            "window_seconds": 20,
            "minimum_users": 10,
        }
    )


@pytest.fixture
def tracked(settings: Settings, mlflow_uri: str) -> Settings:
    """Settings with the session's MLflow server."""
    return settings.model_copy(update={"mlflow_uri": mlflow_uri})


@pytest.fixture
def application(tracked: Settings, qa: Application, policy: Rollout) -> Application:
    """The rollout never opens a release: versions are registered without weights."""
    own = qa.model_copy(update={"name": f"qa_{uuid.uuid4().hex[:8]}", "rollout": policy})
    client = mlflow.MlflowClient(tracking_uri=tracked.mlflow_url, registry_uri=tracked.mlflow_url)
    client.create_registered_model(own.name)
    run = client.create_run("0").info
    for _ in range(4):
        client.create_model_version(
            own.name,
            source=f"{run.artifact_uri}/release",
            run_id=run.run_id,
            tags={RELEASE_TAG: "r"},
            await_creation_for=0,
        )
    return own


def passes_gate(settings: Settings, application: Application, version: str, *, passed: bool = True) -> None:
    """As the gate writes it down, against version 1."""
    row = {field.name: "x" for field in OPS_EVALUATIONS.columns} | {
        "champion": "1",
        "candidate": version,
        "evaluation_id": uuid.uuid4().hex,
        "passed": passed,
        "criteria": "[]",
        "evaluated_at": datetime.now(UTC),
    }
    rows = pa.Table.from_pylist([row], schema=OPS_EVALUATIONS.rows_schema)
    Lake.of(settings, application.name).merge(OPS_EVALUATIONS, rows, run="test")
