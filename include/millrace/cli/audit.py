"""`millrace audit`: whether the trail of decisions, approvals, keys and erasures is whole; and what is in it."""

import json
from datetime import datetime
from typing import Annotated

import typer
from rich.table import Column, Table

from millrace.cli.terminal import console, group, one_sentence
from millrace.settings import read_settings

WIDEST = 1000

audit_app = group("The audit trail: verify it, search it.")


@audit_app.command("verify")
def audit_verify(
    head: Annotated[str, typer.Option(help="A hash that you noted down: the trail must have it still.")] = "",
) -> None:
    """Walk the whole hash chain; the exit status is 0 only if nothing was changed, removed, moved or cut off.

    Note the hash down that it prints, away from this machine: with --head, nobody can shorten the trail unseen.
    """
    from millrace.environments.audit import verify

    with one_sentence():
        settings = read_settings()
        trail = verify(settings, head=head)
    told = f"{trail.entries:,} entries of {settings.environment}, chain whole"
    if trail.head is not None:
        told += f", head {trail.head.hash} at {trail.head.occurred_at:%Y-%m-%d %H:%M:%S} UTC"
    if trail.waiting:
        told += f"; journal rows that wait for the next tick of their rollout: {trail.waiting:,}"
    console.print(told, markup=False, soft_wrap=True)


@audit_app.command("search")
def audit_search(
    text: Annotated[str, typer.Argument(help="Anywhere in an entry; empty: every entry.")] = "",
    since: Annotated[datetime | None, typer.Option(help="What happened from this moment on, UTC.")] = None,
    until: Annotated[datetime | None, typer.Option(help="And before this one.")] = None,
    actor: Annotated[str, typer.Option(help="person/ann or ann, service/controller, a pseudonym, a key's id.")] = "",
    action: Annotated[
        str, typer.Option(help="decision, approval, gate, promotion, permission, key, key_use, erasure.")
    ] = "",
    application: Annotated[str, typer.Option("--application", "-a", help="Empty: all.")] = "",
    resource: Annotated[str, typer.Option(help="Part of it: ops/decisions/17, key/…")] = "",
    limit: Annotated[int, typer.Option(min=1, help="The last so many.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: every column.")] = False,
) -> None:
    """Who did what, when, and how it ended, oldest first."""
    from millrace.environments.audit import search

    with one_sentence():
        found = search(
            read_settings(),
            since=since,
            until=until,
            actor=actor,
            action=action,
            application=application,
            resource=resource,
            text=text,
            limit=limit,
        )
    if as_json:
        print(json.dumps(found, indent=1, default=datetime.isoformat))
        return
    if not found:
        console.print("No entry.")
        return
    table = Table(Column("entry", justify="right"), "at, UTC", box=None, pad_edge=False)
    for name in ("actor", "action", "application", "resource", "release", "outcome"):
        table.add_column(name)
    for entry in found:
        told = (entry[name] or "" for name in ("actor", "action", "application", "resource"))
        release = entry["release_version"] or entry["release_id"] or ""
        table.add_row(
            str(entry["sequence"]), f"{entry['occurred_at']:%Y-%m-%d %H:%M:%S}", *told, release, entry["outcome"]
        )
    console.print(table, width=WIDEST, crop=False)  # as wide as it needs: an id that is cut is no use
