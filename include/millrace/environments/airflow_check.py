"""What an environment's Airflow lets each of its users do, found out by trying it over its REST API.

Nothing is run, changed or answered by it: what is asked of DAGs names one that isn't there. Whoever may is told that
(404), whoever may not is refused before Airflow looks (403); a caller without a login is told to log in (401).
"""

from collections.abc import Iterator, Mapping

import httpx

from millrace.environments.airflow_access import declared_logins, known_passwords
from millrace.environments.mlflow_check import Observed
from millrace.errors import StackError
from millrace.settings import Settings

PROBE = "millrace.access"
"""No DAG, pool, variable or connection has this name."""
STRANGER = "nobody"
"""Who shows no login."""
_RUNS = f"/dags/{PROBE}/dagRuns"
_MOMENT = "2026-01-01T00:00:00Z"

_TRIES: tuple[tuple[str, str, str, str, str, object], ...] = (
    # resource, action, what it takes, method, path, body
    ("DAGs", "read", "read", "GET", "/dags?limit=1", None),
    ("runs", "read", "read", "GET", _RUNS, None),
    ("runs", "trigger", "act", "POST", _RUNS, {"logical_date": None}),
    ("runs", "clear", "act", "POST", f"{_RUNS}/none/clear", {"dry_run": True}),
    ("runs", "mark", "act", "PATCH", f"{_RUNS}/none", {"state": "failed"}),
    ("runs", "delete", "act", "DELETE", f"{_RUNS}/none", None),
    ("tasks", "clear", "act", "POST", f"/dags/{PROBE}/clearTaskInstances", {"dry_run": True}),
    ("schedules", "pause", "act", "PATCH", f"/dags/{PROBE}", {"is_paused": True}),
    (
        "approvals", "answer", "act", "PATCH", f"{_RUNS}/none/taskInstances/none/-1/hitlDetails",
        {"chosen_options": ["Approve"], "params_input": {}},
    ),
    (
        "backfills", "start", "act", "POST", "/backfills",
        {"dag_id": PROBE, "from_date": _MOMENT, "to_date": _MOMENT, "reprocess_behavior": "none"},
    ),
    ("pools", "write", "manage", "PATCH", f"/pools/{PROBE}?update_mask=slots", {"slots": 1}),
    ("pools", "delete", "manage", "DELETE", f"/pools/{PROBE}", None),
    ("variables", "read", "manage", "GET", f"/variables/{PROBE}", None),
    ("variables", "delete", "manage", "DELETE", f"/variables/{PROBE}", None),
    ("connections", "read", "manage", "GET", f"/connections/{PROBE}", None),
    ("connections", "delete", "manage", "DELETE", f"/connections/{PROBE}", None),
)  # fmt: skip
_MAY = {
    "viewer": {"read"},
    "operator": {"read", "act"},
    "service": {"read", "act", "manage"},
    "admin": {"read", "act", "manage"},
}
"""Role → what it may."""


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
    for resource, action, takes, method, path, body in _TRIES:
        answer = client.request(method, f"/api/v2{path}", json=body, headers=headers)
        refused = answer.status_code in ((403,) if role else (401, 403))
        if not refused and answer.status_code not in (200, 204, 404):
            raise StackError(
                f"Airflow at {settings.airflow_url} answers {name} with {answer.status_code} to {action} {resource}, "
                f"so nobody knows whether it may: {answer.text[:300]!r}"
            )
        declared = role is not None and takes in _MAY[role]
        yield Observed(name, settings.environment, f"Airflow's {resource}", action, declared, not refused)


def _token(client: httpx.Client, name: str, password: str) -> str:
    login = client.post("/auth/token", json={"username": name, "password": password})
    if not login.is_success:
        raise StackError(
            f"Airflow at {client.base_url} refused the login of {name} with {login.status_code}; restart its API "
            "server if the name is new, and see `millrace access plan`"
        )
    token: str = login.json()["access_token"]
    return token
