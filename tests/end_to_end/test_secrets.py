"""A stack whose every neighbour asks for a secret: MLflow for a login, PostgreSQL for a password, Qdrant, an upstream
server, Spark and the gateway for keys. Each is a canary, each opens what it is for, and none is left lying about."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg2
import pytest

from millrace.environments.access import mlflow_wall
from millrace.environments.access.mlflow_calls import Login
from millrace.private_files import write_json, write_private
from millrace.secret_sources import SecretFile, SecretVariable
from millrace.settings import PROJECT, Settings
from millrace.sources.completion_id import read_keys, verify
from millrace.stack import Stack
from millrace.stack.environment import settings_variables
from millrace.stack.home import prepare_home
from millrace.stack.postgres import Postgres
from tests.canaries import KEPT, Canaries, CommandLines
from tests.conftest import Webhook, answers, free_port, running, stack_settings
from tests.end_to_end.test_second import ends, ready, succeed, until
from tests.retrieval.stand_in import StandIn
from tests.serving.keyed_upstream import KeyedUpstream

pytestmark = [
    pytest.mark.long,
    pytest.mark.stack,
    pytest.mark.mlflow,
    pytest.mark.timeout(1500),
    pytest.mark.filterwarnings("ignore:.*ocal (mode|Qdrant)"),
]

VAULT = "variables.json"
IN_FILES = ("keys_url", "qdrant_api_key", "upstream_api_key", "spark_token")


@dataclass(frozen=True)
class Deployment:
    """A running stack among servers that ask for secrets. All that they write is under `folder`."""

    folder: Path
    settings: Settings
    stack: Stack
    postgres: Postgres
    upstream: KeyedUpstream
    lines: CommandLines

    def millrace(self, *words: str) -> str:
        ran = subprocess.run(
            [str(Path(sys.executable).parent / "millrace"), *words],
            env=os.environ | settings_variables(self.settings, keys=True),
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout


@pytest.fixture
def deployment(
    open_folder: Path, webhook: Webhook, canaries: Canaries, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Deployment]:
    folder = Path(tempfile.mkdtemp(dir=open_folder))
    passwords = {name: canaries.plain(name) for name in ("mlflow", "gateway", "dev", "admin", "staging", "prod")}
    with ExitStack() as there:
        postgres = there.enter_context(postgres_with_passwords(folder / "database", passwords))
        mlflow_uri = there.enter_context(mlflow_with_a_login(folder / "server", postgres, passwords, canaries))
        settings = stack_settings(
            folder, gateway_keys="required", mlflow_uri=mlflow_uri, mlflow_workspaces=True, upstream_model="m",
            upstream_url="http://there.invalid",
        )  # fmt: skip
        planted = {name: canaries.plain(name) for name in IN_FILES}
        planted["keys_url"] = url(postgres, "gateway", passwords["gateway"])
        for name, secret in planted.items():
            write_private(folder / name, secret)
        upstream = there.enter_context(KeyedUpstream(planted["upstream_api_key"]))
        qdrant = StandIn({planted["qdrant_api_key"]: "m"})
        there.callback(qdrant.stop)
        alerts = webhook.url.replace("://", f"://alerts:{canaries.plain('alerts')}@")
        write_private(folder / VAULT, json.dumps({"millrace_alerts": alerts}))
        changes: dict[str, Any] = {name: SecretFile(folder / name, name) for name in planted}
        changes |= {"upstream_url": upstream.url, "qdrant_url": qdrant.url}
        changes["alert_urls"] = SecretVariable("millrace_alerts", "MILLRACE_ALERT_URLS")
        settings = settings.model_copy(update=changes)
        prepare_home(settings)
        write_json(settings.home / "secrets.json", canaries.generated())
        ask_the_vault(settings.home, folder / VAULT)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "dev")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", passwords["dev"])
        lines = there.enter_context(CommandLines())
        stack = there.enter_context(Stack(settings))
        yield Deployment(folder, settings, stack, postgres, upstream, lines)


@contextmanager
def postgres_with_passwords(folder: Path, passwords: dict[str, str]) -> Iterator[Postgres]:
    """A server with a role and a database of its own for MLflow and the gateway, who show passwords."""
    server = Postgres(folder)
    server.prepare()
    (server.data / "pg_hba.conf").write_text("local all postgres trust\nlocal all all scram-sha-256\n")
    user = server.system_user
    process = subprocess.Popen(
        server.command(), user=user, group=user, extra_groups=[] if user else None, stderr=subprocess.DEVNULL
    )
    try:
        until(server.answers, 60)
        connection = psycopg2.connect(url(server, "postgres", ""))
        connection.autocommit = True
        with connection.cursor() as cursor:
            for role in ("mlflow", "gateway"):
                cursor.execute(f"create role {role} login password %s", (passwords[role],))
                cursor.execute(f"create database {role} owner {role}")
        connection.close()
        yield server
    finally:
        process.send_signal(signal.SIGQUIT)
        process.wait(30)


def url(server: Postgres, role: str, password: str) -> str:
    database = role if role in ("mlflow", "gateway") else "postgres"
    address = server.url(database).replace("+psycopg2", "")
    return address.replace("://postgres@", f"://{role}:{password}@" if password else f"://{role}@")


@contextmanager
def mlflow_with_a_login(
    folder: Path, postgres: Postgres, passwords: dict[str, str], canaries: Canaries
) -> Iterator[str]:
    folder.mkdir()
    shutil.copy(PROJECT / "deploy" / "mlflow" / "basic_auth.ini", folder)
    uri = f"http://127.0.0.1:{(port := free_port())}"
    arguments = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", "1",
                 "--artifacts-destination", folder / "artifacts", "--app-name", "basic-auth",
                 "--enable-workspaces"]  # fmt: skip
    environment = os.environ | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "basic_auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": passwords["admin"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": canaries.plain("forms"),
        "MLFLOW_BACKEND_STORE_URI": url(postgres, "mlflow", passwords["mlflow"]).replace("://", "+psycopg2://", 1),
    }
    with running(arguments, environment, folder / "server.log", lambda: answers(f"{uri}/health")):
        known = {identity: passwords[identity] for identity in mlflow_wall.READS}
        administrator = Login("admin", passwords["admin"])
        mlflow_wall.apply(Settings(mlflow_uri=uri, mlflow_workspaces=True), administrator, known)
        yield uri


def ask_the_vault(home: Path, vault: Path) -> None:
    """The backend that Airflow's configuration names. A vault's provider is named in the same two lines."""
    (home / "airflow").mkdir(mode=0o700)
    (home / "airflow" / "airflow.cfg").write_text(
        "[secrets]\nbackend = airflow.secrets.local_filesystem.LocalFilesystemBackend\n"
        f"backend_kwargs = {json.dumps({'variables_file_path': str(vault)})}\n"
    )


def test_every_secret_opens_what_it_is_for_is_rotated_and_is_left_nowhere(
    deployment: Deployment, canaries: Canaries, webhook: Webhook
) -> None:
    settings, gateway = deployment.settings, deployment.settings.gateway_url
    with deployment.stack.airflow() as airflow:
        for dag in ("ingest_documents", "refresh_embeddings", "declare_release", "evaluate_candidate", "rollout"):
            airflow.wait_for_dag(f"handbook.{dag}")
        for dag in ("refresh_embeddings", "evaluate_candidate"):
            airflow.unpause(f"handbook.{dag}")
        succeed(airflow, "handbook.ingest_documents")
        since = airflow.runs("handbook.ingest_documents")[0].run_after
        run = airflow.wait_for_asset_run("handbook.refresh_embeddings", since=since, timeout=120)
        ends(airflow, run.dag_id, run.run_id, "success")
        succeed(airflow, "handbook.declare_release")
        succeed(airflow, "handbook.rollout")
    until(lambda: "handbook" in ready(gateway), 180)
    # Only Airflow's secrets backend knows where alerts go.
    until(lambda: [one for one in webhook.received if one["title"] == "handbook.ingest_documents is late"], 120)

    key = deployment.millrace("key", "create", "a test").strip()
    canaries.also(key.rpartition("_")[2])
    asked = ask(gateway, key)
    assert asked.status_code == 200, asked.text
    before = asked.json()["id"]
    said = deployment.millrace("secret", "rotate-completion-key")
    assert "A new completion key signs" in said
    after = ask(gateway, key).json()["id"]
    kept = json.loads((settings.home / "secrets.json").read_text())["completion_key"]
    new, old = read_keys(kept)
    canaries.also(new.key.decode())
    assert (verify(new.key, after).application, verify(old.key, before).application) == ("handbook", "handbook")
    assert [rate(gateway, key, one) for one in (before, after)] == [200, 200]

    # A server that refuses says the key back.
    deployment.upstream.keys.clear()
    refused = ask(gateway, key)
    assert refused.status_code == 503
    assert "refuses the key: Incorrect API key provided: …" in refused.json()["error"]["message"]
    with deployment.stack.airflow() as airflow:
        failing = airflow.trigger("handbook.declare_release").run_id
        log = first_failure(airflow, "handbook.declare_release", failing)
    assert "refuses the key: Incorrect API key provided" in log
    assert ask(gateway, f"{key[:-1]}x").status_code == 401

    assert canaries.in_files(deployment.folder, kept_here(settings, deployment.folder)) == []
    embedded = Postgres(settings.home / "postgres").url("{database}").replace("+psycopg2", "")
    assert canaries.in_databases(embedded, ["airflow"]) == []
    theirs = url(deployment.postgres, "postgres", "").replace("/postgres?", "/{database}?")
    assert canaries.in_databases(theirs, ["mlflow", "gateway"]) == []
    assert [line for line in deployment.lines.seen if canaries.are_in(line)] == []
    assert any("millrace.serving" in line for line in deployment.lines.seen)


def ask(gateway: str, key: str) -> httpx.Response:
    body = {"model": "handbook", "user": "ann", "messages": [{"role": "user", "content": f"Who? {time.time()}"}]}
    return httpx.post(f"{gateway}/v1/chat/completions", json=body, headers=bearer(key), timeout=60, trust_env=False)


def rate(gateway: str, key: str, completion_id: str) -> int:
    body = {"completion_id": completion_id, "rating": 1.0}
    return httpx.post(f"{gateway}/v1/feedback", json=body, headers=bearer(key), trust_env=False).status_code


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def first_failure(airflow: Any, dag_id: str, run_id: str) -> str:
    """The log of the first task that failed once, whether or not it is tried again."""

    def failed() -> list[Any]:
        return [one for one in airflow.tasks(dag_id, run_id) if one.state in ("up_for_retry", "failed")]

    until(failed, 240)
    return re.sub(r"\s+", " ", airflow.log_tail(dag_id, run_id, failed()[0], lines=200))


def kept_here(settings: Settings, folder: Path) -> set[str]:
    """Where this deployment's people have put secrets, and where its home keeps its own."""
    home = settings.home.relative_to(folder)
    return {str(home / name) for name in KEPT} | {*IN_FILES, VAULT}
