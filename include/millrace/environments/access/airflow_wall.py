"""Who may do what in an environment's Airflow: names and roles in the settings, kept by Airflow's own login.

The login is Airflow's SimpleAuthManager: names and roles in `airflow.cfg`, which its API server reads when it starts,
and passwords in a file that only the owner reads, which it reads at every login. A role here is one of Airflow's that
has no more than it needs: an operator is Airflow's `user` (all about DAGs, and no pool, variable or connection).

Where an Airflow elsewhere has a login of its own (FAB, Keycloak), its administrator gives the roles, and only
`airflow_check.py` is of use.
"""

import json
import os
import secrets
from collections.abc import Iterable, Mapping
from configparser import ConfigParser, Error
from dataclasses import dataclass
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from millrace.errors import SettingsError, StackError
from millrace.private_files import write_json, write_private
from millrace.settings import AIRFLOW_ADMIN, AIRFLOW_SERVICE, Settings

AIRFLOW_ROLES = {"viewer": "viewer", "operator": "user", "service": "op", "admin": "admin"}
"""Role here → Airflow's. The service makes the pool of the heavy tasks, so it is more than an operator."""


SHORTEST = 12
"""Characters of a password."""


@dataclass(frozen=True)
class Change:
    """One thing to do before Airflow's login is as declared."""

    act: Literal["add", "role", "remove", "password"]
    name: str
    role: str = ""

    def __str__(self) -> str:
        said = {
            "add": f"let {self.name} log in to Airflow as {self.role}, once its API server is restarted",
            "role": f"make {self.name} {self.role} in Airflow, once its API server is restarted",
            "remove": f"let {self.name} log in to Airflow no more",
            "password": f"give {self.name} another password for Airflow",
        }
        return said[self.act]


def password_file(home: Path) -> Path:
    """Where the passwords of Airflow's users are."""
    return home / "airflow" / "password.json"


def declared_logins(settings: Settings) -> dict[str, str]:
    """Everybody who may log in → role here. The shared `admin` only where nobody but this machine's user is."""
    shared = {} if settings.reached_by_others else {AIRFLOW_ADMIN: "admin"}
    return shared | {AIRFLOW_SERVICE: "service"} | dict(settings.airflow_users)


def plan(settings: Settings, passwords: Mapping[str, str] | None = None) -> list[Change]:
    """What `apply` would do; nothing: the files of Airflow's login are as declared.

    Raises:
        SettingsError: as `apply`.
        StackError: they can't be read.
    """
    return _changes(settings, _known_roles(settings), known_passwords(settings), _given(settings, passwords))


def apply(settings: Settings, passwords: Mapping[str, str] | None = None) -> list[Change]:
    """Write them. A password that is given, here or by `MILLRACE_AIRFLOW_PASSWORDS`, replaces the one that is there;
    who has none gets one. Passwords hold from the next login on, names and roles from the API server's next start.

    Args:
        passwords: name → password; names that may not log in are left out.

    Returns:
        What was done.

    Raises:
        SettingsError: a password is too short, or of nobody who may log in.
        StackError: the files can't be read or written.
    """
    given = _given(settings, passwords)
    known, roles = known_passwords(settings), declared_logins(settings)
    changes = _changes(settings, _known_roles(settings), known, given)
    if not changes:
        return []
    kept = {name: given.get(name) or known.get(name) or secrets.token_urlsafe(18) for name in roles}
    path = password_file(settings.home)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Passwords first: of a name that is in the other file alone, Airflow would make a password and print it.
    write_json(path, kept)
    users = {name: AIRFLOW_ROLES[role] for name, role in roles.items()}
    write_private(_configuration(settings.home), _written(settings.home, users))
    return changes


def held_logins(settings: Settings) -> dict[str, str] | None:
    """Who can log in → role here, as Airflow's own files have it, whatever is declared; None: they are not here, or not
    this process' to read: a task may run elsewhere.

    Raises:
        StackError: they can't be read.
    """
    if not os.access(password_file(settings.home), os.R_OK):
        return None
    roles, passwords = _known_roles(settings), known_passwords(settings)
    ours = {theirs: role for role, theirs in AIRFLOW_ROLES.items()}
    # Of one that is in the first file alone, Airflow makes a password when it starts.
    return {name: ours.get(role, role) for name, role in roles.items() if name in passwords} if roles else None


def tell(settings: Settings, changes: Iterable[Change], *, actor: str) -> None:
    """Write what will be changed into the audit trail, before it is: nothing changes without a trace.

    Raises:
        LakehouseError: it can't be written.
    """
    from millrace.lakehouse.audit.chain import Event, record  # the stack's start needs no lake until then

    at = datetime.now(UTC)
    # A name that was given elsewhere may be an address, and the trail holds none.
    names = {change: change.name.replace("@", " at ") for change in changes}
    events = [
        Event(
            event_id=f"airflow/{name}/{change.act}/{at.isoformat()}",
            occurred_at=at,
            actor=actor,
            action="permission",
            application="_platform",
            resource=f"airflow/{name}",
            outcome=change.act,
            run=actor,
            details={"role": change.role} if change.role else {},
        )
        for change, name in names.items()
    ]
    record(settings, events, run=actor)


def known_passwords(settings: Settings) -> dict[str, str]:
    """Name → password, of whoever can log in now.

    Raises:
        StackError: the file can't be read.
    """
    path = password_file(settings.home)
    try:
        known: dict[str, str] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StackError(f"{path} can't be read ({error}); restore it, or remove it for new passwords") from None
    return known


def _given(settings: Settings, passwords: Mapping[str, str] | None) -> dict[str, str]:
    """Name → the password that it shall have, of those that are said."""
    try:
        said = TypeAdapter(dict[str, str]).validate_json(settings.airflow_passwords.get_secret_value() or "{}")
    except ValidationError:
        raise SettingsError('MILLRACE_AIRFLOW_PASSWORDS is no JSON object such as {"ann": "…"}') from None
    if strangers := sorted(said.keys() - settings.airflow_users.keys()):
        raise SettingsError(f"MILLRACE_AIRFLOW_PASSWORDS: MILLRACE_AIRFLOW_USERS has no {', '.join(strangers)}")
    given = said | dict(passwords or {})
    if short := sorted(name for name, password in given.items() if len(password) < SHORTEST):
        raise SettingsError(f"the password of {', '.join(short)} for Airflow has fewer than {SHORTEST} characters")
    return given


def _configuration(home: Path) -> Path:
    return home / "airflow" / "airflow.cfg"


def _known_roles(settings: Settings) -> dict[str, str]:
    """Name → Airflow's role."""
    path, parser = _configuration(settings.home), ConfigParser(interpolation=None)
    try:
        parser.read(path)
    except (OSError, Error) as error:
        raise StackError(f"{path} can't be read ({error}); remove it, Millrace writes it anew") from None
    users = parser.get("core", "simple_auth_manager_users", fallback="")
    pairs = (user.strip().partition(":") for user in users.split(",") if user.strip())
    return {name: role for name, _, role in pairs}


def _changes(
    settings: Settings, roles: Mapping[str, str], passwords: Mapping[str, str], given: Mapping[str, str]
) -> list[Change]:
    declared = declared_logins(settings)
    found = []
    for name, role in declared.items():
        if name not in roles:
            found.append(Change("add", name, role))
        elif roles[name] != AIRFLOW_ROLES[role]:
            found.append(Change("role", name, role))
        if name in roles and passwords.get(name) != given.get(name, passwords.get(name, "")):
            found.append(Change("password", name))
    return found + [Change("remove", name) for name in sorted({*roles, *passwords} - set(declared))]


def _written(home: Path, roles: Mapping[str, str]) -> str:
    """Airflow's own configuration file with these users. What else is in it stays, such as a vault."""
    parser = ConfigParser(interpolation=None)
    parser.read(_configuration(home))  # which `_known_roles` could
    if not parser.has_section("core"):
        parser.add_section("core")
    parser.set("core", "simple_auth_manager_users", ",".join(f"{name}:{role}" for name, role in roles.items()))
    written = StringIO()
    parser.write(written)
    return written.getvalue()
