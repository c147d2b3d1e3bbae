"""One MLflow server with a login and a workspace for each environment, walled as declared, for the whole session."""

import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
from pydantic import SecretStr

from millrace.applications import Application
from millrace.environments.access import postgres_wall
from millrace.environments.access.lake_wall import apply as apply_lake_access
from millrace.environments.access.matrix import READS, SERVERS
from millrace.environments.access.mlflow_calls import Login
from millrace.environments.access.mlflow_wall import apply
from millrace.lakehouse.storage import Key
from millrace.settings import PROJECT, Settings
from millrace.stack.postgres import Postgres
from millrace.stack.versitygw import Versitygw
from tests.conftest import answers, free_port, running
from tests.scram import scram_server

ADMINISTRATOR = Login("admin", "the administrator's password")
PASSWORDS = {identity: f"what {identity} logs in with" for identity in READS}
DATABASE_PASSWORDS = {identity: f"the database password of {identity}" for identity in (*READS, *SERVERS)}


LAKE_KEYS = {identity: Key(f"lake-{identity}", f"the secret of {identity}") for identity in READS}
LAKE_PRINCIPALS = {identity: key.access_key for identity, key in LAKE_KEYS.items()}


class As(Protocol):
    def __call__(self, identity: str, environment: str | None = None) -> Settings:
        """The settings of that environment, asked as `identity`; None: of its own. Of MLflow: from now on this process
        asks so."""


@pytest.fixture(scope="session")
def walled_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("walled")
    shutil.copy(PROJECT / "deploy" / "mlflow" / "basic_auth.ini", folder)
    uri = f"http://127.0.0.1:{(port := free_port())}"
    arguments = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", "1",
                 "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
                 "--artifacts-destination", folder / "artifacts",
                 "--app-name", "basic-auth", "--enable-workspaces"]  # fmt: skip
    environment = os.environ | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "basic_auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": ADMINISTRATOR.password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "signs the forms of the test's server",
    }
    with running(arguments, environment, folder / "server.log", lambda: answers(f"{uri}/health")):
        apply(Settings(mlflow_uri=uri, mlflow_workspaces=True), ADMINISTRATOR, PASSWORDS)
        yield uri


@pytest.fixture
def shared(settings: Settings, walled_uri: str) -> Settings:
    """Settings of dev on the server that the environments share."""
    return settings.model_copy(update={"mlflow_uri": walled_uri, "mlflow_workspaces": True})


@pytest.fixture
def ask_as(shared: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[As]:
    from mlflow.utils.workspace_context import WorkspaceContext

    def ask_as(identity: str, environment: str | None = None) -> Settings:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", identity)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORDS.get(identity, ADMINISTRATOR.password))
        return shared.model_copy(update={"environment": environment or identity})

    with WorkspaceContext(None):  # Of other tests' servers, none has workspaces.
        yield ask_as


@pytest.fixture(scope="session")
def walled_lake(object_store: Versitygw) -> Settings:
    """Settings of dev on a lake that the environments share, with a user for each, walled as declared."""
    for key in LAKE_KEYS.values():
        object_store.create_user(key)
    settings = Settings(lake_uri="s3://walled/lake", lake_endpoint=object_store.url)
    apply_lake_access(settings, object_store.root, LAKE_PRINCIPALS)
    return settings


@pytest.fixture
def lake_as(settings: Settings, walled_lake: Settings) -> As:
    def lake_as(identity: str, environment: str | None = None) -> Settings:
        key = LAKE_KEYS[identity]
        changes = {
            "environment": environment or identity,
            "lake_uri": walled_lake.lake_uri,
            "lake_endpoint": walled_lake.lake_endpoint,
            "lake_access_key": SecretStr(key.access_key),
            "lake_secret_key": SecretStr(key.secret_key),
        }
        return settings.model_copy(update=changes)

    return lake_as


@pytest.fixture
def application(qa: Application) -> Application:
    return qa.model_copy(update={"name": f"walled_{uuid.uuid4().hex[:8]}"})


@pytest.fixture(scope="session")
def walled_postgres(open_folder: Path) -> Iterator[str]:
    """Address of one PostgreSQL that asks for passwords, walled as declared. Tests leave it so."""
    with scram_server(open_folder) as server:
        postgres_wall.apply(superuser_url(server), "", DATABASE_PASSWORDS)
        yield superuser_url(server)


def superuser_url(server: Postgres) -> str:
    return server.url("postgres").replace("+psycopg2", "")
