"""The MLflow server of a deployment: a client for it, and one sentence when it doesn't answer or refuses.

Every address is given to the client; MLflow's process-wide tracking address is neither read nor set, since the
gateway's threads share it. Who asks is what MLflow's own variables say (`MLFLOW_TRACKING_USERNAME` and `_PASSWORD`, or
`_TOKEN`), and where, on a server that several environments share, is the workspace of this environment. That is
process-wide in MLflow, whose threads know it from nowhere else: a process works in one environment at a time.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from millrace.errors import ReleaseError
from millrace.settings import Settings

Found = TypeVar("Found")

PATIENCE_SECONDS = 5.0
"""How long a server may take to say that it is there."""


@contextmanager
def mlflow_client(settings: Settings, purpose: str) -> Iterator[Any]:
    """An `MlflowClient` for tracking and registry; what goes wrong inside becomes one sentence with `purpose` in it.

    Raises:
        ReleaseError: the server doesn't answer, or refuses.
    """
    require_mlflow(settings, purpose)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
    from mlflow.utils.workspace_context import set_workspace

    if settings.mlflow_workspace:
        set_workspace(settings.mlflow_workspace)
    try:
        client = MlflowClient(settings.mlflow_url, settings.mlflow_url)
        # To whom isn't let into a workspace, a search in it finds nothing and says nothing.
        if settings.mlflow_workspace and settings.mlflow_workspace not in {
            one.name for one in client.list_workspaces()
        }:
            raise MlflowException("no such workspace", PERMISSION_DENIED)
        yield client
    except (MlflowException, OSError) as error:  # requests' errors are OSErrors
        if refused := _refused(settings, error, purpose):
            raise ReleaseError(refused) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ReleaseError(
            f"MLflow at {settings.mlflow_url} failed to {purpose}: {reason}; see its log, then retry"
        ) from error


def require_mlflow(settings: Settings, purpose: str) -> None:
    """Ask the server whether it is there, and keeps environments apart if it should: MLflow's own client takes four
    minutes to say that nobody answers, or that there are no workspaces.

    Raises:
        ReleaseError: it isn't.
    """
    if not settings.mlflow_url.startswith("http"):
        return  # A store on this machine (`sqlite:///…`): nobody to ask.
    try:
        path = "/api/3.0/mlflow/server-info" if settings.mlflow_workspaces else "/health"
        with urllib.request.urlopen(f"{settings.mlflow_url}{path}", timeout=PATIENCE_SECONDS) as answer:
            apart = settings.mlflow_workspaces and json.load(answer).get("workspaces_enabled")
    except urllib.error.HTTPError:
        apart = False  # It answers; what it refuses, the client will say.
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ReleaseError(
            f"MLflow at {settings.mlflow_url} does not answer ({reason}), so I can't {purpose}; "
            "start it (`millrace up`) or correct MILLRACE_MLFLOW_URI"
        ) from None
    if settings.mlflow_workspaces and not apart:
        raise ReleaseError(
            f"MLflow at {settings.mlflow_url} has no workspaces, so I can't {purpose}; start it with "
            "--enable-workspaces (docs/mlflow.md), or set MILLRACE_MLFLOW_WORKSPACES to false"
        )


def _refused(settings: Settings, error: Exception, purpose: str) -> str | None:
    """The sentence for whom the server knows, or doesn't, and lets not do that; None: something else went wrong."""
    from mlflow.utils.credentials import read_mlflow_creds

    status = getattr(getattr(error, "response", None), "status_code", None)  # where requests says it, not MLflow
    said = {401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED"}.get(status or 0, getattr(error, "error_code", None))
    name = read_mlflow_creds().username
    if said == "UNAUTHENTICATED":
        who = f"{name} with this password" if name else "who gives no name"
        return (
            f"MLflow at {settings.mlflow_url} does not know {who}, so I can't {purpose}; "
            "correct MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    if said == "PERMISSION_DENIED":
        return (
            f"MLflow at {settings.mlflow_url} does not let {name} {purpose} in {settings.environment}; ask with a "
            "credential that may"
        )
    return None


def found_or_none(settings: Settings, ask: Callable[[], Found]) -> Found | None:
    """What `ask` gets of the registry by its name; None: there is none.

    A server with a login answers "denied" for what isn't there. Whoever is let into an environment's workspace, as
    `mlflow_client` makes sure, may read every model and prompt in it (`environments/access/mlflow_wall.py`).
    """
    from mlflow.exceptions import MlflowException

    try:
        return ask()
    except MlflowException as error:
        missing = {"RESOURCE_DOES_NOT_EXIST", *(("PERMISSION_DENIED",) if settings.mlflow_workspace else ())}
        if error.error_code not in missing:
            raise
        return None


def ensure_experiment(client: Any, name: str) -> str:
    """The id of the experiment called `name`, created if it isn't there."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    return str(found.experiment_id)


def evaluations_experiment(application: str) -> str:
    """Name of the experiment with what the gate found; parameter `candidate` of a run is a version here."""
    return f"{application}/evaluations"
