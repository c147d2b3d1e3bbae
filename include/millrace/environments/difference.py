"""What differs between two environments: code, settings, secrets, declarations, tables, models, prompts, permissions.

Each is read with the credential of whoever asks, as every other reader would read it. What that credential may not
read is named, never taken for equal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import pyarrow as pa
from deltalake.exceptions import DeltaError

from millrace.applications import load_applications
from millrace.environments.access.matrix import READS
from millrace.environments.description import recorded_description
from millrace.environments.permissions import permissions
from millrace.errors import MillraceError, ReleaseError, SettingsError
from millrace.lakehouse.commits import open_table, refusal
from millrace.lakehouse.content import content_hash
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import PLATFORM, TABLES, Table
from millrace.releases.mlflow_server import mlflow_client
from millrace.releases.published_split import read_split
from millrace.releases.registry import RELEASE_TAG, versions
from millrace.settings import Settings

Found = TypeVar("Found")

COLUMN = " column "
"""Between the names of a table and of its column."""
GRANTED = ": "
"""Between the names of a wall and of who is let through."""
OTHERS = "everybody else"


@dataclass(frozen=True)
class Unread:
    """What can't be compared, since one environment can't, or may not, be read there."""

    environment: str
    name: str
    """Empty: the whole part."""
    why: str


@dataclass(frozen=True)
class Difference:
    name: str
    left: str | None
    """None: it isn't there."""
    right: str | None


@dataclass(frozen=True)
class Part:
    """One part of two environments, compared."""

    name: str
    equal: int
    """Names that are the same in both."""
    differences: Sequence[Difference]
    unread: Sequence[Unread]


Values = dict[str, str | Unread]
"""What a part of an environment holds: name → value, or why that can't be read."""


def compare_environments(settings: Settings, left: str, right: str) -> list[Part]:
    """Every part of `left` and `right`.

    Raises:
        SettingsError: there is no such environment.
    """
    for name in (left, right):
        if name not in READS:
            raise SettingsError(f"there is no environment {name!r}; there are {', '.join(READS)}")
    sides = [settings.model_copy(update={"environment": name}) for name in (left, right)]
    said = [_read(partial(_said, settings), side) for side in sides]
    parts = [
        _compared(name, *(one if isinstance(one, Unread) else one[name] for one in said))
        for name in ("code", "settings", "secrets", "declarations")
    ]
    parts.append(_compared("tables", *(_read(partial(_tables, settings), side) for side in sides)))

    def of_mlflow(read: Callable[[Settings], Values], side: Settings) -> Values:
        if not settings.mlflow_workspaces and side.environment != settings.environment:
            raise ReleaseError(
                f"MLflow at {settings.mlflow_url} has no workspaces (MILLRACE_MLFLOW_WORKSPACES), so what is in it is "
                f"of {settings.environment} alone"
            )
        return read(side)

    for name, read in {"models": _models, "prompts": _prompts}.items():
        parts.append(_compared(name, *(_read(partial(of_mlflow, read), side) for side in sides)))
    of_left, of_right = (
        _read(partial(_permissions, settings, other), side) for side, other in zip(sides, (right, left), strict=True)
    )
    return [*parts, _compared("permissions", of_left, of_right)]


def _compared(name: str, left: Values | Unread, right: Values | Unread) -> Part:
    if isinstance(left, Unread) or isinstance(right, Unread):
        return Part(name, 0, [], [side for side in (left, right) if isinstance(side, Unread)])
    equal, differences, unread = 0, list[Difference](), list[Unread]()
    for one in sorted(left.keys() | right.keys()):
        if not (_whole(one, left) and _whole(one, right)):
            continue
        ours, theirs = left.get(one), right.get(one)
        if isinstance(ours, Unread) or isinstance(theirs, Unread):
            unread += [side for side in (ours, theirs) if isinstance(side, Unread)]
        elif ours == theirs:
            equal += 1
        elif name == "secrets":
            differences.append(Difference(one, ours and "set", theirs and ("another" if ours else "set")))
        elif name == "permissions":
            differences.append(Difference(one, ours or "nothing", theirs or "nothing"))
        else:
            differences.append(Difference(one, ours, theirs))
    return Part(name, equal, differences, unread)


def _whole(name: str, values: Values) -> bool:
    """Whether what `name` is in could be read there: a table of which it is a column, a wall that grants it. Of a table
    that isn't there, nobody wants to read every column."""
    table, _, column = name.partition(COLUMN)
    wall, _, granted = name.partition(GRANTED)
    if granted and isinstance(values.get(wall), Unread):
        return False
    return not column or isinstance(values.get(table), str)


def _read(read: Callable[[Settings], Found], side: Settings) -> Found | Unread:
    try:
        return read(side)
    except MillraceError as error:
        return Unread(side.environment, "", str(error))


def _said(caller: Settings, side: Settings) -> dict[str, Values]:
    """As the environment wrote it down: this process may be a person's, who has other settings and fewer secrets."""
    said = recorded_description(caller, environment=side.environment)
    return {
        "code": {"commit": said.commit or "unknown", "described at": f"{said.described_at:%Y-%m-%d %H:%M:%S} UTC"},
        "settings": dict(said.settings),
        "secrets": dict(said.secrets),
        "declarations": dict(said.declarations),
    }


def _tables(caller: Settings, side: Settings) -> Values:
    found: Values = {}
    for application in (*(one.name for one in load_applications(side)), PLATFORM):
        lake = Lake.of(caller, application, environment=side.environment)
        for table in TABLES.values():
            name = f"{application}/{table.path}"
            try:
                found |= _table(lake, table, name)
            except MillraceError as error:
                found[name] = Unread(side.environment, name, str(error))
    return found


def _table(lake: Lake, table: Table, name: str) -> dict[str, str]:
    """Empty: it isn't there."""
    if not lake.exists(table):
        return {}
    uri = lake.uri(table)
    opened = open_table(uri, table)
    try:
        rows, columns = opened.count(), pa.schema(opened.schema().to_arrow())
    except (DeltaError, OSError) as error:
        raise refusal(table, uri, error, "read") from error
    types = {f"{name}{COLUMN}{one.name}": f"{one.type}{'' if one.nullable else ' not null'}" for one in columns}
    return {name: f"version {opened.version()}, {rows:,} rows"} | types


def _models(side: Settings) -> Values:
    found: Values = {}
    for application in load_applications(side):
        registered, split = versions(side, application), read_split(side, application.name)
        for version, tags in registered.items():
            found[f"{application.name} {tags[RELEASE_TAG]}"] = f"version {version}"
        for role in ("champion", "challenger"):
            if answering := getattr(split, role, None):
                release = registered.get(answering, {}).get(RELEASE_TAG, "removed")
                found[f"{application.name} {role}"] = f"{release}, version {answering}"
    return found


def _prompts(side: Settings) -> Values:
    """By what they say: the same text may be another version elsewhere."""
    found: Values = {}
    with mlflow_client(side, "list the prompts") as client:
        for prompt in client.search_prompts():
            for one in client.search_prompt_versions(prompt.name):
                found[f"{prompt.name} {content_hash(str(one.template))[:12]}"] = f"version {one.version}"
    return found


def _permissions(caller: Settings, other: str, side: Settings) -> Values:
    """Wall and who → what they may do in `side`.

    Args:
        other: the environment that `side` is compared with. Each has an identity of its own, and to each the other's is
            the other's: called so, what they may do can be equal.
    """
    found: Values = {}
    for wall, holding in permissions(caller, side.environment).items():
        if isinstance(holding, str):
            found[wall] = Unread(side.environment, wall, f"{wall}: {holding}")
            continue
        names = {side.environment: "its own identity", other: "the other's identity"}
        if holding.callers_alone:
            names = {}
            others = f"{wall}{GRANTED}{OTHERS}"
            found[others] = Unread(side.environment, others, f"{wall}: {holding.callers_alone}")
        told: dict[str, set[str]] = {}
        for one in holding.rights:
            who = f"{wall}{GRANTED}{names.get(one.identity, one.identity)}"
            told.setdefault(f"{who} on {one.resource}" if one.resource else who, set()).add(one.action)
        found |= {name: ", ".join(sorted(actions)) for name, actions in told.items()}
    return found
