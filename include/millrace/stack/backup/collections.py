"""The collections of one environment on a Qdrant server, by the server's own snapshots.

A snapshot is made on the server, carried off and removed there. On a cluster it holds what one node has: there each
node's is needed, which this does not do.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx

from millrace.retrieval.server import Server
from millrace.stack.backup.store import CHUNK

Kept = TypeVar("Kept")

SNAPSHOT_SECONDS = 3600.0
"""How long the server may take to make, send or recover one; far more than a request for points."""


class Collections:
    """Those of `environment` on a server."""

    def __init__(self, server: Server, api_key: str, environment: str) -> None:
        self._server = server
        self._headers = {"api-key": api_key} if api_key else {}
        self._begin = f"millrace-{environment}-"

    def names(self) -> list[str]:
        """
        Raises:
            RetrievalError: the server doesn't answer, or refuses.
        """
        found = self._server.ask("list collections", lambda client: client.get_collections()).collections
        return sorted(one.name for one in found if one.name.startswith(self._begin))

    def save(self, name: str, keep: Callable[[Iterable[bytes]], Kept]) -> Kept:
        """What `keep` makes of the collection's snapshot.

        Raises:
            RetrievalError: the server doesn't answer, or refuses.
        """
        # Asked once: each further try would leave another snapshot on the server's disk.
        made = self._ask(f"make a snapshot of collection {name}", "POST", f"{name}/snapshots", waits=())
        snapshot = f"{name}/snapshots/{made['result']['name']}"
        try:
            return self._server.ask(f"send a snapshot of collection {name}", lambda _: keep(self._download(snapshot)))
        finally:
            self._ask(f"remove a snapshot of collection {name}", "DELETE", snapshot)

    def restore(self, name: str, snapshot: Path, sha256: str) -> None:
        """Make the collection, or replace it.

        Raises:
            RetrievalError: the server doesn't answer, or refuses.
        """
        # Without the priority the server would ask its other replicas what is true, and keep its own empty state.
        how = {"priority": "snapshot", "wait": "true", "checksum": sha256}

        def upload(_: object) -> None:
            with (
                snapshot.open("rb") as file,
                self._request("POST", f"{name}/snapshots/upload", params=how, files={"snapshot": file}),
            ):
                pass

        self._server.ask(f"recover collection {name}", upload)

    def _download(self, snapshot: str) -> Iterator[bytes]:
        with self._request("GET", snapshot) as answer:
            yield from answer.iter_bytes(CHUNK)

    def _ask(self, what: str, method: str, path: str, waits: tuple[float, ...] | None = None) -> dict[str, Any]:
        def request(_: object) -> dict[str, Any]:
            with self._request(method, path, params={"wait": "true"}) as answer:
                answer.read()
                told: dict[str, Any] = answer.json()
                return told

        return self._server.ask(what, request, waits)

    @contextmanager
    def _request(self, method: str, path: str, **arguments: Any) -> Iterator[httpx.Response]:
        """One that the client has no way for: it keeps answers in memory, and waits half a minute at most."""
        from qdrant_client.http.exceptions import UnexpectedResponse

        url = f"{self._server.address.rstrip('/')}/collections/{path}"
        with httpx.stream(method, url, headers=self._headers, timeout=SNAPSHOT_SECONDS, **arguments) as answer:
            if answer.is_error:
                answer.read()
                raise UnexpectedResponse.for_response(answer)  # as the client does: `ask` says it in one sentence
            yield answer
