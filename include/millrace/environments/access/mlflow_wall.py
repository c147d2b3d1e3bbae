"""Who may do what on one MLflow server that several environments share: declared here, kept by the server's login.

An environment is an MLflow workspace of its name, and a service identity, a user of its name. The identity makes and
manages what is in its own workspace and reads that of some others (`matrix.py`). Grants are by workspace and kind of
resource, so they hold for a model or an experiment that is made later; nothing else is allowed (`NO_PERMISSIONS`).
Where workspaces are off, MLflow lets whoever logs in create a model of any name, another environment's next one too.

The server is `mlflow server --app-name basic-auth --enable-workspaces` with `deploy/mlflow/basic_auth.ini`. Only its
administrator can change what is here.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from millrace.environments.access.matrix import READS as READS
from millrace.environments.access.matrix import Held, Holding
from millrace.environments.access.mlflow_calls import Caller, Login
from millrace.errors import ReleaseError
from millrace.settings import Settings

KINDS = ("experiment", "registered_model", "prompt")
"""Kinds of resources that environments have; runs, traces, versions and artifacts go with them."""
MANAGES, ONLY_READS = "millrace-manages", "millrace-reads"
ROLES: dict[str, dict[str, str]] = {
    # Of a workspace, USE is the right to create in it; MANAGE would be the right to hand rights out.
    MANAGES: {"workspace": "USE"} | dict.fromkeys(KINDS, "MANAGE"),
    ONLY_READS: dict.fromkeys(KINDS, "READ"),
}
"""Role of each workspace → kind of resource → MLflow's permission on all of them."""
OF_ONE = "__user_"
"""How the role of a single user begins, which nobody can assign: by it MLflow gives a user what it made, and what it
was given alone."""


@dataclass(frozen=True)
class Change:
    """One thing to do before the server is as declared."""

    act: Literal["workspace", "role", "grant", "take", "user", "demote", "assign", "unassign", "password"]
    environment: str = ""
    role: str = ""
    kind: str = ""
    permission: str = ""
    identity: str = ""
    known: int = 0
    """The server's number of what is taken or of the role that is unassigned."""

    def __str__(self) -> str:
        said = {
            "workspace": f"create workspace {self.environment}",
            "role": f"create role {self.role} in {self.environment}",
            "grant": f"let {self.role} in {self.environment} have {self.permission} on every {self.kind}",
            "take": f"take {self.permission} on {self.kind} in {self.environment} from {self.identity or self.role}",
            "user": f"create user {self.identity}",
            "demote": f"make {self.identity} no administrator",
            "assign": f"give {self.identity} role {self.role} in {self.environment}",
            "unassign": f"take role {self.role} in {self.environment} from {self.identity}",
            "password": f"set the password of {self.identity}",
        }
        return said[self.act]


def declared_roles(identity: str) -> dict[str, str]:
    """Environment → the role that `identity` has there."""
    return {identity: MANAGES} | dict.fromkeys(READS[identity], ONLY_READS)


def plan(settings: Settings, administrator: Login, passwords: Mapping[str, str] | None = None) -> list[Change]:
    """What is to be done before the server is as declared; nothing: it is.

    Args:
        passwords: identity → the password that it should have. Those of others stay as they are.

    Raises:
        ReleaseError: the server doesn't answer, has no workspaces, or `administrator` isn't one.
    """
    with Caller(settings, administrator) as ask:
        return _planned(settings, ask, passwords or {})


def apply(settings: Settings, administrator: Login, passwords: Mapping[str, str]) -> list[Change]:
    """Do it. Killed anywhere, the next call does the rest.

    Args:
        passwords: identity → its password, at least 12 characters. One that doesn't exist yet needs one.

    Returns:
        What was done.

    Raises:
        ReleaseError: as `plan`; or a new identity has no password.
    """
    with Caller(settings, administrator) as ask:
        changes = _planned(settings, ask, passwords)
        new = {change.identity for change in changes if change.act == "user"}
        if missing := sorted(new - passwords.keys()):
            raise ReleaseError(
                f"{', '.join(missing)} is new on {settings.mlflow_url} and needs a password; give it one"
            )
        for change in changes:
            _do(ask, change, passwords)
        return changes


def held(settings: Settings, login: Login, environment: str) -> Holding:
    """Who may do what in the environment's workspace: by roles, whatever they are called.

    Args:
        login: the administrator's, or of anybody, who learns of nobody else.

    Raises:
        ReleaseError: the server doesn't answer, or does not know `login`.
    """
    with Caller(settings, login) as ask:
        mine = ask("GET", "3.0/mlflow/users/current/permissions")
        if not mine["is_admin"]:
            here = [one for one in mine["permissions"] if one["workspace"] == environment]
            only = f"MLflow tells {login.name} what {login.name} may do; what others may, its administrator"
            return Holding(_held(login.name, here), only)
        users = ask("GET", "2.0/mlflow/users/list")["users"]
    rights = [Held(user["username"], "", "administers the server") for user in users if user["is_admin"]]
    for user in users:
        for role in user["roles"]:
            # What an identity made in its own workspace is its own anyway, thing by thing.
            own = role["name"].startswith(OF_ONE) and user["username"] == environment
            if role["workspace"] == environment and not user["is_admin"] and not own:
                rights += _held(user["username"], role["permissions"])
    return Holding(rights)


def _held(name: str, permissions: Iterable[Mapping[str, Any]]) -> list[Held]:
    return [Held(name, f"{one['resource_type']} {one['resource_pattern']}", one["permission"]) for one in permissions]


def _planned(settings: Settings, ask: Caller, passwords: Mapping[str, str]) -> list[Change]:
    changes = list(_changes(*_state(ask)))
    new = {change.identity for change in changes if change.act == "user"}
    for identity in sorted(READS.keys() & passwords.keys() - new):
        with Caller(settings, Login(identity, passwords[identity])) as own:
            if own.ask("GET", "3.0/mlflow/workspaces").status_code == 401:
                changes.append(Change("password", identity=identity))
    return changes


def _state(ask: Caller) -> tuple[set[str], list[dict[str, Any]], list[dict[str, Any]]]:
    """The server's workspaces, roles and users, as MLflow says them."""
    workspaces = {one["name"] for one in ask("GET", "3.0/mlflow/workspaces").get("workspaces", [])}
    return workspaces, ask("GET", "3.0/mlflow/roles/list")["roles"], ask("GET", "2.0/mlflow/users/list")["users"]


def _changes(workspaces: set[str], roles: list[dict[str, Any]], users: list[dict[str, Any]]) -> Iterator[Change]:
    """What differs from the declaration, in an order in which it can be done."""
    known = {(role["workspace"], role["name"]): role for role in roles}
    for environment in READS:
        if environment not in workspaces:
            yield Change("workspace", environment)
        for name, grants in ROLES.items():
            role = known.get((environment, name))
            if role is None:
                yield Change("role", environment, name)
            yield from _grants(environment, name, role, grants)
    found = {user["username"]: user for user in users}
    for identity in READS:
        user = found.get(identity)
        if user is None:
            yield Change("user", identity=identity)
        elif user["is_admin"]:
            yield Change("demote", identity=identity)
        yield from _assignments(identity, declared_roles(identity), user["roles"] if user else [])
    for name in sorted(found.keys() - READS.keys()):
        if not found[name]["is_admin"]:  # whom the server refuses nothing, whatever roles are taken away
            yield from _assignments(name, {}, found[name]["roles"])


def _grants(environment: str, name: str, role: dict[str, Any] | None, grants: Mapping[str, str]) -> Iterator[Change]:
    wanted = {(kind, "*", permission) for kind, permission in grants.items()}
    for one in role["permissions"] if role else []:
        grant = (one["resource_type"], one["resource_pattern"], one["permission"])
        if grant in wanted:
            wanted.remove(grant)
        else:
            kind = f"{one['resource_type']} {one['resource_pattern']}"
            yield Change("take", environment, name, kind, one["permission"], known=one["id"])
    for kind, _, permission in sorted(wanted):
        yield Change("grant", environment, name, kind, permission)


def _assignments(identity: str, wanted: Mapping[str, str], roles: list[dict[str, Any]]) -> Iterator[Change]:
    given = {(role["workspace"], role["name"]) for role in roles}
    for environment, name in wanted.items():
        if (environment, name) not in given:
            yield Change("assign", environment, name, identity=identity)
    for role in roles:
        environment, name = role["workspace"], role["name"]
        if name.startswith(OF_ONE):
            for one in role["permissions"] if environment in READS and environment != identity else []:
                kind = f"{one['resource_type']} {one['resource_pattern']}"
                yield Change("take", environment, name, kind, one["permission"], identity, known=one["id"])
        elif environment in READS and wanted.get(environment) != name:
            yield Change("unassign", environment, name, identity=identity, known=role["id"])


def _do(ask: Caller, change: Change, passwords: Mapping[str, str]) -> None:
    match change.act:
        case "workspace":
            ask("POST", "3.0/mlflow/workspaces", json={"name": change.environment})
        case "role":
            ask("POST", "3.0/mlflow/roles/create", json={"name": change.role, "workspace": change.environment})
        case "grant":
            body = {"role_id": _role_id(ask, change), "resource_type": change.kind, "resource_pattern": "*"}
            ask("POST", "3.0/mlflow/roles/permissions/add", json=body | {"permission": change.permission})
        case "take":
            ask("DELETE", "3.0/mlflow/roles/permissions/remove", json={"role_permission_id": change.known})
        case "user":
            body = {"username": change.identity, "password": passwords[change.identity]}
            ask("POST", "2.0/mlflow/users/create", json=body)
        case "password":
            body = {"username": change.identity, "password": passwords[change.identity]}
            ask("PATCH", "2.0/mlflow/users/update-password", json=body)
        case "demote":
            ask("PATCH", "2.0/mlflow/users/update-admin", json={"username": change.identity, "is_admin": False})
        case "assign":
            ask("POST", "3.0/mlflow/roles/assign", json={"username": change.identity, "role_id": _role_id(ask, change)})
        case "unassign":
            ask("DELETE", "3.0/mlflow/roles/unassign", json={"username": change.identity, "role_id": change.known})


def _role_id(ask: Caller, change: Change) -> int:
    roles = ask("GET", "3.0/mlflow/roles/list", params={"workspace": change.environment})["roles"]
    return next(int(role["id"]) for role in roles if role["name"] == change.role)
