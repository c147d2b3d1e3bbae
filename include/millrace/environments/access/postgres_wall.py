"""Who may do what on one PostgreSQL server that the environments share: roles, and the databases that each owns.

An identity is a role of its name that logs in and is nothing more. It owns its databases (`matrix.py`), and nobody else
may connect to them: what PostgreSQL grants to everybody is taken. So what is made in them later is behind the same
wall. Passwords are stored as SCRAM verifiers, which are made here: no password is in a statement that a log may hold.

The server decides who is asked for a password at all (`pg_hba.conf`); the embedded one asks nobody (`trust`), which
only its socket makes safe. Whether a server does is what `postgres_check.py` tries. Its administrator is a superuser.
"""

import base64
import hashlib
import hmac
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from psycopg2 import sql
from psycopg2.extensions import encrypt_password

from millrace.environments.access.matrix import DATABASES, READS, SERVERS, Held, Holding
from millrace.environments.access.postgres_calls import connected, rows
from millrace.errors import AccessError

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

PUBLIC = "PUBLIC"
"""Everybody, as PostgreSQL says it."""
CLOSED = ("postgres", "template1")
"""Databases of every server that no identity enters: whoever does may leave large objects there, which others see, and
which new databases begin with."""
_LOGS_IN = "logs in"
_NOTHING_MORE = "login nosuperuser nocreatedb nocreaterole noreplication nobypassrls"


@dataclass(frozen=True)
class Change:
    """One thing to do before the server is as declared."""

    act: Literal["role", "narrow", "password", "leave", "database", "owner", "take", "clear"]
    identity: str
    """Whose role, membership, ownership or grant; `PUBLIC`: everybody's."""
    database: str = ""
    detail: str = ""
    """A privilege; the role of which `identity` is a member."""
    grantor: str = ""

    def __str__(self) -> str:
        said = {
            "role": f"create role {self.identity}",
            "narrow": f"let {self.identity} log in, and take every attribute of an administrator from it",
            "password": f"set the password of {self.identity}",
            "leave": f"take role {self.detail} from {self.identity}",
            "database": f"create database {self.database} of {self.identity}",
            "owner": f"give database {self.database} to {self.identity}",
            "take": f"take {self.detail} on database {self.database} from {self.identity}",
            "clear": f"take what {self.identity} has inside of database {self.database}",
        }
        return said[self.act]


def declared_databases() -> dict[str, str]:
    """Database → the identity that owns it."""
    own = {f"{environment}_{name}": environment for environment in READS for name in DATABASES}
    return own | {database: server for server, databases in SERVERS.items() for database in databases}


def identities() -> tuple[str, ...]:
    return (*READS, *SERVERS)


def plan(url: str, administrator: str, passwords: Mapping[str, str]) -> list[Change]:
    """What is to be done before the server is as declared; nothing: it is.

    Args:
        url: `postgresql://administrator@host/database`.
        administrator: its password.
        passwords: identity → the password that it should have. Those of others stay as they are.

    Raises:
        AccessError: the server doesn't answer, `administrator` is no superuser, or a password can't be one.
    """
    with closing(connected(url, password=administrator)) as connection:
        return list(_changes(connection, _checked(passwords)))


def apply(url: str, administrator: str, passwords: Mapping[str, str]) -> list[Change]:
    """Do it. Killed anywhere, the next call does the rest.

    Returns:
        What was done.

    Raises:
        AccessError: as `plan`; or a new identity has no password.
    """
    with closing(connected(url, password=administrator)) as connection:
        connection.autocommit = True  # a database can't be created in a transaction
        changes = list(_changes(connection, _checked(passwords)))
        new = {change.identity for change in changes if change.act == "role"}
        if missing := sorted(new - passwords.keys()):
            raise AccessError(
                f"{', '.join(missing)} is new on PostgreSQL and needs a password; add it to `postgres` in "
                "MILLRACE_ACCESS_SECRETS"
            )
        for change in changes:
            if change.act == "clear":
                with closing(connected(url, password=administrator, database=change.database)) as inside:
                    _clear(inside, change)
            else:
                rows(connection, _statement(connection, change, passwords))
        return changes


def held(url: str, administrator: str, environment: str) -> Holding:
    """Who may do what in the environment's databases, and with its identity.

    Raises:
        AccessError: as `plan`.
    """
    its = {f"{environment}_{name}": f"database {name}" for name in DATABASES}
    with closing(connected(url, password=administrator)) as connection:
        _require_superuser(connection)
        owners = _owners(connection, its)
        rights = [Held(owner, its[database], "owns it") for database, owner in owners.items()]
        rights += [Held(who, its[database], what) for database, who, what in _grants(connection, its)]
        for who, database in _inside_of(connection, its):
            if who != owners[database]:
                rights.append(Held(who, its[database], "has something inside"))
        for _, attributes, _ in _attributes(connection, [environment]):
            rights += [Held(environment, "the server", one) for one in attributes]
        for granted, member, _ in _members(connection, [environment]):
            role = "its identity" if granted == environment else f"role {granted}"
            rights.append(Held(member, role, "is a member"))
    return Holding(rights)


def _changes(connection: "Connection", passwords: Mapping[str, str]) -> Iterator[Change]:
    """What differs from the declaration, in an order in which it can be done."""
    _require_superuser(connection)
    yield from _roles(connection, passwords)
    yield from _memberships(connection)
    yield from _databases(connection)
    yield from _inside(connection)


def _require_superuser(connection: "Connection") -> None:
    if not rows(connection, "select rolsuper from pg_roles where rolname = current_user")[0][0]:
        raise AccessError(
            "who may do what on PostgreSQL is seen and changed by a superuser only, and that of MILLRACE_POSTGRES_URL "
            "is none; name one"
        )


def _roles(connection: "Connection", passwords: Mapping[str, str]) -> Iterator[Change]:
    known = {name: (may, verifier) for name, may, verifier in _attributes(connection, identities())}
    for identity in identities():
        if identity not in known:
            yield Change("role", identity)
            continue
        may, verifier = known[identity]
        if may != [_LOGS_IN]:
            yield Change("narrow", identity)
        if identity in passwords and not _verifies(verifier, passwords[identity]):
            yield Change("password", identity)


def _memberships(connection: "Connection") -> Iterator[Change]:
    """An identity is nobody but itself, and nobody else is it."""
    for granted, member, grantor in _members(connection, identities()):
        yield Change("leave", member, detail=granted, grantor=grantor)


def _databases(connection: "Connection") -> Iterator[Change]:
    declared = declared_databases()
    owners = _owners(connection, declared)
    granted = _grants(connection, [*declared, *CLOSED])
    for database, owner in declared.items():
        if database not in owners:
            yield Change("database", owner, database)
            grants = [(database, PUBLIC, "CONNECT"), (database, PUBLIC, "TEMPORARY")]
        else:
            grants = [one for one in granted if one[0] == database]
            if owners[database] != owner:
                yield Change("owner", owner, database)
        for _, grantee, privilege in grants:
            # The new owner's own grant is the owner's right as soon as it is one.
            if grantee != owner:
                yield Change("take", grantee, database, privilege)
    for database, grantee, privilege in granted:
        if database in CLOSED and grantee in (PUBLIC, *identities()):
            yield Change("take", grantee, database, privilege)


def _inside(connection: "Connection") -> Iterator[Change]:
    """What identities own or were granted inside of others' databases."""
    for identity, database in _inside_of(connection, declared_databases()):
        if identity in identities() and declared_databases()[database] != identity:
            yield Change("clear", identity, database)


def _attributes(connection: "Connection", names: Collection[str]) -> list[tuple[str, list[str], str | None]]:
    """Role, what it may do on the whole server, its password's verifier."""
    attributes = {
        "rolcanlogin": _LOGS_IN,
        "rolsuper": "superuser",
        "rolcreatedb": "createdb",
        "rolcreaterole": "createrole",
        "rolreplication": "replication",
        "rolbypassrls": "bypassrls",
    }
    each = ", ".join(f"case when {column} then '{said}' end" for column, said in attributes.items())
    statement = f"select rolname, array_remove(array[{each}], null), rolpassword from pg_authid where rolname = any(%s)"
    return rows(connection, statement, (list(names),))


def _members(connection: "Connection", names: Collection[str]) -> list[tuple[str, str, str]]:
    """Role, its member, who made it one; wherever one of `names` is either."""
    return rows(
        connection,
        "select granted.rolname, member.rolname, grantor.rolname from pg_auth_members"
        " join pg_roles granted on granted.oid = roleid join pg_roles member on member.oid = member"
        " join pg_roles grantor on grantor.oid = grantor"
        " where granted.rolname = any(%(names)s) or member.rolname = any(%(names)s) order by 1, 2, 3",
        {"names": list(names)},
    )


def _owners(connection: "Connection", databases: Collection[str]) -> dict[str, str]:
    found = rows(
        connection,
        "select datname, pg_get_userbyid(datdba) from pg_database where datname = any(%s)",
        (list(databases),),
    )
    return dict(found)


def _grants(connection: "Connection", databases: Collection[str]) -> list[tuple[str, str, str]]:
    """Database, to whom, which privilege; its owner's aside."""
    return rows(
        connection,
        "select datname, case grantee when 0 then %s else pg_get_userbyid(grantee) end, privilege_type"
        " from pg_database, aclexplode(coalesce(datacl, acldefault('d', datdba)))"
        " where datname = any(%s) and grantee <> datdba order by 1, 2, 3",
        (PUBLIC, list(databases)),
    )


def _inside_of(connection: "Connection", databases: Collection[str]) -> list[tuple[str, str]]:
    """Role, and the database in which it owns or was granted something: the server's shared catalogue knows."""
    return rows(
        connection,
        "select distinct rolname, datname from pg_shdepend join pg_roles on pg_roles.oid = refobjid"
        " join pg_database on pg_database.oid = dbid"
        " where refclassid = 'pg_authid'::regclass and datname = any(%s) order by 1, 2",
        (list(databases),),
    )


def _statement(connection: "Connection", change: Change, passwords: Mapping[str, str]) -> sql.Composable:
    grantee = sql.SQL(PUBLIC) if change.identity == PUBLIC else sql.Identifier(change.identity)
    names = {"identity": grantee, "database": sql.Identifier(change.database)}
    if change.act in ("role", "password"):
        password = passwords[change.identity]
        names["verifier"] = sql.Literal(encrypt_password(password, change.identity, connection, "scram-sha-256"))
    written = {
        "role": f"create role {{identity}} {_NOTHING_MORE} password {{verifier}}",
        "narrow": f"alter role {{identity}} {_NOTHING_MORE}",
        "password": "alter role {identity} password {verifier}",
        "leave": "revoke {detail} from {identity} granted by {grantor} cascade",
        "database": "create database {database} owner {identity}",
        "owner": "alter database {database} owner to {identity}",
        "take": f"revoke {change.detail} on database {{database}} from {{identity}} cascade",
    }
    names |= {"detail": sql.Identifier(change.detail), "grantor": sql.Identifier(change.grantor)}
    return sql.SQL(written[change.act]).format(**names)


def _clear(connection: "Connection", change: Change) -> None:
    """What the identity owns here becomes the owner's, with what is in it; its grants here end.

    PostgreSQL hands over databases and tablespaces of the identity, too, wherever they are: those get it back, in the
    same transaction.
    """
    here = "select 'database', datname from pg_database join pg_roles on pg_roles.oid = datdba where rolname = %(name)s"
    of_server = here + (
        " union all select 'tablespace', spcname from pg_tablespace join pg_roles on pg_roles.oid = spcowner"
        " where rolname = %(name)s"
    )
    identity, owner = (sql.Identifier(name) for name in (change.identity, declared_databases()[change.database]))
    kept = rows(connection, of_server, {"name": change.identity})
    rows(connection, sql.SQL("reassign owned by {} to {}").format(identity, owner))
    rows(connection, sql.SQL("drop owned by {}").format(identity))
    for kind, name in kept:
        statement = sql.SQL(f"alter {kind} {{}} owner to {{}}")
        rows(connection, statement.format(sql.Identifier(name), identity))
    connection.commit()


def _checked(passwords: Mapping[str, str]) -> Mapping[str, str]:
    for identity, password in passwords.items():
        # PostgreSQL would prepare other characters (RFC 4013) before it compares.
        if len(password) < 12 or not password.isascii() or not password.isprintable():
            raise AccessError(
                f"the password of {identity} for PostgreSQL must have at least 12 printable ASCII characters; make one "
                "with `openssl rand -hex 24`"
            )
    return passwords


def _verifies(verifier: str | None, password: str) -> bool:
    """Whether `verifier`, as PostgreSQL stores it, is that of `password` (RFC 5802, section 3)."""
    scheme, _, rest = (verifier or "").partition("$")
    if scheme != "SCRAM-SHA-256":
        return False
    salted, _, keys = rest.partition("$")
    iterations, _, salt = salted.partition(":")
    made = hashlib.pbkdf2_hmac("sha256", password.encode(), base64.b64decode(salt), int(iterations))
    stored = hashlib.sha256(hmac.digest(made, b"Client Key", "sha256")).digest()
    return hmac.compare_digest(base64.b64encode(stored).decode(), keys.partition(":")[0])
