"""Requests to an MLflow server by whom they name: MLflow's own client knows one caller a process, its environment's."""

from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx

from millrace.errors import ReleaseError
from millrace.releases.mlflow_server import require_mlflow
from millrace.settings import Settings

SECONDS = 120.0
"""How long an answer may take."""


@dataclass(frozen=True)
class Login:
    """A user of the server."""

    name: str
    password: str = field(repr=False)


def own_login(settings: Settings) -> Login:
    """As whom this process asks MLflow.

    Raises:
        ReleaseError: nobody said.
    """
    from mlflow.utils.credentials import read_mlflow_creds

    known = read_mlflow_creds()
    if not known.username:
        raise ReleaseError(
            f"nobody logs in to MLflow at {settings.mlflow_url}: set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD"
        )
    return Login(known.username, known.password or "")


class Caller:
    """Calls MLflow's REST API as one user."""

    def __init__(self, settings: Settings, login: Login) -> None:
        require_mlflow(settings, f"ask as {login.name}")
        self._login, self._url = login, settings.mlflow_url
        self._client = httpx.Client(base_url=f"{self._url}/api/", auth=(login.name, login.password), timeout=SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def __call__(self, method: str, path: str, *, workspace: str | None = None, **request: Any) -> dict[str, Any]:
        """The answer to a request that is granted.

        Args:
            path: below `/api/`.
            workspace: in which; None: none is meant.
            request: as httpx takes it.

        Raises:
            ReleaseError: it is not.
        """
        answer = self.ask(method, path, workspace=workspace, **request)
        if not answer.is_success:
            raise ReleaseError(
                f"MLflow at {self._url} answers {self._login.name} with {answer.status_code} to "
                f"{method} {path}: {answer.text[:300]!r}"
            )
        said: dict[str, Any] = answer.json() if answer.content else {}
        return said

    def ask(self, method: str, path: str, *, workspace: str | None = None, **request: Any) -> httpx.Response:
        """The answer, whatever it is.

        Raises:
            ReleaseError: there is none.
        """
        headers = {"X-MLFLOW-WORKSPACE": workspace} if workspace else {}
        try:
            return self._client.request(method, path, headers=headers, **request)
        except httpx.HTTPError as error:
            raise ReleaseError(
                f"MLflow at {self._url} gave {self._login.name} no answer to {method} {path} ({error}); "
                "see its log, then retry"
            ) from error
