"""Statements to a PostgreSQL server as one role, whose failures are one sentence. It knows no matrix."""

from typing import TYPE_CHECKING, Any

import psycopg2
import psycopg2.extensions
from psycopg2 import errors, sql

from millrace.errors import AccessError

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

SECONDS = 10
"""How long a connection or a statement may take."""
_REFUSALS = ("permission denied for database", "password authentication failed", "no pg_hba.conf entry")
"""What the server says to whom it doesn't let in. psycopg2 has no code of an error before there is a connection."""

Values = dict[str, Any] | tuple[Any, ...] | None


class Refused(AccessError):
    """The server doesn't let this role do this."""


def connected(url: str, *, role: str = "", password: str = "", database: str = "") -> "Connection":
    """A connection to the server at `url`, as `role` into `database`; empty: as `url` says.

    Raises:
        Refused: the server lets nobody in there by this role and password.
        AccessError: it doesn't answer.
    """
    chosen = {name: value for name, value in (("user", role), ("password", password), ("dbname", database)) if value}
    try:
        return psycopg2.connect(
            url,
            connect_timeout=SECONDS,
            options=f"-c statement_timeout={SECONDS * 1000} -c lock_timeout={SECONDS * 1000}",
            application_name="millrace access",
            **chosen,
        )
    except psycopg2.Error as error:
        said = _first_line(error)
        if any(refusal in said for refusal in _REFUSALS):
            raise Refused(
                f"PostgreSQL doesn't let {_who(url, role)} in ({said}); ask with a credential that may"
            ) from None
        raise AccessError(
            f"PostgreSQL of MILLRACE_POSTGRES_URL doesn't answer ({said}); start it, or correct the address"
        ) from None


def rows(connection: "Connection", statement: str | sql.Composable, values: Values = None) -> list[tuple[Any, ...]]:
    """What a statement returns.

    Raises:
        Refused: the role may not.
        AccessError: the server can't.
    """
    try:
        with connection.cursor() as cursor:
            cursor.execute(statement, values)
            return cursor.fetchall() if cursor.description else []
    except errors.InsufficientPrivilege as error:
        info = connection.info
        raise Refused(
            f"PostgreSQL refuses {info.user} in database {info.dbname} ({_first_line(error)}); ask with a credential "
            "that may"
        ) from None
    except psycopg2.Error as error:
        raise AccessError(f"PostgreSQL of MILLRACE_POSTGRES_URL can't do that: {_first_line(error)}") from None


def _who(url: str, role: str) -> str:
    return role or str(psycopg2.extensions.parse_dsn(url).get("user", "you"))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
