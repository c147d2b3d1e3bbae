"""The walls between environments: every server that keeps the matrix, seen the same way.

To add one, write how it is planned, applied and checked in a module of its own, and add what makes its `Wall` to
`WALLS`. A wall whose server isn't configured is still listed: it says why nothing but code stands there.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from pydantic import SecretStr, TypeAdapter, ValidationError

from millrace.environments.access import (
    airflow_check,
    airflow_wall,
    gateway_check,
    lake_check,
    lake_rights,
    lake_wall,
    mlflow_calls,
    mlflow_check,
    mlflow_wall,
    postgres_check,
    postgres_wall,
    qdrant_check,
    qdrant_wall,
)
from millrace.environments.access.matrix import READS, Holding, Observed
from millrace.environments.access.mlflow_calls import Login
from millrace.errors import AccessError, LakehouseError, MillraceError, SettingsError
from millrace.lakehouse.audit.chain import Event, record
from millrace.lakehouse.storage import Key
from millrace.lakehouse.tables import PLATFORM
from millrace.retrieval.server import Server, connect
from millrace.settings import Settings

ADMIN = "admin"
"""Whoever administers a wall's server, among the names of its secrets; MLflow's user has this name."""


@dataclass(frozen=True)
class Deployment:
    """What walls are made of."""

    settings: Settings
    secrets: Mapping[str, Mapping[str, str]]
    """Wall → identity, or `ADMIN` → its password or key."""
    probe_keys: Callable[[], AbstractContextManager[Mapping[str, str]]]
    """Makes API keys of the gateway that end with the context: as `gateway_check.check` takes them."""

    def secret(self, wall: str, identity: str) -> str:
        """Raises:
        AccessError: there is none.
        """
        found = self.secrets.get(wall, {}).get(identity)
        if found is None:
            raise AccessError(
                f"MILLRACE_ACCESS_SECRETS has no {identity!r} for {wall}; it is JSON, wall by wall: docs/access.md"
            )
        return found

    def administrator(self, wall: str) -> str:
        """What its administrator shows.

        Raises:
            AccessError: there is none.
        """
        if ADMIN not in self.secrets.get(wall, {}):
            raise AccessError(
                f"who may do what there is an administrator's to read, and MILLRACE_ACCESS_SECRETS has no {ADMIN!r} "
                f"for {wall}; see docs/access.md"
            )
        return self.secret(wall, ADMIN)

    def passwords(self, wall: str) -> dict[str, str]:
        """Identity → its password, of those that are given."""
        return {identity: told for identity, told in self.secrets.get(wall, {}).items() if identity != ADMIN}

    def key(self, identity: str) -> tuple[Key, str]:
        """A key of the lake's store, and what the store calls its owner: the access key, unless it is said (AWS: an
        ARN).

        Raises:
            AccessError: there is none, or it isn't of that shape.
        """
        access_key, _, rest = self.secret("lake", identity).partition(":")
        secret_key, _, principal = rest.partition(":")
        if not access_key or not secret_key:
            raise AccessError(
                f"MILLRACE_ACCESS_SECRETS has for {identity} in lake no access-key:secret-key, or "
                "access-key:secret-key:arn; see docs/access.md"
            )
        return Key(access_key, secret_key), principal or access_key


@dataclass(frozen=True)
class Wall:
    name: str
    absent: str
    """Why there is no server to keep it; empty: there is one, also where it doesn't answer now."""
    declared: Callable[[], Sequence[Observed]]
    """What `check` would try."""
    plan: Callable[[], Sequence[object]]
    """What would change; `str` of each says it."""
    apply: Callable[[], Sequence[object]]
    """Change it; what was done."""
    check: Callable[[], Sequence[Observed]]
    held: Callable[[str], Holding] | None = None
    """Who may do what in an environment now, as the server holds it; None: each environment has a server of its own."""


def _mlflow(of: Deployment) -> Wall:
    settings, passwords = of.settings, of.passwords("mlflow")

    def administrator() -> Login:
        return Login(ADMIN, of.secret("mlflow", ADMIN))

    def held(environment: str) -> Holding:
        login = administrator() if ADMIN in of.secrets.get("mlflow", {}) else mlflow_calls.own_login(settings)
        return mlflow_wall.held(settings, login, environment)

    return Wall(
        "mlflow",
        ""
        if settings.mlflow_workspaces
        else "MILLRACE_MLFLOW_WORKSPACES is off: the server is one environment's, and whoever reaches it may do all",
        mlflow_check.declared,
        lambda: mlflow_wall.plan(settings, administrator(), passwords),
        lambda: mlflow_wall.apply(settings, administrator(), passwords),
        lambda: mlflow_check.check(settings, passwords),
        held,
    )


def _postgres(of: Deployment) -> Wall:
    url, passwords = of.settings.postgres_url, of.passwords("postgres")
    return Wall(
        "postgres",
        ""
        if url
        else "MILLRACE_POSTGRES_URL is empty: the embedded server is one environment's, and asks nobody who can open "
        "its socket, which is the user that runs it, for a password",
        postgres_check.declared,
        lambda: postgres_wall.plan(url, of.secret("postgres", ADMIN), passwords),
        lambda: postgres_wall.apply(url, of.secret("postgres", ADMIN), passwords),
        lambda: postgres_check.check(url, passwords),
        lambda environment: postgres_wall.held(url, of.administrator("postgres"), environment),
    )


def _qdrant(of: Deployment) -> Wall:
    settings = of.settings

    def as_(key: str) -> Server:
        return connect(settings.qdrant_url, SecretStr(key))

    def api_key() -> str:
        return of.secret("qdrant", ADMIN)

    return Wall(
        "qdrant",
        ""
        if settings.qdrant_url
        else "MILLRACE_QDRANT_URL is empty: index builds are folders, and whoever reads the home reads them",
        qdrant_check.declared,
        lambda: qdrant_wall.plan(settings, as_(api_key())),
        lambda: qdrant_wall.apply(settings, as_(api_key())),
        lambda: qdrant_check.check(as_(api_key()), api_key(), as_),
        partial(qdrant_wall.held, settings),
    )


def _no_store(settings: Settings) -> str:
    """Why no server of an administrator's keeps the lake; empty: one does."""
    if settings.object_store_port:
        return (
            "MILLRACE_OBJECT_STORE_PORT: the stack keeps the store in its home and walls it at each start; whoever "
            "reads that home reads every environment's key"
        )
    if not settings.lake_uri:
        return "MILLRACE_LAKE_URI is empty: the lake is a folder, and whoever may open it reads and writes it"
    return ""


def _lake(of: Deployment) -> Wall:
    settings = of.settings

    def principals() -> dict[str, str]:
        return {identity: of.key(identity)[1] for identity in READS}

    def held(environment: str) -> Holding:
        of.administrator("lake")
        return lake_rights.held(settings, of.key(ADMIN)[0], principals(), environment)

    return Wall(
        "lake",
        _no_store(settings),
        lake_check.declared,
        lambda: lake_wall.plan(settings, of.key(ADMIN)[0], principals()),
        lambda: lake_wall.apply(settings, of.key(ADMIN)[0], principals()),
        lambda: lake_check.check(settings, {identity: of.key(identity)[0] for identity in READS}),
        held,
    )


def _gateway(of: Deployment) -> Wall:
    settings = of.settings

    def check() -> list[Observed]:
        with of.probe_keys() as keys:
            return gateway_check.check(settings, keys)

    return Wall(
        "gateway",
        ""
        if settings.keys_required
        else "MILLRACE_GATEWAY_KEYS asks for none: in dev on this machine the gateway answers whoever asks",
        partial(gateway_check.declared, settings.environment),
        tuple,  # keys are made one by one, by `millrace key create`
        tuple,
        check,
    )


def _airflow(of: Deployment) -> Wall:
    settings, passwords = of.settings, of.passwords("airflow")

    return Wall(
        "airflow",
        ""
        if airflow_wall.password_file(settings.home).exists()
        else f"no Airflow was started in {settings.home}: one elsewhere has a login of its own",
        partial(airflow_check.declared, settings),
        lambda: airflow_wall.plan(settings, passwords),
        lambda: airflow_wall.apply(settings, passwords),
        partial(airflow_check.check, settings),
    )


WALLS: tuple[Callable[[Deployment], Wall], ...] = (_lake, _mlflow, _postgres, _qdrant, _gateway, _airflow)


def read_secrets(settings: Settings) -> dict[str, dict[str, str]]:
    """`Deployment.secrets`, as the settings give them.

    Raises:
        SettingsError: they are no JSON of that shape; nothing of them is in the message.
    """
    given = settings.access_secrets.get_secret_value()
    try:
        return TypeAdapter(dict[str, dict[str, str]]).validate_json(given or "{}")
    except ValidationError:
        raise SettingsError(
            "MILLRACE_ACCESS_SECRETS is no JSON of the shape "
            + json.dumps({"postgres": {ADMIN: "…", "dev": "…"}}, ensure_ascii=False)
            + "; see docs/access.md"
        ) from None


def put_up(settings: Settings, wall: Wall, *, actor: str) -> list[str]:
    """Make the wall as it is declared; what was changed. The audit trail has it as attempted before it is tried: a
    process that is killed, or a lake that fails, leaves no change without a trace.

    Args:
        actor: as in the audit trail.

    Raises:
        MillraceError: as the wall's `plan` and `apply`, or as `record`; what was changed stands.
    """
    planned = [str(one) for one in wall.plan()]
    if not planned:
        return []
    told = True
    try:
        record_changes(settings, wall.name, planned, actor=actor, outcome="attempted")
    except LakehouseError:
        if wall.name != "lake":  # whose wall makes the bucket that the trail is in
            raise
        told = False
    try:
        changes = [str(one) for one in wall.apply()]
    except MillraceError:
        if not told:
            record_changes(settings, wall.name, planned, actor=actor, outcome="attempted")
        raise
    record_changes(settings, wall.name, changes, actor=actor, outcome="changed")
    return changes


def record_changes(settings: Settings, wall: str, changes: Sequence[str], *, actor: str, outcome: str) -> None:
    """Who may do what was changed: into the audit trail.

    Raises:
        LakehouseError: it can't be written.
    """
    at = datetime.now(UTC)
    events = [
        Event(
            event_id=f"permission/{wall}/{at.isoformat()}/{number}",
            occurred_at=at,
            actor=actor,
            action="permission",
            application=PLATFORM,
            resource=f"access/{wall}",
            outcome=outcome,
            run=actor,
            # A role may be called as an address is, and the trail holds none.
            details={"change": change.replace("@", " at ")},
        )
        for number, change in enumerate(changes)
    ]
    record(settings, events, run=actor)
