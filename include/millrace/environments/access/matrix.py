"""Who may do what, declared once for every wall between environments; and what came of trying it.

Each environment has a service identity of its name, which manages everything of its own. What it reads of others is
`READS`, and in the lake `READ_BY`; nothing else is allowed. A wall is a server that keeps this (`walls.py` lists them);
this module knows none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from millrace.lakehouse.places import SAMPLE, owner

READS: dict[str, tuple[str, ...]] = {"dev": ("prod",), "staging": ("dev",), "prod": ("staging",)}
"""Environment → the others whose lake, models, prompts, experiments and index builds its identity reads: dev, to find
out why prod answers as it does; staging and prod, what is promoted to them."""

READ_BY: dict[str, tuple[str, ...]] = {SAMPLE: ("staging",)}
"""Place in the lake beside the environments → the identities that read it. Of prod, staging reads a sample with
nobody's name in it, and nothing else."""

PLACES = (*READS, *READ_BY)
"""Everything in the lake that has walls."""

DATABASES = ("airflow", "gateway")
"""What each environment owns in PostgreSQL, as `<environment>_<name>`. `READS` does not hold there: Airflow's has
connections in it and the gateway's API keys, so nobody enters another's."""

SERVERS: dict[str, tuple[str, ...]] = {"mlflow": ("mlflow", "mlflow_auth")}
"""Identity of a server that the environments share → the databases that it owns. No environment enters them: whoever
writes there is above that server's own walls."""

SHARED = "shared"
"""Stands where an environment's name would, for what is no environment's."""

Right = Literal["manages", "reads"]


def right(identity: str, place: str) -> Right | None:
    """What `identity` may do in an environment, or in a place of the lake beside them; None: nothing."""
    if identity == owner(place):
        return "manages"
    return "reads" if place in READS[identity] or identity in READ_BY.get(place, ()) else None


@dataclass(frozen=True)
class Observed:
    """What became of one try."""

    identity: str
    environment: str
    """Or the place in the lake beside them, or `SHARED`."""
    resource: str
    action: str
    declared: bool
    """Whether it should be allowed."""
    allowed: bool | None
    """Whether it was; None: nobody tried, since there is no server that could refuse."""

    @property
    def wrong(self) -> bool:
        return self.allowed is not None and self.allowed != self.declared

    def __str__(self) -> str:
        verdict = {True: "allowed", False: "refused", None: "not observed"}[self.allowed]
        wrong = ", which is not as declared" if self.wrong else ""
        return f"{self.identity}: {self.action} {self.resource} in {self.environment}: {verdict}{wrong}"


@dataclass(frozen=True)
class Held:
    """One thing that a server lets somebody do in an environment, declared or not."""

    identity: str
    resource: str
    """Named without the environment, so that two can be compared; empty: all of the wall's."""
    action: str


@dataclass(frozen=True)
class Holding:
    """Who may do what in an environment, as a server holds it."""

    rights: Sequence[Held]
    callers_alone: str = ""
    """Why it is what the caller may do, and nobody else; empty: it is everybody's."""
