"""PostgreSQL's databases by its own programs: dumped in a transaction of one moment, restored in one that counts whole
or not at all.

Neither owners nor grants are in a dump: a database is restored by whoever will own it, and grants are made again by
who declares them.
"""

import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import IO

import psycopg2
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from millrace.errors import BackupError
from millrace.stack.backup.store import CHUNK
from millrace.stack.postgres import program

_RELATIONS = """
select count(*) from pg_class join pg_namespace on pg_namespace.oid = relnamespace
where relkind in ('r', 'p', 'v', 'm', 'S', 'f') and nspname !~ '^pg_' and nspname <> 'information_schema'
"""


class Database:
    """One database of a server.

    Args:
        name: what it is for: `airflow`, `mlflow` or `gateway`.
        address: `postgresql://user:password@host/database`; a password in it goes to programs by their environment.
    """

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        try:
            self._url = make_url(address)
        except ArgumentError:
            raise _no_address(name) from None

    @property
    def where(self) -> str:
        """For a person: without the password."""
        return f"database {self._url.database} at {self._url.host or self._url.query.get('host')}"

    def dump(self) -> Iterator[bytes]:
        """In pg_dump's own format.

        Raises:
            BackupError: the server or pg_dump refused.
        """
        arguments = ["pg_dump", "--format=custom", "--no-owner", "--no-privileges"]
        with tempfile.TemporaryFile() as said:
            with subprocess.Popen(
                [str(program(arguments[0])), *arguments[1:]], env=self._variables(), stdout=subprocess.PIPE, stderr=said
            ) as running:
                assert running.stdout is not None
                while chunk := running.stdout.read(CHUNK):
                    yield chunk
            if running.returncode:
                raise BackupError(f"{self.where} can't be dumped: {_last_line(said)}")

    def restore(self, dump: Iterable[bytes]) -> None:
        """Fill the empty database: all of the dump, or nothing.

        Raises:
            BackupError: the server or pg_restore refused.
        """
        arguments = ["--single-transaction", "--exit-on-error", "--no-owner", "--no-privileges"]
        with tempfile.TemporaryFile() as said:
            with subprocess.Popen(
                [str(program("pg_restore")), *arguments, f"--dbname={self._url.database}"],
                env=self._variables(),
                stdin=subprocess.PIPE,
                stderr=said,
            ) as running:
                assert running.stdin is not None
                try:
                    for chunk in dump:
                        running.stdin.write(chunk)
                    running.stdin.close()
                except BrokenPipeError:  # it ended, and says why
                    with suppress(BrokenPipeError):
                        running.stdin.close()
                except BaseException:
                    running.kill()
                    raise
            if running.returncode:
                raise BackupError(f"{self.where} can't be restored: {_last_line(said)}")

    def is_empty(self) -> bool:
        """Whether nobody has made anything in it.

        Raises:
            BackupError: the server doesn't answer or refuses.
        """
        try:
            connection = psycopg2.connect(self._libpq_address())
        except psycopg2.OperationalError as error:
            raise BackupError(f"{self.where} does not let me in: {' '.join(str(error).split())}") from None
        except psycopg2.ProgrammingError:  # libpq understands less than SQLAlchemy
            raise _no_address(self.name) from None
        try:
            with connection.cursor() as cursor:
                cursor.execute(_RELATIONS)
                count: int = cursor.fetchone()[0]
        finally:
            connection.close()
        return count == 0

    def _libpq_address(self) -> str:
        return self._url.set(drivername="postgresql").render_as_string(hide_password=False)

    def _variables(self) -> Mapping[str, str]:
        """For PostgreSQL's programs. On a command line everybody on the machine could read a password."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        url = self._url
        query = {name: value for name, value in url.query.items() if isinstance(value, str)}
        told = {
            "PGHOST": url.host or query.get("host"),
            "PGPORT": str(url.port) if url.port else None,
            "PGUSER": url.username,
            "PGPASSWORD": url.password,
            "PGDATABASE": url.database,
            "PGSSLMODE": query.get("sslmode"),
            "PGSSLROOTCERT": query.get("sslrootcert"),
        }
        return inherited | {name: str(value) for name, value in told.items() if value}


def _no_address(name: str) -> BackupError:
    """Without the text of the error that says so: it has the address, and with it the password."""
    return BackupError(f"the address of {name}'s database is none; write postgresql://user:password@host/database")


def _last_line(said: IO[bytes]) -> str:
    """What a program said last; its first lines repeat what was asked."""
    said.seek(0)
    lines = said.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
