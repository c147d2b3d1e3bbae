"""The MLflow server of a deployment: a client for it, and one sentence when it doesn't answer.

Every address is given to the client; MLflow's process-wide tracking address is neither read nor set, since the
gateway's threads share it.
"""

import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from millrace.errors import ReleaseError
from millrace.settings import Settings

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

    try:
        yield MlflowClient(settings.mlflow_url, settings.mlflow_url)
    except (MlflowException, OSError) as error:  # requests' errors are OSErrors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ReleaseError(
            f"MLflow at {settings.mlflow_url} failed to {purpose}: {reason}; see its log, then retry"
        ) from error


def require_mlflow(settings: Settings, purpose: str) -> None:
    """Ask the server whether it is there: MLflow's own client takes four minutes to say that nobody answers.

    Raises:
        ReleaseError: it isn't.
    """
    if not settings.mlflow_url.startswith("http"):
        return  # A store on this machine (`sqlite:///…`): nobody to ask.
    try:
        urllib.request.urlopen(f"{settings.mlflow_url}/health", timeout=PATIENCE_SECONDS).close()
    except urllib.error.HTTPError:
        return  # It answers; what it refuses, the client will say.
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ReleaseError(
            f"MLflow at {settings.mlflow_url} does not answer ({reason}), so I can't {purpose}; "
            "start it (`millrace up`) or correct MILLRACE_MLFLOW_URI"
        ) from None


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
