"""What a bucket's policy lets each identity do in one environment, whoever wrote it.

Statements are read as the store gives them, and told by what the declared ones give an owner and a reader: `manages`,
`reads`. What is more or less than that is told action by action, with the place inside of the environment.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from millrace.environments.access.lake_wall import LISTING, READING, WRITING, Bucket, Statement, policy
from millrace.environments.access.matrix import Held, Holding
from millrace.errors import LakehouseError
from millrace.lakehouse.storage import Key
from millrace.settings import Settings

Rights = frozenset[tuple[str, str]]
"""Actions, each with where: a pattern inside of the environment, or the policy's own, if it reaches further."""

_LISTS = frozenset((action, place) for action in LISTING for place in ("", "*"))
KINDS: dict[str, Rights] = {
    "manages": _LISTS | {(action, "*") for action in WRITING},
    "reads": _LISTS | {(action, "*") for action in READING},
}


def held(settings: Settings, administrator: Key, principals: Mapping[str, str], environment: str) -> Holding:
    """Who may do what in the environment's part of the lake.

    Args:
        principals: identity → what the store calls it, as for `lake_wall.plan`.

    Raises:
        LakehouseError, AccessRefused: as `lake_wall.plan`.
    """
    bucket = Bucket(settings, administrator)
    statements = policy(bucket)
    if statements is None:
        raise LakehouseError(f"the object store has no bucket {bucket.name}; `millrace access apply` makes it")
    identities = {principal: identity for identity, principal in principals.items()}
    found: dict[str, set[tuple[str, str]]] = {}
    for statement in statements:
        places = list(_places(bucket, statement, environment))
        for principal in statement.principals if places else ():
            given = found.setdefault(identities.get(principal, principal), set())
            allowed = "" if statement.effect == "Allow" else f"{statement.effect.lower()} "
            given |= {(f"{allowed}{action}", place) for action in statement.actions for place in places}
    return Holding([Held(who, "", ", ".join(_said(frozenset(rights)))) for who, rights in found.items()])


def _said(rights: Rights) -> Iterator[str]:
    for kind, whole in KINDS.items():
        if whole <= rights:
            yield kind
            rights -= whole
            break
    for action, place in sorted(rights):
        yield f"{action} on {place or 'its prefix'}"


def _places(bucket: Bucket, statement: Statement, environment: str) -> Iterator[str]:
    """Where in the environment a statement holds; nothing: it is about something else."""
    whole, within = f"arn:aws:s3:::{bucket.name}", bucket.within(environment)
    listed = _listed(statement.condition)
    for resource in statement.resources:
        if resource == whole and listed is not None:
            yield from _reached(listed, within)
            continue
        where = f" where {statement.condition}" if statement.condition else ""
        reached = [resource] if resource == whole else _reached([resource], f"{whole}/{within}")
        yield from (f"{one}{where}" for one in reached)


def _listed(condition: str) -> list[str] | None:
    """What a condition lets be listed; None: it says something else."""
    told: Any = json.loads(condition or "{}")
    if told.keys() != {"StringLike"} or told["StringLike"].keys() != {"s3:prefix"}:
        return None
    prefixes = told["StringLike"]["s3:prefix"]
    return [prefixes] if isinstance(prefixes, str) else list(prefixes)


def _reached(patterns: list[str], within: str) -> Iterator[str]:
    """Of those that match something in `within`, what follows it; of one that begins before it, all."""
    for pattern in patterns:
        fixed = re.split(r"[*?]", pattern, maxsplit=1)[0]
        if pattern == within or pattern.startswith(f"{within}/"):
            yield pattern[len(within) :].removeprefix("/")
        elif pattern.startswith("NotResource ") or (fixed != pattern and within.startswith(fixed)):
            yield pattern
