"""`millrace access` from a PostgreSQL that is new to an MLflow that keeps its walls in it, as docs/access.md says."""

import json
import os
import shlex
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from typer.testing import CliRunner, Result

from millrace.cli import app
from millrace.environments import audit
from millrace.settings import PROJECT, Settings
from millrace.stack.environment import settings_variables
from tests.conftest import answers, free_port, running
from tests.environments.conftest import ADMINISTRATOR, DATABASE_PASSWORDS, PASSWORDS, superuser_url
from tests.scram import scram_server

pytestmark = pytest.mark.long

SECRETS = {
    "mlflow": {"admin": ADMINISTRATOR.password} | PASSWORDS,
    "postgres": {"admin": ""} | DATABASE_PASSWORDS,
}


def test_an_mlflow_in_its_own_databases_is_walled_and_no_environment_enters_those(
    settings: Settings, open_folder: Path, tmp_path: Path
) -> None:
    uri = f"http://127.0.0.1:{(port := free_port())}"

    def millrace(line: str) -> Result:
        environment = settings_variables(given, keys=True) | {"MILLRACE_ACCESS_SECRETS": json.dumps(SECRETS)}
        return CliRunner().invoke(app, shlex.split(line), env=environment)

    with scram_server(open_folder) as server:
        given = settings.model_copy(
            update={"postgres_url": superuser_url(server), "mlflow_uri": uri, "mlflow_workspaces": True}
        )
        for line in ("access plan --wall postgres", "access apply --wall postgres"):
            done = millrace(line)
            assert done.exit_code == 0, done.output
            assert "create database mlflow_auth of mlflow" in done.stdout
        own = f"postgresql+psycopg2://mlflow:{quote(DATABASE_PASSWORDS['mlflow'])}@/{{}}?host={server.socket_folder}"
        written = (PROJECT / "deploy" / "mlflow" / "basic_auth.ini").read_text()
        login = tmp_path / "basic_auth.ini"
        login.write_text(written.replace("sqlite:///mlflow_auth.db", own.format("mlflow_auth").replace("%", "%%")))
        assert "mlflow_auth?host" in login.read_text()
        arguments = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", "1",
                     "--backend-store-uri", own.format("mlflow"), "--artifacts-destination", tmp_path / "artifacts",
                     "--app-name", "basic-auth", "--enable-workspaces"]  # fmt: skip
        environment = os.environ | {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_AUTH_CONFIG_PATH": str(login),
            "MLFLOW_AUTH_ADMIN_PASSWORD": ADMINISTRATOR.password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "signs the forms of the test's server",
        }
        with running(arguments, environment, tmp_path / "server.log", lambda: answers(f"{uri}/health")):
            done = millrace("access apply")
            assert done.exit_code == 0, done.output
            assert "postgres: nothing to change" in done.stdout
            assert "  create workspace prod" in done.stdout
            assert "  let millrace-manages in prod have MANAGE on every prompt" in done.stdout
            assert millrace("access plan").stdout == "mlflow: nothing to change\npostgres: nothing to change\n"
            done = millrace("access check")
            assert done.exit_code == 0, done.output
            assert "0 not as declared" in done.stdout
            assert " denied by servers" in done.stdout
    told = [entry["resource"] for entry in audit.search(given, action="permission", limit=1000)]
    assert set(told) == {"access/postgres", "access/mlflow"}
