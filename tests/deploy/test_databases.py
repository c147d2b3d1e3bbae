"""The script that the container of Postgres runs once, against a real PostgreSQL with the same variables."""

import os
import subprocess
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import psycopg2
import pytest

from millrace.settings import PROJECT
from millrace.stack.postgres import Postgres
from tests.scram import scram_server

SCRIPT = PROJECT / "deploy" / "compose" / "postgres" / "databases.sh"
PASSWORDS = {"airflow": 'it\'s "a" $(password)', "mlflow": "another", "gateway": "a third"}


@pytest.fixture
def server(open_folder: Path) -> Iterator[Postgres]:
    """Every role but the first shows its password, as over the network of the containers."""
    with scram_server(open_folder) as server:
        yield server


@pytest.mark.slow
def test_each_who_needs_a_database_has_its_own_and_no_way_into_the_others(server: Postgres) -> None:
    programs = Path(server.command()[0]).parent
    variables = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PGHOST": str(server.socket_folder),
        "POSTGRES_USER": "postgres",
        "AIRFLOW_DATABASE_PASSWORD": PASSWORDS["airflow"],
        "MLFLOW_DATABASE_PASSWORD": PASSWORDS["mlflow"],
        "GATEWAY_DATABASE_PASSWORD": PASSWORDS["gateway"],
    }
    subprocess.run(["sh", str(SCRIPT)], env=variables, check=True, stdout=subprocess.DEVNULL)
    for role, other in permutations(PASSWORDS, 2):
        with connected(server, role, role) as connection, connection.cursor() as cursor:
            cursor.execute("create table if not exists its_own (id int)")
        connection.close()
        with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
            connected(server, role, role, password="a guess")
        with pytest.raises(psycopg2.OperationalError, match="permission denied for database"):
            connected(server, role, other)


def connected(server: Postgres, role: str, database: str, password: str = "") -> "psycopg2.extensions.connection":
    return psycopg2.connect(
        host=str(server.socket_folder), user=role, dbname=database, password=password or PASSWORDS[role]
    )
