"""What a PostgreSQL server lets each identity do, found out by trying it.

In every database a probe stands for what is there: table `millrace_access.probe`, which its owner makes. All is tried
in transactions that are rolled back, and nothing that could not be, such as dropping a database.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from psycopg2 import sql

from millrace.environments.access.matrix import READS, SHARED, Observed
from millrace.environments.access.postgres_calls import Refused, connected, rows
from millrace.environments.access.postgres_wall import CLOSED, declared_databases, identities
from millrace.errors import AccessError

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

_PROBE = "millrace_access.probe"
_MAKES_PROBE = f"""
create schema if not exists millrace_access;
create table if not exists {_PROBE} (told text);
"""
_IN_DATABASE = {
    "connect": "select 1",
    "read": f"select told from {_PROBE}",
    "write": f"insert into {_PROBE} values ('tried')",
    "create table": "create table millrace_access.another (told text)",
    "drop table": f"drop table {_PROBE}",
    # Without being its owner nobody drops, renames or opens a database.
    "take over": "alter database {database} owner to {identity}",
}
"""Action on a database → the statement that tries it, inside of it."""
_AS_ROLE = {
    "become": "set role {role}",
    "set the password of": "alter role {role} password null",
    "end sessions of": "select pg_terminate_backend({session})",
}
"""Action on another identity → the statement that tries it, in a database of one's own."""
_ON_SERVER = {
    "create a role on": "create role {new}",
    "hand out roles of": "grant {other} to {identity}",
    "read password hashes of": "select rolpassword from pg_authid",
    "read files of": "select pg_read_file('PG_VERSION')",
    "run programs on": "copy (select 1) to program 'true'",
}
"""What nobody but the administrator does → the statement that tries it."""


@dataclass(frozen=True)
class _Server:
    url: str
    passwords: Mapping[str, str]

    def as_(self, identity: str, database: str = "", password: str = "") -> "Connection":
        owned = next(name for name, owner in declared_databases().items() if owner == identity)
        password = password or self.passwords[identity]
        return connected(self.url, role=identity, password=password, database=database or owned)


def declared() -> list[Observed]:
    """What `check` would try."""
    return [
        Observed(identity, environment, resource, action, is_declared, None)
        for identity in identities()
        for environment, resource, action, is_declared in _promises(identity)
    ]


def check(url: str, passwords: Mapping[str, str]) -> list[Observed]:
    """Every identity tries every action on every database, every other identity and the server.

    Args:
        url: `postgresql://…@host/database`; who is named there is not used.
        passwords: every identity's.

    Raises:
        AccessError: the server doesn't answer, an identity can't log in, or an answer is neither a yes nor a no.
    """
    if missing := sorted(set(identities()) - passwords.keys()):
        raise AccessError(
            f"to try what {', '.join(missing)} may do on PostgreSQL needs its password; add it to `postgres` in "
            "MILLRACE_ACCESS_SECRETS"
        )
    server = _Server(url, passwords)
    for database, owner in declared_databases().items():
        with closing(server.as_(owner, database)) as connection:
            rows(connection, _MAKES_PROBE)
            connection.commit()
    return [
        Observed(identity, environment, resource, action, is_declared, _tried(server, identity, resource, action))
        for identity in identities()
        for environment, resource, action, is_declared in _promises(identity)
    ]


def _promises(identity: str) -> Iterator[tuple[str, str, str, bool]]:
    """Environment, resource, action, and whether the identity may."""
    for database, owner in declared_databases().items():
        environment = owner if owner in READS else SHARED
        for action in _IN_DATABASE:
            yield environment, f"database {database}", action, owner == identity
    for database in CLOSED:
        yield SHARED, f"database {database}", "connect", False
    for other in identities():
        if other != identity:
            for action in _AS_ROLE:
                yield other if other in READS else SHARED, f"role {other}", action, False
    for action in _ON_SERVER:
        yield SHARED, "server", action, False
    yield SHARED, "server", "enter by a wrong password", False


def _tried(server: _Server, identity: str, resource: str, action: str) -> bool:
    kind, _, name = resource.partition(" ")
    if kind == "database":
        names = {"database": sql.Identifier(name), "identity": sql.Identifier(identity)}
        return _allowed(lambda: server.as_(identity, name), sql.SQL(_IN_DATABASE[action]).format(**names))
    if kind == "role":
        with closing(server.as_(name)) as theirs:
            names = {"role": sql.Identifier(name), "session": sql.Literal(theirs.info.backend_pid)}
            return _allowed(lambda: server.as_(identity), sql.SQL(_AS_ROLE[action]).format(**names))
    if action not in _ON_SERVER:
        return _allowed(lambda: server.as_(identity, password="not its password"), sql.SQL("select 1"))
    other = next(one for one in identities() if one != identity)
    names = {
        "new": sql.Identifier(f"millrace_access_{uuid.uuid4().hex}"),
        "other": sql.Literal(other) if "usename" in _ON_SERVER[action] else sql.Identifier(other),
        "identity": sql.Identifier(identity),
    }
    return _allowed(lambda: server.as_(identity), sql.SQL(_ON_SERVER[action]).format(**names))


def _allowed(connect: Callable[[], "Connection"], statement: sql.Composable) -> bool:
    """Whether the server lets this be done; it is undone."""
    try:
        with closing(connect()) as connection:
            rows(connection, statement)
            connection.rollback()
    except Refused:
        return False
    return True
