"""What an environment's Airflow lets each of its users do, found out by trying it over its REST API.

Nothing is run, changed or answered by it: what is asked of DAGs names one that isn't there. Whoever may is told that
(404), whoever may not is refused before Airflow looks (403); a caller without a login is told to log in (401).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import httpx

from millrace.environments.access.airflow_wall import declared_logins, known_passwords
from millrace.environments.access.matrix import Observed
from millrace.errors import StackError
from millrace.settings import Settings

PROBE = "millrace.access"
"""No DAG, pool, variable or connection has this name."""
STRANGER = "nobody"
"""Who shows no login."""
_RUNS = f"/dags/{PROBE}/dagRuns"
_MOMENT = "2026-01-01T00:00:00Z"


@dataclass(frozen=True)
class _Try:
    resource: str
    action: str
    takes: str
    """What a role must have for it."""
    method: str
    path: str
    body: object = None


_TRIES = (
    _Try("DAGs", "read", "read", "GET", "/dags?limit=1"),
    _Try("runs", "read", "read", "GET", _RUNS),
    _Try("runs", "trigger", "act", "POST", _RUNS, {"logical_date": None}),
    _Try("runs", "clear", "act", "POST", f"{_RUNS}/none/clear", {"dry_run": True}),
    _Try("runs", "mark", "act", "PATCH", f"{_RUNS}/none", {"state": "failed"}),
    _Try("runs", "delete", "act", "DELETE", f"{_RUNS}/none"),
    _Try("tasks", "clear", "act", "POST", f"/dags/{PROBE}/clearTaskInstances", {"dry_run": True}),
    _Try("schedules", "pause", "act", "PATCH", f"/dags/{PROBE}", {"is_paused": True}),
    _Try(
        "approvals", "answer", "act", "PATCH", f"{_RUNS}/none/taskInstances/none/-1/hitlDetails",
        {"chosen_options": ["Approve"], "params_input": {}},
    ),
    _Try(
        "backfills", "start", "act", "POST", "/backfills",
        {"dag_id": PROBE, "from_date": _MOMENT, "to_date": _MOMENT, "reprocess_behavior": "none"},
    ),
    _Try("pools", "write", "manage", "PATCH", f"/pools/{PROBE}?update_mask=slots", {"slots": 1}),
    _Try("pools", "delete", "manage", "DELETE", f"/pools/{PROBE}"),
    _Try("variables", "read", "manage", "GET", f"/variables/{PROBE}"),
    _Try("variables", "delete", "manage", "DELETE", f"/variables/{PROBE}"),
    _Try("connections", "read", "manage", "GET", f"/connections/{PROBE}"),
    _Try("connections", "delete", "manage", "DELETE", f"/connections/{PROBE}"),
)  # fmt: skip
_MAY = {
    "viewer": {"read"},
    "operator": {"read", "act"},
    "service": {"read", "act", "manage"},
    "admin": {"read", "act", "manage"},
}
"""Role → what it may."""


def declared(settings: Settings) -> list[Observed]:
    """What `check` would try."""
    return [
        _observed(settings, name, role, one, None)
        for name, role in {STRANGER: None, **declared_logins(settings)}.items()
        for one in _TRIES
    ]


def check(settings: Settings, passwords: Mapping[str, str] | None = None) -> list[Observed]:
    """Everybody who is declared, and a stranger, tries every action.

    Args:
        passwords: name → password; None: those in this home.

    Raises:
        StackError: Airflow doesn't answer, somebody can't log in, or an answer says neither yes nor no.
    """
    logins = declared_logins(settings)
    known = known_passwords(settings) if passwords is None else passwords
    if missing := sorted(logins.keys() - known.keys()):
        raise StackError(f"to try what {', '.join(missing)} may do in Airflow needs a password; give it")
    # Airflow is on this machine or near: no proxy from the environment applies.
    with httpx.Client(base_url=settings.airflow_url, timeout=30, trust_env=False) as client:
        try:
            return [
                observed
                for name in (STRANGER, *logins)
                for observed in _tried(client, settings, name, logins.get(name), known.get(name, ""))
            ]
        except httpx.HTTPError as error:
            raise StackError(f"Airflow at {settings.airflow_url} does not answer ({error!r})") from None


def _tried(client: httpx.Client, settings: Settings, name: str, role: str | None, password: str) -> Iterator[Observed]:
    headers = {"Authorization": f"Bearer {_token(client, name, password)}"} if role else {}
    for one in _TRIES:
        answer = client.request(one.method, f"/api/v2{one.path}", json=one.body, headers=headers)
        refused = answer.status_code in ((403,) if role else (401, 403))
        if not refused and answer.status_code not in (200, 204, 404):
            raise StackError(
                f"Airflow at {settings.airflow_url} answers {name} with {answer.status_code} to {one.action} "
                f"{one.resource}, so nobody knows whether it may: {answer.text[:300]!r}"
            )
        yield _observed(settings, name, role, one, not refused)


def _observed(settings: Settings, name: str, role: str | None, one: _Try, allowed: bool | None) -> Observed:
    may = role is not None and one.takes in _MAY[role]
    return Observed(name, settings.environment, one.resource, one.action, may, allowed)


def _token(client: httpx.Client, name: str, password: str) -> str:
    login = client.post("/auth/token", json={"username": name, "password": password})
    if not login.is_success:
        raise StackError(
            f"Airflow at {client.base_url} refused the login of {name} with {login.status_code}; restart its API "
            "server if the name is new, and see `millrace access plan`"
        )
    token: str = login.json()["access_token"]
    return token
