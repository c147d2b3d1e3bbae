"""Parts that are servers, as in `docker-compose.yaml`, saved and restored: each database as a role of its own."""

import os
import shutil
import subprocess
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import pytest
from pydantic import SecretStr

from millrace.errors import BackupError
from millrace.serving.key_store import KeyStore
from millrace.settings import Settings
from millrace.stack.backup import restore, save
from millrace.stack.home import prepare_home
from millrace.stack.postgres import Postgres
from tests.deploy.test_databases import PASSWORDS, SCRIPT, connected
from tests.deploy.test_databases import server as server  # the fixture


@pytest.mark.slow
def test_each_role_can_save_and_restore_its_database_and_no_password_is_shown(
    server: Postgres, settings: Settings, tmp_path: Path
) -> None:
    """What the service `backup` does: databases on a server, artifacts elsewhere, the lake in the home."""
    make_databases(server)
    prepare_home(settings)
    artifacts = tmp_path / "objects"
    (artifacts / "1").mkdir(parents=True)
    (artifacts / "1" / "model.gguf").write_text("weights")
    elsewhere = settings.model_copy(
        update={
            "mlflow_uri": "http://mlflow:5000",
            "keys_url": SecretStr(address(server, "gateway")),
            "backup_airflow_url": SecretStr(address(server, "airflow")),
            "backup_mlflow_url": SecretStr(address(server, "mlflow")),
            "backup_artifacts": artifacts.as_uri(),
        }
    )
    KeyStore(elsewhere).create(
        "a key", owner="ann", scopes=["ask"], applications=None, requests_per_minute=None, monthly_budget_usd=None,
        expires_at=None, actor="ann",
    )  # fmt: skip
    for role in ("airflow", "mlflow"):
        with connected(server, role, role) as connection, connection.cursor() as cursor:
            cursor.execute("create table told as select %s as by, n from generate_series(1, 99) n", (role,))
        connection.close()
    [key] = KeyStore(elsewhere).all()

    saved = save(elsewhere, tmp_path / "backups", secrets=True)
    assert set(saved.manifest.parts["databases"]) == set(PASSWORDS)
    assert saved.missing == ()
    shutil.rmtree(settings.home)
    with pytest.raises(BackupError, match=r"the place of MLflow's artifacts is not empty"):
        restore(elsewhere, tmp_path / "backups")
    shutil.rmtree(artifacts)
    with pytest.raises(BackupError, match=r"database airflow at .* is not empty; restore to one that is"):
        restore(elsewhere, tmp_path / "backups")
    assert not settings.home.exists()
    for role in PASSWORDS:
        with closing(connected(server, "postgres", "postgres", "none is asked for")) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(f'drop database "{role}" with (force)')
                cursor.execute(f'create database "{role}" owner "{role}"')

    wrong = elsewhere.model_copy(update={"backup_mlflow_url": SecretStr(address(server, "mlflow", "a guess"))})
    with pytest.raises(BackupError, match=r"database mlflow at .* does not let me in: .*authentication failed") as said:
        restore(wrong, tmp_path / "backups")
    assert "guess" not in str(said.value)
    restore(elsewhere, tmp_path / "backups")

    assert KeyStore(elsewhere).all() == [key]
    for role in ("airflow", "mlflow"):
        with connected(server, role, role) as connection, connection.cursor() as cursor:
            cursor.execute("select count(*), min(by) from told")
            assert cursor.fetchone() == (99, role)
        connection.close()
    assert (artifacts / "1" / "model.gguf").read_text() == "weights"


@pytest.mark.slow
def test_what_a_deployment_keeps_where_nobody_says_is_told_as_missing(settings: Settings, tmp_path: Path) -> None:
    prepare_home(settings)
    saved = save(settings.model_copy(update={"mlflow_uri": "http://mlflow:5000"}), tmp_path / "backups")
    assert [what.split(":")[-1].strip() for what in saved.missing[:4]] == [
        "name it in MILLRACE_BACKUP_AIRFLOW_URL",
        "name it in MILLRACE_KEYS_URL",
        "name it in MILLRACE_BACKUP_MLFLOW_URL",
        "name their place in MILLRACE_BACKUP_ARTIFACTS",
    ]


def address(server: Postgres, role: str, password: str = "") -> str:
    shown, socket = quote(password or PASSWORDS[role], safe=""), quote(str(server.socket_folder), safe="/")
    return f"postgresql://{role}:{shown}@/{role}?host={socket}"


def make_databases(server: Postgres) -> None:
    variables = {
        "PATH": f"{Path(server.command()[0]).parent}:{os.environ['PATH']}",
        "PGHOST": str(server.socket_folder),
        "POSTGRES_USER": "postgres",
        **{f"{role}_DATABASE_PASSWORD".upper(): password for role, password in PASSWORDS.items()},
    }
    subprocess.run(["sh", str(SCRIPT)], env=variables, check=True, stdout=subprocess.DEVNULL)
