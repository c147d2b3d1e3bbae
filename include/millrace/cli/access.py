"""`millrace access`: who may do what in which environment; declared, put up, and found out by trying."""

import getpass
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from millrace.cli.terminal import console, group, one_sentence
from millrace.errors import MillraceError
from millrace.settings import Settings, read_settings
from millrace.stack import with_keys_url

if TYPE_CHECKING:
    from millrace.environments.access.matrix import Observed
    from millrace.environments.access.walls import Deployment, Wall

access_app = group("Who may do what in which environment: plan, apply, check.")

LONGEST_DAYS = 366

Chosen = Annotated[list[str] | None, typer.Option("--wall", help="Only this one; may be repeated. Empty: all.")]


@access_app.command("plan")
def access_plan(wall: Chosen = None) -> None:
    """What `apply` would change, wall by wall."""

    def planned(one: "Wall") -> None:
        _tell(one.name, [str(change) for change in one.plan()], "nothing to change")

    with one_sentence():
        if not _each(_deployment(), wall, planned):
            raise typer.Exit(1)


@access_app.command("apply")
def access_apply(wall: Chosen = None) -> None:
    """Make every wall as it is declared, and tell the audit trail. Killed anywhere, do it again."""
    from millrace.environments.access.walls import put_up

    with one_sentence():
        deployment = _deployment()

        def applied(one: "Wall") -> None:
            done = put_up(deployment.settings, one, actor=f"person/{getpass.getuser()}")
            _tell(one.name, done, "nothing to change")

        if not _each(deployment, wall, applied):
            raise typer.Exit(1)


@access_app.command("check")
def access_check(
    wall: Chosen = None, as_json: Annotated[bool, typer.Option("--json", help="For programs: every try.")] = False
) -> None:
    """Every identity tries every action on every resource; the matrix as observed.

    The exit status is 0 only if what was tried went as declared and every configured server answered. What stands on no
    server is said to be not observed.
    """
    found: dict[str, list[Observed]] = {}

    def checked(one: "Wall") -> None:
        found[one.name] = list(one.declared()) if one.absent else list(one.check())
        if not as_json:
            _show(one.name, found[one.name])

    with one_sentence():
        whole = _each(_deployment(), wall, checked, absent=checked)
        if as_json:
            print(json.dumps({name: [asdict(one) for one in tries] for name, tries in found.items()}, indent=1))
        else:
            _count([one for tries in found.values() for one in tries])
        if not whole or any(one.wrong for tries in found.values() for one in tries):
            raise typer.Exit(1)


@access_app.command("token")
def access_token(
    identity: Annotated[str, typer.Argument(help="dev, staging or prod.")],
    days: Annotated[int, typer.Option(min=1, max=LONGEST_DAYS, help="Until it ends.")] = 30,
) -> None:
    """A token of Qdrant for an environment. It is printed once, alone on the standard output, and stored nowhere.

    Make the next before it ends, and whenever a lineage is new; both are valid until each expires.
    """
    from millrace.environments.access.qdrant_wall import known_collections, token
    from millrace.environments.access.walls import ADMIN, record_changes
    from millrace.errors import AccessError
    from millrace.retrieval.server import connect

    with one_sentence():
        deployment = _deployment()
        settings, now = deployment.settings, datetime.now(UTC)
        if not settings.qdrant_url:
            raise AccessError("MILLRACE_QDRANT_URL is empty: index builds are folders here, which no token opens")
        api_key = deployment.secret("qdrant", ADMIN)
        collections = known_collections(settings, connect(settings.qdrant_url, SecretStr(api_key)))
        until = now + timedelta(days=days)
        made = token(identity, collections, api_key, now=now, valid=timedelta(days=days))
        told = f"token of {identity} until {until:%Y-%m-%d %H:%M} UTC"
        record_changes(settings, "qdrant", [told], actor=f"person/{getpass.getuser()}", outcome="changed")
        print(made)
        _note(f"A {told}, for {len(collections)} collections that are known now, as far as it may.")


def _deployment() -> "Deployment":
    from millrace.environments.access.walls import Deployment, read_secrets

    settings = with_keys_url(read_settings())
    return Deployment(settings, read_secrets(settings), lambda: _probe_keys(settings))


@contextmanager
def _probe_keys(settings: Settings) -> Iterator[Mapping[str, str]]:
    """API keys of every kind that the gateway is tried with, revoked at the end; they end soon by themselves, too."""
    from millrace.environments.access.gateway_check import FOREIGN, HOLDERS
    from millrace.serving.api_keys import new_key
    from millrace.serving.key_store import KeyStore

    store, actor, made = KeyStore(settings), getpass.getuser(), []
    other = "prod" if settings.environment == "dev" else "dev"
    written = {FOREIGN: new_key(other)[1]}
    try:
        for holder, scopes in HOLDERS.items():
            key, written[holder] = store.create(
                f"millrace access check: {holder}",
                owner=actor,
                scopes=sorted(scopes),
                applications=None,
                requests_per_minute=None,
                monthly_budget_usd=None,
                expires_at=datetime.now(UTC) + timedelta(minutes=10),
                actor=actor,
            )
            made.append(key.id)
        yield written
    finally:
        for key_id in made:
            store.revoke(key_id, actor=actor, reason="the check is over")
        store.close()


def _each(
    deployment: "Deployment",
    chosen: list[str] | None,
    do: "Callable[[Wall], None]",
    absent: "Callable[[Wall], None]" = lambda one: None,
) -> bool:
    """`do` for each wall; one that fails says so and keeps no other from its turn. Whether none failed.

    Raises:
        AccessError: a chosen wall doesn't exist.
    """
    from millrace.environments.access.walls import WALLS
    from millrace.errors import AccessError

    walls = [make(deployment) for make in WALLS]
    names = [wall.name for wall in walls]
    if unknown := sorted(set(chosen or ()) - set(names)):
        raise AccessError(f"there is no wall {', '.join(unknown)}; there are {', '.join(names)}")
    whole = True
    for wall in walls:
        if chosen and wall.name not in chosen:
            continue
        if wall.absent:
            _note(f"{wall.name}: only code here, no server refuses. {wall.absent}.")
            absent(wall)
            continue
        try:
            do(wall)
        except MillraceError as error:
            whole = False
            _note(f"{wall.name}: {error}")
    return whole


def _tell(wall: str, lines: list[str], none: str) -> None:
    count = f"{len(lines)} change{'s' if len(lines) > 1 else ''}" if lines else none
    console.print(f"{wall}: {count}", markup=False)
    for line in lines:
        console.print(f"  {line}", markup=False, soft_wrap=True)


def _show(wall: str, tries: "list[Observed]") -> None:
    """A table of who may do what by environment, and what was tried for it."""
    environments = list(dict.fromkeys(one.environment for one in tries))
    cells: dict[tuple[str, str], dict[str, list[Observed]]] = {}
    tried: dict[str, dict[str, None]] = {}
    for one in tries:
        # `database prod_airflow` in prod is to prod what `database dev_airflow` is to dev.
        resource = one.resource.replace(f"{one.environment}_", "…_").removesuffix(f" {one.environment}")
        cells.setdefault((one.identity, resource), {}).setdefault(one.environment, []).append(one)
        tried.setdefault(resource, {})[one.action] = None
    rows: dict[tuple[str, ...], list[str]] = {}
    for (identity, resource), row in cells.items():
        of_row = (_cell(row.get(environment, [])) for environment in environments)
        rows.setdefault((identity, *of_row), []).append(resource)
    table = Table("identity", "resource", *environments, title_justify="left", box=None, pad_edge=False)
    unseen = all(one.allowed is None for one in tries)
    table.title = f"{wall}, as declared: not observed" if unseen else wall
    for (identity, *told), resources in rows.items():
        table.add_row(identity, ", ".join(resources), *told)
    console.print(table)
    by_actions: dict[str, list[str]] = {}
    for resource, actions in tried.items():
        by_actions.setdefault(", ".join(actions), []).append(resource)
    for listed, resources in by_actions.items():
        console.print(f"  all of {', '.join(resources)}: {listed}", markup=False, style="dim", soft_wrap=True)


def _cell(tries: "list[Observed]") -> str:
    """What was allowed; after `!`, what was not as declared. What nobody tried is as it is declared, in brackets."""
    if any(one.allowed is None for one in tries):
        return f"({_cell([replace(one, allowed=one.declared) for one in tries])})"
    allowed = [one for one in tries if one.allowed]
    if any(one.wrong for one in tries):
        told = [f"!{one.action}" if one.wrong else one.action for one in allowed]
        return ", ".join([*told, *(f"!not {one.action}" for one in tries if one.wrong and not one.allowed)])
    if len(allowed) in (0, len(tries)):
        return ("" if not tries else "nothing") if not allowed else "all"
    return f"only {', '.join(one.action for one in allowed)}"


def _count(tries: "list[Observed]") -> None:
    allowed = sum(one.allowed is True for one in tries)
    denied = sum(one.allowed is False for one in tries)
    unseen = sum(one.allowed is None for one in tries)
    wrong = [one for one in tries if one.wrong]
    console.print(f"{allowed} allowed, {denied} denied by servers, {unseen} not observed, {len(wrong)} not as declared")
    for one in wrong:
        console.print(f"  {one}", markup=False, soft_wrap=True)


def _note(told: str) -> None:
    """Beside the standard output, which is for what a program reads."""
    Console(file=sys.stderr, highlight=False).print(told, markup=False, soft_wrap=True)
