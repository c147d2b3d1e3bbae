"""What an MLflow server lets each environment's identity do, found out by trying it.

In every environment a probe stands for what is there: an experiment, a model and a prompt that its own identity makes,
named `millrace.access`. Grants to single resources, which a probe can't show, are the plan's to find.
"""

import uuid
from collections.abc import Iterator, Mapping

import httpx

from millrace.environments.access.matrix import READS, right
from millrace.environments.access.matrix import Observed as Observed
from millrace.environments.access.mlflow_calls import Caller, Login
from millrace.errors import ReleaseError
from millrace.settings import Settings

PROBE = "millrace.access"
_PROMPT = f"{PROBE}.prompt"
_IS_PROMPT = [{"key": "mlflow.prompt.is_prompt", "value": "true"}]


TRIES = (
    *(("artifacts", action) for action in ("write", "read", "delete")),
    *(
        (kind, action)
        for kind in ("experiment", "registered model", "prompt")
        for action in ("read", "write", "create", "delete")
    ),
)
"""Every resource and action, once in each environment by each identity."""


def declared() -> list[Observed]:
    """What `check` would try."""
    return [
        Observed(identity, environment, resource, action, _is_declared(identity, environment, action), None)
        for identity in READS
        for environment in READS
        for resource, action in TRIES
    ]


def check(settings: Settings, passwords: Mapping[str, str]) -> list[Observed]:
    """Every identity tries every action on every kind of resource in every environment.

    Args:
        passwords: every identity's.

    Raises:
        ReleaseError: the server doesn't answer, an identity can't log in, or the owner of an environment can't make the
            probe in it.
    """
    if missing := sorted(READS.keys() - passwords.keys()):
        raise ReleaseError(f"to try what {', '.join(missing)} may do needs its password; give it")
    return [
        observed
        for identity in READS
        for environment in READS
        for observed in _tried(settings, passwords, identity, environment)
    ]


def _tried(settings: Settings, passwords: Mapping[str, str], identity: str, environment: str) -> Iterator[Observed]:
    with Caller(settings, Login(environment, passwords[environment])) as owner:
        experiment, location = _probe(owner, environment)
    with Caller(settings, Login(identity, passwords[identity])) as ask:
        for resource, action, answer in _tries(ask, environment, experiment, location):
            if answer.status_code not in (200, 201, 403):
                raise ReleaseError(
                    f"MLflow answers {identity} with {answer.status_code} to {action} {resource} in {environment}, so "
                    f"nobody knows whether it may: {answer.text[:300]!r}"
                )
            is_declared = _is_declared(identity, environment, action)
            yield Observed(identity, environment, resource, action, is_declared, answer.is_success)


def _is_declared(identity: str, environment: str, action: str) -> bool:
    may = right(identity, environment)
    return may == "manages" or (may == "reads" and action == "read")


def _probe(owner: Caller, environment: str) -> tuple[str, str]:
    """The id of the environment's probe experiment, and where its artifacts are. What is missing of it is made."""
    by_name = {"params": {"experiment_name": PROBE}}
    found = owner.ask("GET", "2.0/mlflow/experiments/get-by-name", workspace=environment, **by_name)
    if found.status_code == 404:
        owner("POST", "2.0/mlflow/experiments/create", workspace=environment, json={"name": PROBE})
    elif found.is_success and found.json()["experiment"]["lifecycle_stage"] == "deleted":
        body = {"experiment_id": found.json()["experiment"]["experiment_id"]}
        owner("POST", "2.0/mlflow/experiments/restore", workspace=environment, json=body)
    for name, tags in ((PROBE, []), (_PROMPT, _IS_PROMPT)):
        model = owner.ask("GET", "2.0/mlflow/registered-models/get", workspace=environment, params={"name": name})
        if not model.is_success:  # The server says 403 of what isn't there.
            body = {"name": name, "tags": tags}
            owner("POST", "2.0/mlflow/registered-models/create", workspace=environment, json=body)
    probe = owner("GET", "2.0/mlflow/experiments/get-by-name", workspace=environment, **by_name)["experiment"]
    return str(probe["experiment_id"]), str(probe["artifact_location"]).partition(":")[2].strip("/")


def _tries(ask: Caller, workspace: str, experiment: str, location: str) -> Iterator[tuple[str, str, httpx.Response]]:
    """Resource, action, and how the server answers; what may be undone is undone."""

    def answer(method: str, path: str, **request: object) -> httpx.Response:
        return ask.ask(method, path, workspace=workspace, **request)

    of_experiment, new = {"experiment_id": experiment}, f"{PROBE}.{uuid.uuid4().hex}"
    artifact = f"2.0/mlflow-artifacts/artifacts/{location}/{uuid.uuid4().hex}/artifacts/probe"
    yield "artifacts", "write", answer("PUT", artifact, content=b"probe")
    listed = {"params": {"path": location}}
    yield "artifacts", "read", answer("GET", "2.0/mlflow-artifacts/artifacts", **listed)
    yield "artifacts", "delete", answer("DELETE", artifact)
    yield "experiment", "read", answer("GET", "2.0/mlflow/experiments/get", params=of_experiment)
    yield "experiment", "write", answer("POST", "2.0/mlflow/runs/create", json=of_experiment)
    made = answer("POST", "2.0/mlflow/experiments/create", json={"name": new})
    yield "experiment", "create", made
    if made.is_success:
        answer("POST", "2.0/mlflow/experiments/delete", json=made.json())
    yield "experiment", "delete", answer("POST", "2.0/mlflow/experiments/delete", json=of_experiment)
    for resource, name, tags in (("registered model", PROBE, []), ("prompt", _PROMPT, _IS_PROMPT)):
        named = {"name": name}
        yield resource, "read", answer("GET", "2.0/mlflow/registered-models/get", params=named)
        tag = named | {"key": "probe", "value": "tried"}
        yield resource, "write", answer("POST", "2.0/mlflow/registered-models/set-tag", json=tag)
        made = answer("POST", "2.0/mlflow/registered-models/create", json={"name": new, "tags": tags})
        yield resource, "create", made
        if made.is_success:
            answer("DELETE", "2.0/mlflow/registered-models/delete", json={"name": new})
        yield resource, "delete", answer("DELETE", "2.0/mlflow/registered-models/delete", json=named)
