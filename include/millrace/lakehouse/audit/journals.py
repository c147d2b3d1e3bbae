"""From the journals of an application to the audit trail: rollout decisions, verdicts of the gate, promotions.

The journals are the truth and the trail follows them, level-triggered like the rollout: whoever wrote a journal calls
`follow`, which appends whatever the trail lacks, once, by an id that the journal's row gives. Killed between the two
writes, the next call, at the latest the next tick of the rollout, makes it good. A cursor says up to which version of a
journal that is done, so that a tick reads what is new; the nightly upkeep looks at all of it, for a trail that was
restored from an older backup. What people wrote as a reason stays in the journal: it may name anybody.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from millrace.lakehouse.audit.chain import PERSON, Action, Event, record
from millrace.lakehouse.commits import open_table
from millrace.lakehouse.cursors import move_cursor, read_cursor
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_DECISIONS, OPS_EVALUATIONS, OPS_PROMOTIONS, TABLES, Table
from millrace.settings import Settings

_ACTIONS: dict[str, Action] = {
    "admit": "approval",
    "reject": "approval",
    "bootstrap": "promotion",
    "promote": "promotion",
    "skip": "promotion",
}
"""Kind of decision → what it is; the others are decisions."""
JOURNALS = (OPS_DECISIONS, OPS_EVALUATIONS, OPS_PROMOTIONS)
READER = "audit"
"""Of the cursors on them."""
MARGIN = timedelta(hours=1)
"""Between two clocks, and between a row that says when it was written and its commit."""


def follow(settings: Settings, application: str, *, run: str, whole: bool = False) -> int:
    """Append what the journals of `application` hold and the trail does not; how many entries that were.

    Args:
        whole: also what was done before.

    Raises:
        LakehouseError: a journal or the trail can't be read or written; the next call does it.
    """
    lake = Lake.of(settings, application)
    done = {} if whole else {journal.path: read_cursor(lake, READER, journal) for journal in JOURNALS}
    # Before the rows are: what is written meanwhile is the next call's.
    seen = {journal.path: version for journal in JOURNALS if (version := lake.version(journal)) is not None}
    if all(done.get(path) == version for path, version in seen.items()):
        return 0
    since = {path: _written_since(lake, path, version) for path, version in done.items()}
    appended = record(settings, journal_events(lake, since), run=run)
    for path, version in seen.items():
        if done.get(path) != version:
            move_cursor(lake, READER, TABLES[path], version, run=run)
    return appended


def journal_events(lake: Lake, since: Mapping[str, datetime | None] | None = None) -> list[Event]:
    """What the journals tell, in the order in which it happened. Names in `details` are for ever: the trail has the
    old entries, and they are compared (`environments/audit.py`).

    Args:
        since: path of a journal → only rows that were written from then on; None: all.
    """
    decisions = _rows(lake, OPS_DECISIONS, since, "reason", "evidence").sort_by("sequence").to_pylist()
    verdicts = _rows(lake, OPS_EVALUATIONS, since, "examples").to_pylist()
    events = [_decision(lake, row) for row in decisions] + [_verdict(lake, row) for row in verdicts]
    steps = _rows(lake, OPS_PROMOTIONS, since, "reason", "recipe").to_pylist()
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


def _rows(lake: Lake, table: Table, since: Mapping[str, datetime | None] | None, *without: str) -> pa.Table:
    moment = since.get(table.path) if since else None
    where = pc.field("written_at") >= moment if moment else None
    return lake.read(table, [name for name in table.schema.names if name not in without], where=where)


def _written_since(lake: Lake, path: str, version: int | None) -> datetime | None:
    """When the first row that came after `version` of a journal may have been written; None: nobody knows."""
    if version is None:
        return None
    opened = open_table(lake.uri(TABLES[path]), TABLES[path])
    behind = opened.version() - version
    commits = [one for one in opened.history(max(behind, 0) + 1) if one.get("version") == version]
    return datetime.fromtimestamp(commits[0]["timestamp"] / 1000, UTC) - MARGIN if commits else None


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
