"""What a deployment holds, read so that two can be compared: every row of every table, every byte of every file."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg2
from deltalake import DeltaTable

from millrace.lakehouse.commits import dataset_of
from millrace.settings import Settings
from millrace.stack.backup.embedded import running_postgres
from millrace.stack.postgres import Postgres

DATABASES = ("airflow", "gateway", "mlflow")
FOLDERS = ("audit", "events", "indexes", "mlflow")


@contextmanager
def cursor_in(postgres: Postgres, database: str) -> Iterator[Any]:
    """What it did is committed."""
    connection = psycopg2.connect(host=str(postgres.socket_folder), user="postgres", dbname=database)
    try:
        with connection, connection.cursor() as cursor:
            yield cursor
    finally:
        connection.close()


def delta_tables(root: Path) -> dict[str, list[list[str]]]:
    """Path → the rows of each of its versions that can still be read, oldest first."""
    found = {}
    for log in sorted(root.glob("*/*/*/*/_delta_log")):
        uri = str(log.parent)
        versions = range(DeltaTable(uri).version() + 1)
        found[str(log.parent.relative_to(root))] = [_rows(DeltaTable(uri, version=at), uri) for at in versions]
    return found


def _rows(table: DeltaTable, uri: str) -> list[str]:
    return sorted(map(repr, dataset_of(table, uri).to_table().to_pylist()))


def databases(settings: Settings) -> dict[str, list[str]]:
    """`database.schema.table` → its rows; `database.schema.sequence` → where it stands."""
    found = {}
    with running_postgres(settings) as postgres:
        for database in DATABASES:
            with cursor_in(postgres, database) as cursor:
                cursor.execute(
                    "select nspname, relname from pg_class join pg_namespace on pg_namespace.oid = relnamespace "
                    "where relkind in ('r', 'S') and nspname !~ '^pg_' and nspname <> 'information_schema'"
                )
                for schema, name in cursor.fetchall():
                    cursor.execute(f'select * from "{schema}"."{name}"')
                    # How far a sequence has written ahead is PostgreSQL's business.
                    rows = [row[:1] if len(row) == 3 and isinstance(row[2], bool) else row for row in cursor.fetchall()]
                    # Bytes come as memoryviews, which say where they are and not what.
                    found[f"{database}.{schema}.{name}"] = sorted(
                        repr([bytes(one) if isinstance(one, memoryview) else one for one in row]) for row in rows
                    )
    return found


def files(home: Path) -> dict[str, str]:
    """Path → hash of its bytes; without locks."""
    paths = [path for folder in FOLDERS for path in (home / folder).rglob("*") if path.is_file()]
    return {
        str(path.relative_to(home)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in [*paths, home / "format.json"]
        if not path.name.startswith(".") and path.suffix != ".lock"
    }
