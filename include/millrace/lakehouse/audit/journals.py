"""From the journals of an application to the audit trail: rollout decisions, verdicts of the gate, promotions.

The journals are the truth and the trail follows them, level-triggered like the rollout: whoever wrote a journal calls
`follow`, which appends whatever the trail lacks, once, by an id that the journal's row gives. Killed between the two
writes, the next call, at the latest the next tick of the rollout, makes it good; no third place remembers how far it
came. What people wrote as a reason stays in the journal: it may name anybody.
"""

import json
from typing import Any

from millrace.lakehouse.audit.chain import Action, Event, record
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_DECISIONS, OPS_EVALUATIONS, OPS_PROMOTIONS, Table
from millrace.settings import Settings

_ACTIONS: dict[str, Action] = {
    "admit": "approval",
    "reject": "approval",
    "bootstrap": "promotion",
    "promote": "promotion",
    "skip": "promotion",
}
"""Kind of decision → what it is; the others are decisions."""
PERSON = "person/"
"""Runs that a person made by hand begin so."""


def follow(settings: Settings, application: str, *, run: str) -> int:
    """Append what the journals of `application` hold and the trail does not; how many entries that were.

    Raises:
        LakehouseError: a journal or the trail can't be read or written; the next call does it.
    """
    return record(settings, journal_events(Lake.of(settings, application)), run=run)


def journal_events(lake: Lake) -> list[Event]:
    """What the journals tell, in the order in which it happened. Names in `details` are for ever: the trail has the
    old entries, and they are compared (`environments/audit.py`)."""
    decisions = lake.read(OPS_DECISIONS, _without(OPS_DECISIONS, "reason", "evidence")).sort_by("sequence").to_pylist()
    verdicts = lake.read(OPS_EVALUATIONS, _without(OPS_EVALUATIONS, "examples")).to_pylist()
    events = [_decision(lake, row) for row in decisions] + [_verdict(lake, row) for row in verdicts]
    steps = lake.read(OPS_PROMOTIONS, _without(OPS_PROMOTIONS, "reason", "recipe")).to_pylist()
    events += [_promotion(lake, row) for row in steps]
    return sorted(events, key=lambda event: event.occurred_at)


def _decision(lake: Lake, row: dict[str, Any]) -> Event:
    resource = f"{OPS_DECISIONS.path}/{row['sequence']}"
    run = row["written_by"]
    named = ("rollout_id", "epoch", "champion", "challenger", "share", "simulated")
    return Event(
        event_id=f"{lake.application}/{resource}",
        occurred_at=row["decided_at"],
        actor=f"{PERSON if run.startswith(PERSON) else 'service/'}{row['actor']}",
        action=_ACTIONS.get(row["kind"], "decision"),
        application=lake.application,
        resource=resource,
        outcome=row["kind"],
        run=run,
        release_version=row["challenger"] or row["champion"],
        details={name: row[name] for name in named if row[name] is not None},
    )


def _verdict(lake: Lake, row: dict[str, Any]) -> Event:
    resource = f"{OPS_EVALUATIONS.path}/{row['evaluation_id']}"
    named = ("champion", "champion_release_id", "evaluation_set", "index_build")
    failed = [criterion["name"] for criterion in json.loads(row["criteria"]) if not criterion["passed"]]
    return Event(
        event_id=f"{lake.application}/{resource}",
        occurred_at=row["evaluated_at"],
        actor="service/gate",
        action="gate",
        application=lake.application,
        resource=resource,
        outcome="passed" if row["passed"] else "refused",
        run=row["written_by"],
        release_id=row["candidate_release_id"],
        release_version=row["candidate"],
        details={name: row[name] for name in named} | {"failed": failed},
    )


def _promotion(lake: Lake, row: dict[str, Any]) -> Event:
    resource = f"{OPS_PROMOTIONS.path}/{row['promotion_id']}/{row['step']}"
    run = row["written_by"]
    named = ("source", "source_version", "way", "commit")
    return Event(
        event_id=f"{lake.application}/{resource}",
        occurred_at=row["at"],
        actor=f"{PERSON if run.startswith(PERSON) else 'service/'}{row['actor']}",
        action="approval" if row["step"] in ("approved", "rejected") else "promotion",
        application=lake.application,
        resource=resource,
        outcome=row["step"],
        run=run,
        release_id=row["release_id"],
        release_version=row["version"],
        details={name: row[name] for name in named if row[name] is not None},
    )


def _without(table: Table, *names: str) -> list[str]:
    return [name for name in table.schema.names if name not in names]
