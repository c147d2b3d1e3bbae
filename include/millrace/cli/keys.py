"""`millrace key`: API keys of the gateway."""

import getpass
import json
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from millrace.applications import load_application
from millrace.cli.terminal import console, group, one_sentence
from millrace.errors import ApiKeyError
from millrace.settings import Settings, read_settings
from millrace.sources.event_log import now
from millrace.stack import with_keys_url

if TYPE_CHECKING:
    from millrace.serving.api_keys import ApiKey

key_app = group("API keys of the gateway: create, list, revoke, rotate.")

LONGEST_DAYS = 36_500

KeyId = Annotated[str, typer.Argument(help="Of the key, as `millrace key list` shows it.")]


@key_app.command("create")
def key_create(
    name: Annotated[str, typer.Argument(help="What it is for.")],
    owner: Annotated[str, typer.Option(help="Who answers for it; empty: you.")] = "",
    scope: Annotated[
        list[str] | None, typer.Option(help="ask, feedback, pin or admin, once each; empty: ask and feedback.")
    ] = None,
    application: Annotated[
        list[str] | None, typer.Option("--application", "-a", help="That it reaches, once each; empty: all.")
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="Over all gateways; empty: no limit.")] = None,
    monthly_budget: Annotated[
        float | None, typer.Option(help="US dollars in a calendar month, UTC; empty: no limit.")
    ] = None,
    expires_days: Annotated[float | None, typer.Option(help="Days until it ends; empty: never.")] = None,
) -> None:
    """Make a key. It is printed once, alone on the standard output, and stored nowhere."""
    from millrace.serving.key_store import KeyStore

    with one_sentence():
        settings = _settings()
        for each in application or ():
            load_application(settings, each)
        key, _ = KeyStore(settings).create(
            name,
            owner=owner or getpass.getuser(),
            scopes=scope or ["ask", "feedback"],
            applications=application,
            requests_per_minute=requests_per_minute,
            monthly_budget_usd=monthly_budget,
            expires_at=None if expires_days is None else now() + _duration(days=expires_days),
            actor=getpass.getuser(),
            show=print,
        )
        _note(f"API key {key.id} of {key.owner}, shown this once: {_about(key)}.")
        _warn_where_none_is_required(settings)


@key_app.command("list")
def key_list(
    every: Annotated[bool, typer.Option("--all", help="Also those that have ended.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """The keys of this environment and what they have spent; never their secrets."""
    from millrace.serving.key_store import KeyStore

    with one_sentence():
        settings, at = _settings(), now()
        keys = [key for key in KeyStore(settings).all() if every or key.ended(at) is None]
        if as_json:
            print(json.dumps([_for_programs(key, at) for key in keys], indent=1))
            return
        for key in keys:
            spent = f"${key.month_usd:.6f} this month, ${key.total_usd:.6f} in all"
            told = f"{key.id}  {key.name}, of {key.owner}: {_about(key)}; {spent}; {_state(key, at)}"
            console.print(f"{told}; last used {_minute(key.last_used_at)}", markup=False, soft_wrap=True)
        if not keys:
            _note("There is no valid key; `millrace key create` makes one.")
        _warn_where_none_is_required(settings)


@key_app.command("revoke")
def key_revoke(key_id: KeyId, reason: Annotated[str, typer.Option(help="Why; it is recorded.")]) -> None:
    """End a key, both its secrets. Gateways notice within seconds."""
    from millrace.serving.admission import CACHE_SECONDS
    from millrace.serving.key_store import KeyStore

    with one_sentence():
        KeyStore(_settings()).revoke(key_id, actor=getpass.getuser(), reason=reason)
        _note(f"API key {key_id} is revoked; the last gateway notices within {CACHE_SECONDS:.0f} s.")


@key_app.command("rotate")
def key_rotate(
    key_id: KeyId,
    overlap_hours: Annotated[float, typer.Option(help="How long the secret before is valid as well.")] = 24.0,
) -> None:
    """Give a key a new secret, printed once like the first; id, limits and budget stay."""
    from millrace.serving.key_store import KeyStore

    with one_sentence():
        key, _ = KeyStore(_settings()).rotate(
            key_id, overlap=_duration(hours=overlap_hours), actor=getpass.getuser(), show=print
        )
        _note(f"API key {key.id} has a new secret, shown this once; the one before ends {_minute(key.earlier_until)}.")


def _settings() -> Settings:
    return with_keys_url(read_settings())


def _duration(*, days: float = 0.0, hours: float = 0.0) -> timedelta:
    whole = days + hours / 24
    if not 0 <= whole <= LONGEST_DAYS:
        raise ApiKeyError(f"{whole:g} days can't be; give 0 to {LONGEST_DAYS:,}")
    return timedelta(days=whole)


def _about(key: "ApiKey") -> str:
    reach = "all applications" if key.applications is None else ", ".join(sorted(key.applications))
    told = [f"{', '.join(sorted(key.scopes))} of {reach}"]
    if key.requests_per_minute is not None:
        told.append(f"{key.requests_per_minute} requests a minute")
    if key.monthly_budget_usd is not None:
        told.append(f"${key.monthly_budget_usd:g} a month")
    if key.expires_at is not None:
        told.append(f"until {_minute(key.expires_at)}")
    return "; ".join(told)


def _state(key: "ApiKey", at: datetime) -> str:
    if (ended := key.ended(at)) is not None:
        return ended
    rotating = key.earlier_until is not None and at < key.earlier_until
    return f"valid; the secret before until {_minute(key.earlier_until)}" if rotating else "valid"


def _for_programs(key: "ApiKey", at: datetime) -> dict[str, Any]:
    told = {
        name: value.isoformat() if isinstance(value, datetime) else value
        for name, value in vars(key).items()
        if not name.endswith("sha256")
    }
    reach = None if key.applications is None else sorted(key.applications)
    return told | {"scopes": sorted(key.scopes), "applications": reach, "ended": key.ended(at)}


def _minute(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC" if moment else "never"


def _warn_where_none_is_required(settings: Settings) -> None:
    if not settings.keys_required:
        _note("This gateway answers without a key too: MILLRACE_GATEWAY_KEYS=required changes that.")


def _note(told: str) -> None:
    """Beside the standard output, which is for what a program reads."""
    Console(stderr=True, highlight=False).print(told, markup=False, soft_wrap=True)
