"""What an environment says of itself: its code's commit, its settings, its applications' declarations, who logs in.

Only its own processes know their settings, so it writes them down in its lake (`_platform/ops/environment`), where
whoever may read that can compare them. Of a secret it says sixteen bits of a slow hash: enough to tell another one
(wrong once in 65,536), too few to find out what it is.
"""

import hashlib
import json
from dataclasses import dataclass, fields
from datetime import UTC, datetime

import pyarrow as pa
from pydantic import SecretStr

from millrace.applications import flatten, load_applications
from millrace.environments.access.airflow_wall import held_logins
from millrace.errors import LakehouseError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_ENVIRONMENT, PLATFORM
from millrace.releases.recipe import running_commit
from millrace.secret_sources import without_logins
from millrace.settings import Settings


@dataclass(frozen=True)
class Description:
    described_at: datetime
    commit: str
    """Of the code; empty: nobody knows."""
    settings: dict[str, str]
    """Name → value as JSON, secrets aside."""
    secrets: dict[str, str]
    """Name of each that is set → four hexadecimal digits."""
    declarations: dict[str, str]
    """Dotted field (`qa.training.epochs`) → value as JSON."""
    logins: dict[str, str] | None = None
    """Who can log in to its Airflow → role; None: that isn't known, or an older Millrace wrote this."""
    keys_required: bool | None = None
    """Whether its gateway answers only to an API key; None: an older Millrace wrote this."""


_CONTENT = tuple(one.name for one in fields(Description) if one.name not in OPS_ENVIRONMENT.rows_schema.names)
"""Fields that are in the table as one JSON."""


def describe(settings: Settings) -> Description:
    """What this process' environment is now.

    Raises:
        StackError: the files of Airflow's login are there and can't be read.
    """
    public, secrets = {}, {}
    for field in Settings.model_fields:
        name, value = f"MILLRACE_{field.upper()}", getattr(settings, field)
        if not isinstance(value, SecretStr):
            public[name] = _told(settings.model_dump(mode="json", include={field})[field])
        elif secret := value.get_secret_value():
            secrets[name] = _digest(name, secret)
    declarations = {
        f"{application.name}.{field}": _told(value)
        for application in load_applications(settings)
        for field, value in flatten(application.model_dump(mode="json")).items()
    }
    return Description(
        datetime.now(UTC),
        running_commit(settings),
        public,
        secrets,
        declarations,
        held_logins(settings),
        settings.keys_required,
    )


def record_description(settings: Settings, *, run: str) -> Description:
    """Write it into this environment's lake, for others to read.

    Raises:
        LakehouseError: it can't be written.
        StackError: as `describe`.
    """
    found = describe(settings)
    content = {name: getattr(found, name) for name in _CONTENT}
    row = {
        "described_at": found.described_at,
        "commit": found.commit,
        "content": json.dumps(content, ensure_ascii=False),
    }
    rows = pa.Table.from_pylist([row], schema=OPS_ENVIRONMENT.rows_schema)
    Lake.of(settings, PLATFORM).merge(OPS_ENVIRONMENT, rows, run=run)
    return found


def recorded_description(settings: Settings, *, environment: str = "") -> Description:
    """What an environment wrote down last.

    Args:
        environment: another one, read with the credential of `settings`; empty: the one of `settings`.

    Raises:
        LakehouseError: it wrote nothing, or that can't be read.
    """
    lake = Lake.of(settings, PLATFORM, environment=environment)
    rows = lake.read(OPS_ENVIRONMENT).sort_by([("described_at", "descending")])
    if not rows.num_rows:
        raise LakehouseError(
            f"{lake.environment} has not described itself in {PLATFORM}/{OPS_ENVIRONMENT.path}, or not where this "
            "credential may read: let it run maintain_lakehouse or `millrace env record`"
        )
    row = rows.slice(0, 1).to_pylist()[0]
    content = json.loads(row["content"])
    # What a later Millrace says besides, this one doesn't know.
    known = {name: content[name] for name in _CONTENT if name in content}
    return Description(row["described_at"], row["commit"], **known)


def _told(value: object) -> str:
    return without_logins(json.dumps(value, ensure_ascii=False, sort_keys=True))


def _digest(name: str, secret: str) -> str:
    return hashlib.scrypt(secret.encode(), salt=name.encode(), n=2**14, r=8, p=1, dklen=2).hex()
