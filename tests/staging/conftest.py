"""The staging environment that the suite runs on: the embedded stack in `MILLRACE_ENVIRONMENT=staging`, on a lake that
has the sample of a prod. Where the caller names a home (`MILLRACE_HOME`), that one with all of the caller's settings;
else one of its own, with the declarations of `tests/applications` and a prod that is made for the purpose."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from millrace.airflow_api import Airflow
from millrace.applications import Application, load_application
from millrace.environments.access.airflow_wall import password_file
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.places import SAMPLE
from millrace.serving.key_store import KeyStore
from millrace.settings import Settings, read_settings
from millrace.stack import Stack
from tests.conftest import stack_settings
from tests.environments.production import fill_prod, publish

SAME = """same = '''
{% for chunk in chunks %}{{ chunk.title }}
{{ chunk.text }}

{% endfor %}Question: {{ question }}
Answer in one short sentence, only from the text above.{# A release of its own with equal answers. #}'''
"""
"""A variant of the declared prompt that no gate can find worse."""
RunDag = Callable[..., dict[str, Any]]


GIVEN = "MILLRACE_HOME" in os.environ


@pytest.fixture(scope="session")
def settings(open_folder: Path) -> Settings:
    if GIVEN:
        return read_settings().model_copy(update={"environment": "staging"})
    made = stack_settings(
        Path(tempfile.mkdtemp(dir=open_folder)), environment="staging", airflow_users={"ann": "operator"}
    )
    declaration = made.applications / "qa.toml"
    declaration.write_text(declaration.read_text().replace("[prompt.variants]\n", f"[prompt.variants]\n{SAME}"))
    return made


@pytest.fixture(scope="session")
def application(settings: Settings) -> Application:
    return load_application(settings, "qa")


@pytest.fixture(scope="session")
def prod(settings: Settings, application: Application) -> Lake | None:
    """The tables of the prod that was made for the purpose; None: it is the caller's, which staging may not read."""
    if GIVEN:
        return None
    made = fill_prod(settings, application)
    publish(made, application)
    return Lake.of(made, application.name)


@pytest.fixture(scope="session")
def sample(settings: Settings, application: Application, prod: Lake | None) -> Lake:
    """What prod has published."""
    return Lake.of(settings, application.name, environment=SAMPLE)


@pytest.fixture(scope="session")
def stack(settings: Settings, sample: Lake) -> Iterator[Stack]:
    with Stack(settings) as running:
        yield running


@pytest.fixture(scope="session")
def staging(stack: Stack, application: Application) -> Lake:
    return Lake.of(stack.settings, application.name)


@pytest.fixture(scope="session")
def api_key(stack: Stack, application: Application) -> Iterator[SecretStr]:
    store = KeyStore(stack.settings)
    key, written = store.create(
        "staging suite",
        owner="staging suite",
        scopes=("ask", "feedback"),
        applications=(application.name,),
        requests_per_minute=None,
        monthly_budget_usd=None,
        expires_at=None,
        actor="staging suite",
    )
    yield SecretStr(written)
    store.revoke(key.id, actor="staging suite", reason="the suite is over")
    store.close()


@pytest.fixture(scope="session")
def airflow(stack: Stack) -> Iterator[Airflow]:
    with stack.airflow() as airflow:
        yield airflow


@pytest.fixture(scope="session")
def person(stack: Stack) -> Iterator[Airflow]:
    """Somebody who may approve, logged in to Airflow."""
    people = [name for name, role in stack.settings.airflow_users.items() if role != "viewer"]
    if not people:
        pytest.fail("nobody may approve in this staging; name an operator in MILLRACE_AIRFLOW_USERS")
    passwords = json.loads(password_file(stack.settings.home).read_text())
    with Airflow(stack.settings.airflow_url, people[0], passwords[people[0]]) as airflow:
        yield airflow


@pytest.fixture(scope="session")
def run_dag(airflow: Airflow, application: Application) -> RunDag:
    """Runs a stage to its end, or fails with the last lines of its failed tasks; gives its tasks' results. With
    `since`, it waits for the run that an asset starts instead."""

    def run(stage: str, params: dict[str, Any] | None = None, *, since: Any = None, **about: Any) -> dict[str, Any]:
        dag = f"{application.name}.{stage}"
        airflow.wait_for_dag(dag)
        if since is None:
            started = airflow.trigger(dag, params, **about)
        else:
            started = airflow.wait_for_asset_run(dag, since=since, timeout=180)
        ended = airflow.wait_for_run(dag, started.run_id, timeout=900)
        tasks = airflow.tasks(dag, started.run_id)
        if ended.state != "success":
            failed = [task for task in tasks if task.state == "failed"]
            pytest.fail("\n".join(f"{task.task_id}: {airflow.log_tail(dag, started.run_id, task)}" for task in failed))
        return {task.task_id: airflow.result(dag, started.run_id, task.task_id) for task in tasks}

    return run
