"""Breaches of the policy's bounds that ask for a rollback: which of them the journal has yet to answer.

The monitor writes them (`ops/breaches`); this room only reads, and knows nothing of metrics. A breach counts against
the release that is challenger now, or, while there is none, champion, if its window reaches into the time in which
the release has been that, and it was found soon after; each is answered once, and the answer is in the journal.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import pyarrow.compute as pc

from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_BREACHES
from millrace.policies import ACTS_WITHIN
from millrace.rollout.decisions import Decision, State

MONITOR = "monitor"
"""Actor of the decisions that answer breaches."""


@dataclass(frozen=True)
class Breach:
    """What a decision tells of it."""

    breach_id: str
    version: str
    bound: str
    value: float
    reason: str
    interval_start: datetime
    interval_end: datetime
    simulated: bool


def unanswered(lake: Lake, journal: Sequence[Decision], state: State) -> Breach | None:
    """The oldest breach that asks to take back who answers now, and that no decision names yet; None: there is none,
    or nothing to go back to."""
    accused = state.challenger or state.champion
    since = _since(journal, state)
    if accused is None or since is None or state.objection("rollback"):
        return None
    answered = {decision.evidence.get("breach_id") for decision in journal}
    rows = lake.read(
        OPS_BREACHES,
        where=(pc.field("date") >= since.date())
        & (pc.field("action") == "rollback")
        & (pc.field("release_version") == accused)
        & (pc.field("interval_end") > since),
    ).to_pylist()
    found = [
        Breach(
            version=row["release_version"],
            **{name: row[name] for name in Breach.__dataclass_fields__ if name != "version"},
        )
        for row in rows
        if row["breach_id"] not in answered and row["at"] - row["interval_end"] <= ACTS_WITHIN
    ]
    return min(found, key=lambda breach: (breach.interval_start, breach.breach_id), default=None)


def _since(journal: Sequence[Decision], state: State) -> datetime | None:
    """When the present rollout began, or, without one, when the present champion became champion."""
    if state.rollout_id is not None:
        return next(d.decided_at for d in journal if d.rollout_id == state.rollout_id and d.kind == "start")
    champion, since = None, None
    for decision in journal:
        if decision.champion != champion:
            champion, since = decision.champion, decision.decided_at
    return since
