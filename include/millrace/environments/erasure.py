"""Erasing a user of an application: everything that is kept of what they asked, got and said, and its bytes.

Level-triggered like the rollout. First the user goes into `ops/erasures`, so that nothing of up to then is stored any
more; then what there is is looked for and deleted, by the engine that commits to each table, until nothing is found;
then files, change feeds and logs forget it, and the sample that prod has published is made again without it. Killed
anywhere, the next call does the rest, at the latest the nightly `maintain_lakehouse`. Weights that learnt from it are
named, not changed: the next fine-tune finds nothing of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow.compute as pc

from millrace.applications import Application
from millrace.environments.erasure_search import HOLDERS, Found, look, mentions
from millrace.environments.sample import publish_exchanges
from millrace.errors import ErasureError, FeedGone, MillraceError
from millrace.lakehouse.audit.chain import Event, record
from millrace.lakehouse.cursors import move_cursor
from millrace.lakehouse.forgetting import forget_removed
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.places import SAMPLE, owner
from millrace.lakehouse.tables import OPS_CURSORS, SILVER_EXCHANGES, SILVER_FEEDBACK, Table
from millrace.lakehouse.trained import all_trained_sets
from millrace.private_files import write_private
from millrace.releases.registry import versions
from millrace.releases.retention import delete_exchange_traces
from millrace.settings import Settings
from millrace.sources.erased import Erasure, read_erasures, write_erasures
from millrace.sources.event_log import erase_lines

ROUNDS = 5
"""Looks for something new, written meanwhile, before somebody is told that others keep writing it."""
WAITS = timedelta(days=7)
"""How long a reader of a change feed that lags behind keeps the bytes of deleted rows."""


@dataclass(frozen=True)
class Report:
    """What was done, or would be."""

    application: str
    user: str
    """Keyed pseudonym."""
    lines: int
    """Of the event log."""
    rows: Mapping[str, int]
    """Path of a table → rows."""
    files: int
    """Of fine-tunes, on this disk."""
    traces: int
    trained: tuple[str, ...]
    """Versions of releases whose weights learnt from it."""
    waiting: Mapping[str, str]
    """Path of a table whose old files have to stay for now → why."""
    erased: bool
    """Whether nothing is left, bytes included."""

    @property
    def nothing(self) -> bool:
        return not (self.lines or self.files or self.traces or any(self.rows.values()))


def preview(settings: Settings, application: Application, user: str) -> Report:
    """What `erase` would do now. Changes nothing; traces, whose number only MLflow knows, are not counted.

    Raises:
        MillraceError: a table, a segment or the registry can't be read.
    """
    known = _known(settings, application, user)
    found = look(settings, application.name, replace(known, until=datetime.now(UTC)))
    sets = found.training_sets | set(known.told.get("training_sets", ()))
    return _report(application, found.erasure, found, traces=0, trained=_trained(settings, application, sets))


def erase(settings: Settings, application: Application, user: str, *, actor: str, run: str) -> Report:
    """Erase what `user`, a pseudonym, did up to now.

    Args:
        actor: who is answerable for it, as in the audit trail (`person/ann`).

    Raises:
        ErasureError: others keep writing what is erased.
        MillraceError: a table, a segment, the registry or the audit trail can't be read or written; what was done
            stands, and the next call does the rest.
    """
    known = _known(settings, application, user)
    found = look(settings, application.name, replace(known, until=datetime.now(UTC)))
    if found.nothing and known.done_at is not None:
        return _report(application, known, found, traces=0, trained=tuple(known.told.get("releases", ())))
    return _erase(settings, application, found, actor=actor, run=run)


def finish_erasures(settings: Settings, application: Application, *, run: str) -> list[dict[str, Any]]:
    """Finish what was begun, and erase again what came back through a race with an ingestion.

    Returns: for each user of whom there was something left, `user`, `rows`, `waiting`.

    Raises:
        ErasureError: users of whom it couldn't be done, and why; the others' was.
        MillraceError: who they are can't be read.
    """
    told, failed = [], []
    for known in read_erasures(Lake.of(settings, application.name)):
        if known.done_at is not None and datetime.now(UTC) - known.until > WAITS:
            continue  # Whoever read an event before the erasure has long written it.
        try:
            found = look(settings, application.name, known)
            if known.done_at is None or not found.nothing:
                report = _erase(settings, application, found, actor="service/erasure", run=run)
                told.append({"user": report.user, "rows": dict(report.rows), "waiting": dict(report.waiting)})
        except MillraceError as error:
            failed.append(f"user {known.user}: {error}")
    if failed:
        raise ErasureError(f"{application.name}: {'; '.join(failed)}")
    return told


def _known(settings: Settings, application: Application, user: str) -> Erasure:
    """What `ops/erasures` says of the user, or a new entry."""
    known = {one.user: one for one in read_erasures(Lake.of(settings, application.name))}
    return known.get(user) or Erasure(user, datetime.now(UTC), None, frozenset(), {})


def _erase(settings: Settings, application: Application, found: Found, *, actor: str, run: str) -> Report:
    lake, first = Lake.of(settings, application.name), found
    told: dict[str, Any] = dict(found.erasure.told)
    sets = set(told.get("training_sets", ()))
    # Of an erasure that is finished, what comes now is another one.
    totals: dict[str, int] = {} if found.erasure.done_at else dict(told.get("counts", {}))
    for _ in range(ROUNDS):
        sets |= found.training_sets
        # Before anything goes: what it leads to is known to whoever has to finish this.
        questions = found.erasure.told["questions"]
        told |= {"training_sets": sorted(sets), "counts": totals, "questions": questions}
        touched = {path for path, rows in found.rows.items() if rows}
        told["tables"] = sorted({*told.get("tables", ()), *touched})
        begun = replace(found.erasure, done_at=None, told=told)
        write_erasures(lake, [begun], run=run)
        if found is first:
            _record(settings, application, begun, "begun", {}, actor, run)
        if found.nothing:
            break
        for name, count in _delete(settings, application, found).items():
            totals[name] = totals.get(name, 0) + count
        found = look(settings, application.name, begun)
    else:
        raise ErasureError(
            f"{application.name}: something of user {first.erasure.user} was written {ROUNDS} times while it was "
            f"erased; pause {application.name}.ingest_feedback, then run `millrace erase` again"
        )
    # Traces are of dev only.
    traces = 0
    if settings.environment == "dev" and begun.completions:
        traces = delete_exchange_traces(settings, application.name, begun.completions)
    trained = _trained(settings, application, sets)
    waiting = {}
    for table, _ in HOLDERS:
        if table.path in told["tables"] and (why := _forget(lake, table, begun, run=run)):
            waiting[table.path] = why
    waiting |= _leave_the_sample(settings, application, run=run)
    told |= {"releases": list(trained), "tables": sorted(waiting)}
    done = replace(begun, told=told, done_at=None if waiting else datetime.now(UTC))
    _record(settings, application, done, "waiting" if waiting else "erased", totals | {"traces": traces}, actor, run)
    if not waiting:
        told["times"] = told.get("times", 0) + 1
    write_erasures(lake, [done], run=run)
    lines, files = totals.pop("lines", 0), totals.pop("files", 0)
    return Report(application.name, done.user, lines, totals, files, traces, trained, waiting, not waiting)


def _delete(settings: Settings, application: Application, found: Found) -> dict[str, int]:
    """Delete what was found; how much of what that was."""
    lake = Lake.of(settings, application.name)
    for path in found.files:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_private(path, "".join(line for line in lines if not mentions(line, found.questions)))
    counts = {
        "files": len(found.files),
        "lines": erase_lines(settings.event_log(application.name), found.erasure.covers_line),
    }
    for table, column in HOLDERS:
        counts[table.path] = lake.delete(table, column, found.rows[table.path]) if found.rows[table.path] else 0
    return counts


def _trained(settings: Settings, application: Application, sets: set[str] | frozenset[str]) -> tuple[str, ...]:
    """The versions that learnt from one of these sets, or in one of these fine-tunes."""
    if not sets:
        return ()
    return tuple(
        version
        for version, tags in versions(settings, application).items()
        if sets & {*all_trained_sets(tags), tags.get("fingerprint", "")}
    )


def _forget(lake: Lake, table: Table, erasure: Erasure, *, run: str) -> str | None:
    """Let go of the bytes of rows that were deleted from `table`; or why they have to stay for now."""
    now = lake.version(table)
    cursors = lake.read(OPS_CURSORS, ["reader", "version"], where=pc.field("table") == table.path).to_pylist()
    if datetime.now(UTC) - erasure.until < WAITS:
        for cursor in cursors:
            if _unread(lake, table, cursor["version"]):
                return f"{cursor['reader']} has not read its changes yet"
    forget_removed(lake.own_uri(table), table)
    for cursor in cursors:
        # It has nothing left to read but that rows went, and the feed of that is gone.
        if now is not None and cursor["version"] < now:
            move_cursor(lake, cursor["reader"], table, now, run=run)
    return None


def _leave_the_sample(settings: Settings, application: Application, *, run: str) -> dict[str, str]:
    """Publish the sample again, without what is no longer in prod, and let go of its bytes: nobody reads its change
    feed. Or, by path of a table, why that has to wait."""
    if settings.environment != owner(SAMPLE):
        return {}
    sample = Lake.of(settings, application.name, environment=SAMPLE)
    published = [table for table in (SILVER_FEEDBACK, SILVER_EXCHANGES) if sample.exists(table)]
    if published and not settings.pseudonym_key.get_secret_value():
        why = "this process has no MILLRACE_PSEUDONYM_KEY to publish the sample again with"
        return {f"{SAMPLE}/{table.path}": why for table in published}
    if published:
        publish_exchanges(settings, application, run=run)
    for table in published:
        forget_removed(sample.own_uri(table), table)
    return {}


def _unread(lake: Lake, table: Table, since: int) -> bool:
    """Whether something other than a deletion came after version `since`."""
    try:
        return "upsert" in lake.changes(table, since)["change"].to_pylist()
    except FeedGone:
        return False  # The feed doesn't reach back that far: there is nothing to wait for.


def _report(
    application: Application, erasure: Erasure, found: Found, *, traces: int, trained: tuple[str, ...]
) -> Report:
    rows = {path: len(ids) for path, ids in found.rows.items()}
    done = erasure.done_at is not None and found.nothing
    return Report(application.name, erasure.user, found.lines, rows, len(found.files), traces, trained, {}, done)


def _record(
    settings: Settings,
    application: Application,
    erasure: Erasure,
    outcome: str,
    counts: Mapping[str, int],
    actor: str,
    run: str,
) -> None:
    at = datetime.now(UTC)
    event = Event(
        # What came back was erased again: another event each time.
        event_id=f"{application.name}/erasure/{erasure.user}/{erasure.until.isoformat()}/"
        f"{erasure.told.get('times', 0)}/{outcome}",
        occurred_at=at,
        actor=actor,
        action="erasure",
        application=application.name,
        resource=f"user/{erasure.user}",
        outcome=outcome,
        run=run,
        details={"until": erasure.until.isoformat(), "counts": {name: n for name, n in counts.items() if n}}
        | {name: erasure.told[name] for name in ("training_sets", "releases") if erasure.told.get(name)},
    )
    record(settings, [event], run=run)
