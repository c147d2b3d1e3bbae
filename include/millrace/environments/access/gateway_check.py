"""What the gateway lets an API key of each scope do, found out by asking it over HTTP.

No question is answered and no feedback recorded for this: a request that is let in is one that the gateway then can't
serve, because it is empty or names an application that doesn't exist. Who makes the keys is the caller's business.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from millrace.environments.access.matrix import Observed
from millrace.errors import AccessError
from millrace.settings import Settings

SECONDS = 10
SCOPES = ("ask", "feedback", "pin", "admin")
NO_KEY, FOREIGN = "no key", "a key of another environment"


@dataclass(frozen=True)
class _Try:
    resource: str
    action: str
    scopes: frozenset[str]
    """That a key must have, all of them."""
    method: str
    path: str
    body: dict[str, Any] = field(default_factory=dict)


def _question(model: str) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "May I ask?"}]}


_TRIES = (
    _Try("questions", "ask", frozenset({"ask"}), "POST", "/v1/chat/completions", _question("millrace.access")),
    _Try("releases", "list", frozenset({"ask"}), "GET", "/v1/models"),
    _Try(
        "releases",
        "pin",
        frozenset({"ask", "pin"}),
        "POST",
        "/v1/chat/completions",
        _question("millrace.access@champion"),
    ),
    _Try("feedback", "give", frozenset({"feedback"}), "POST", "/v1/feedback"),
    _Try("metrics", "read", frozenset({"admin"}), "GET", "/metrics"),
)
HOLDERS: dict[str, frozenset[str]] = {f"a key for {scope}": frozenset({scope}) for scope in SCOPES} | {
    "a key for ask and pin": frozenset({"ask", "pin"})
}
"""Who tries → the scopes of its key; `NO_KEY` and `FOREIGN` have none."""


def declared(environment: str) -> list[Observed]:
    """What `check` would try."""
    return [
        Observed(holder, environment, one.resource, one.action, one.scopes <= scopes, None)
        for holder, scopes in (HOLDERS | dict.fromkeys((NO_KEY, FOREIGN), frozenset[str]())).items()
        for one in _TRIES
    ]


def check(settings: Settings, keys: Mapping[str, str]) -> list[Observed]:
    """Every holder tries everything.

    Args:
        keys: holder, all of `HOLDERS` and `FOREIGN` → its key as it is shown.

    Raises:
        AccessError: the gateway doesn't answer.
    """
    found = []
    # On this machine or near: no proxy from the environment applies.
    with httpx.Client(base_url=settings.gateway_url, timeout=SECONDS, trust_env=False) as client:
        for holder, scopes in (HOLDERS | dict.fromkeys((NO_KEY, FOREIGN), frozenset[str]())).items():
            headers = {"authorization": f"Bearer {keys[holder]}"} if holder != NO_KEY else {}
            for one in _TRIES:
                try:
                    answer = client.request(
                        one.method, one.path, headers=headers, json=one.body if one.method == "POST" else None
                    )
                except httpx.HTTPError as error:
                    raise AccessError(
                        f"the gateway at {settings.gateway_url} gave no answer to {one.action} {one.resource} "
                        f"({error}); start it, or correct MILLRACE_GATEWAY_PORT"
                    ) from None
                if answer.status_code >= 429:
                    raise AccessError(
                        f"the gateway at {settings.gateway_url} answers {answer.status_code} to {one.action} "
                        f"{one.resource}, so nobody knows whether {holder} may: {answer.text[:300]!r}"
                    )
                allowed = answer.status_code not in (401, 403)
                found.append(
                    Observed(holder, settings.environment, one.resource, one.action, one.scopes <= scopes, allowed)
                )
    return found
