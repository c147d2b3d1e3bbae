"""The whole stack, saved while it is asked and after it ended, destroyed, and restored: compared table by table, and
it goes on from there."""

import hashlib
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pyarrow.compute as pc
import pytest

from millrace.airflow_api import Airflow
from millrace.applications import Application, load_application
from millrace.environments.audit import verify
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_EXCHANGES, SILVER_FEEDBACK
from millrace.releases import published_split, registry
from millrace.rollout.decisions import fold, read_journal
from millrace.serving.key_store import KeyStore
from millrace.settings import Settings
from millrace.sources.event_log import read_events
from millrace.sources.feedback import land_events, refine_feedback
from millrace.stack import Stack, down, with_keys_url
from millrace.stack.backup import restore, save
from tests.conftest import stack_settings
from tests.stack.backup.reading import databases, delta_tables, files

EVER = (datetime(2020, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC))

pytestmark = [pytest.mark.long, pytest.mark.stack, pytest.mark.timeout(1800)]


@pytest.fixture
def own(open_folder: Path) -> Iterator[Settings]:
    settings = stack_settings(Path(tempfile.mkdtemp(dir=open_folder)))
    yield settings
    down(settings)


def test_a_stack_is_saved_while_it_works_destroyed_and_restored_and_goes_on(own: Settings, tmp_path: Path) -> None:
    application = load_application(own, "handbook")
    with Stack(own) as stack, stack.airflow() as airflow:
        settings = stack.settings
        first_champion(airflow, settings)
        until_ready(settings)
        acknowledged = [ask(settings, f"user {n}") for n in range(3)]
        before = known_releases(settings, application, tmp_path / "before")
        assert before["aliases"]["champion"] in before["versions"]
        with asked_all_the_time(settings):
            running = save(settings, tmp_path / "backups", secrets=True)
        assert running.missing == ()
    ended = save(own, tmp_path / "backups", secrets=True)
    held = delta_tables(own.home / "lake"), databases(own), files(own.home)
    assert {name.split(".")[0] for name, rows in held[1].items() if rows} == {"airflow", "gateway", "mlflow"}
    assert len(held[0]) >= 8

    # What was saved when nothing ran any more, is what there was.
    shutil.rmtree(own.home)
    restore(own, tmp_path / "backups", ended.name)
    assert delta_tables(own.home / "lake") == held[0]
    assert databases(own) == held[1]
    assert files(own.home) == held[2]

    # What was saved in full flight works as a deployment.
    shutil.rmtree(own.home)
    restore(own, tmp_path / "backups", running.name)
    with Stack(own) as stack, stack.airflow() as airflow:
        settings = stack.settings
        assert known_releases(settings, application, tmp_path / "after") == before
        lake = Lake.of(settings, "handbook")
        assert published_split.read_split(settings, "handbook") == fold(read_journal(lake)).split()
        assert verify(settings).entries > 0
        assert [key.name for key in KeyStore(with_keys_url(settings)).all()] == ["a key of before"]
        lines = read_events(settings.event_log("handbook"), *EVER)
        assert set(acknowledged) <= {line.event.completion_id for line in lines if line.event}

        until_ready(settings)
        rated = ask(settings, "a user of after")
        rate(settings, rated)
        rate(settings, acknowledged[0])  # with the same keys, an answer of before is known
        land_events(settings, application, *EVER, run="test")
        refine_feedback(settings, application, *EVER, run="test")
        asked = pc.field("completion_id").isin([rated, *acknowledged])
        assert lake.read(SILVER_EXCHANGES, where=asked).num_rows == 4
        assert lake.read(SILVER_FEEDBACK, where=asked).num_rows == 2
        succeed(airflow, "handbook.ingest_documents")
        succeed(airflow, "handbook.rollout")


def first_champion(airflow: Airflow, settings: Settings) -> None:
    for stage in ("refresh_embeddings", "ingest_documents", "declare_release", "rollout"):
        airflow.wait_for_dag(f"handbook.{stage}")
    airflow.unpause("handbook.refresh_embeddings")
    succeed(airflow, "handbook.ingest_documents")
    run = airflow.wait_for_asset_run(
        "handbook.refresh_embeddings", since=airflow.runs("handbook.ingest_documents")[0].run_after, timeout=300
    )
    assert airflow.wait_for_run(run.dag_id, run.run_id, timeout=600).state == "success"
    succeed(airflow, "handbook.declare_release")
    succeed(airflow, "handbook.rollout")
    store = KeyStore(with_keys_url(settings))
    store.create(
        "a key of before", owner="a test", scopes=["ask"], applications=None, requests_per_minute=None,
        monthly_budget_usd=None, expires_at=None, actor="a test",
    )  # fmt: skip
    store.close()


def succeed(airflow: Airflow, dag_id: str) -> None:
    """Or the last lines of the tasks that failed."""
    run = airflow.trigger(dag_id).run_id
    if airflow.wait_for_run(dag_id, run, timeout=600).state != "success":
        tasks = [task for task in airflow.tasks(dag_id, run) if task.state == "failed"]
        pytest.fail("\n".join(f"{task.task_id}: {airflow.log_tail(dag_id, run, task)}" for task in tasks))


def ask(settings: Settings, user: str) -> str:
    """The completion's id."""
    asked = {"model": "handbook", "user": user, "messages": [{"role": "user", "content": "Who may freeze a rollout?"}]}
    answer = httpx.post(f"{settings.gateway_url}/v1/chat/completions", json=asked, timeout=120).raise_for_status()
    return str(answer.json()["id"])


def until_ready(settings: Settings) -> None:
    deadline = time.monotonic() + 180
    while httpx.get(f"{settings.gateway_url}/readyz").json()["applications"].get("handbook") != "ready":
        assert time.monotonic() < deadline
        time.sleep(1)


def rate(settings: Settings, completion: str) -> None:
    told = {"completion_id": completion, "rating": 1.0}
    httpx.post(f"{settings.gateway_url}/v1/feedback", json=told, timeout=60).raise_for_status()


@contextmanager
def asked_all_the_time(settings: Settings) -> Iterator[None]:
    ending = threading.Event()

    def user() -> None:
        while not ending.is_set():
            ask(settings, "somebody")

    asking = threading.Thread(target=user)
    asking.start()
    try:
        yield
    finally:
        ending.set()
        asking.join()


def known_releases(settings: Settings, application: Application, folder: Path) -> dict[str, Any]:
    """Versions with their tags and every byte of theirs, and aliases."""
    folder.mkdir()
    found: dict[str, Any] = {"aliases": published_split.read_aliases(settings, application.name), "versions": {}}
    for version, tags in registry.versions(settings, application).items():
        registry.fetch_model(settings, application, version, folder / version)
        hashes = {
            str(path.relative_to(folder / version)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (folder / version).rglob("*")
            if path.is_file()
        }
        assert hashes
        found["versions"][version] = tags, hashes
    return found
