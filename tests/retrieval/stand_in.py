"""As much of a Qdrant server as Millrace speaks to, on a real socket: the client's local mode behind Qdrant's REST API,
with keys, and with the ways in which servers fail."""

import json
import re
import socket
import threading
import time
import warnings
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, TypeAdapter
from qdrant_client import QdrantClient, models
from qdrant_client.conversions.common_types import PointsSelector

MANAGES = {("PUT", ""), ("DELETE", "")}
WRITES = {("PUT", "/points"), ("POST", "/points/payload"), ("POST", "/points/delete"), ("PUT", "/index")} | MANAGES
RIGHTS = ("", "r", "rw", "m")
"""Each holds those before it."""
LISTED = "every collection"
SELECTOR: TypeAdapter[PointsSelector] = TypeAdapter(models.FilterSelector | models.PointIdsList)


class Disk:
    """What a server that went away leaves for the next one."""

    def __init__(self) -> None:
        self.store = QdrantClient(":memory:")
        self.indexed: dict[str, dict[str, models.PayloadIndexInfo]] = {}
        """Collection → fields of its payload: local mode doesn't remember them."""


class StandIn(ThreadingHTTPServer):
    """Answers at `url` until `stop`. A write is a request that changes something."""

    daemon_threads = True

    def __init__(self, keys: dict[str, str] | None = None, port: int = 0, disk: Disk | None = None) -> None:
        self.keys = keys
        """Key → `m` (may do everything), `rw` or `r`; None: nobody is asked."""
        self.disk = disk or Disk()
        self.lock = threading.Lock()
        self.requests: list[tuple[str, str]] = []
        self.writes = 0
        self.dies_at: int | None = None
        """The write at which it goes away: after doing it, without an answer."""
        self.unavailable = 0
        """How many of the next requests get 503."""
        self.hangs = False
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.alive = True
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Nobody listens there any more; what was stored stays in `disk`."""
        if self.alive:
            self.alive = False
            self.socket.shutdown(socket.SHUT_RDWR)
            threading.Thread(target=self.shutdown, daemon=True).start()
            self.server_close()

    def access(self, key: str, collection: str) -> str | None:
        """What a key may do with a collection, as `keys` says it, or nothing at all (empty); None: it is no key."""
        return (self.keys or {}).get(key)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a caller that left


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        self._answer()

    do_PUT = do_POST = do_DELETE = do_GET

    def _answer(self) -> None:
        stand_in = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        match = re.fullmatch(r"/collections(?:/([^/]+)(.*))?", urlsplit(self.path).path)
        if match is None:
            return self._say(404, "no such route")
        name, route = match[1] or "", (self.command, match[2] if match[1] else LISTED)
        while stand_in.hangs:
            time.sleep(0.05)
        writes = route in WRITES
        with stand_in.lock:
            stand_in.requests.append(route)
            if stand_in.unavailable > 0:
                stand_in.unavailable -= 1
                return self._say(503, "Service Unavailable: a peer is starting")
            refusal = self._refused(name, route)
            if refusal:
                return self._say(*refusal)
            if writes:
                stand_in.writes += 1
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    result = _ROUTES[route](stand_in.disk, name, json.loads(body) if body else {})
            except KeyError:
                return self._say(404, f"no route {route}")
            except ValueError as error:
                if "not found" in str(error):
                    return self._say(404, f"Not found: Collection `{name}` doesn't exist!")
                return self._say(400, str(error))
            if writes and stand_in.writes == stand_in.dies_at:
                stand_in.stop()
        if not stand_in.alive:
            self.connection.close()
            return None
        return self._send(200, {"result": _json(result), "status": "ok", "time": 0.0})

    def _refused(self, name: str, route: tuple[str, str]) -> tuple[int, str] | None:
        if self.server.keys is None:
            return None
        # As Qdrant's `extract_key` does.
        shown = self.headers.get("api-key") or (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        access = self.server.access(shown, name)
        if access is None:
            return 401, "Invalid API key or JWT"
        needed = "m" if route in MANAGES else "rw" if route in WRITES else "r"
        if RIGHTS.index(access) < RIGHTS.index(needed):
            return 403, f"Forbidden: {'Global manage' if needed == 'm' else 'Write'} access is required"
        return None

    def _say(self, status: int, error: str) -> None:
        self._send(status, {"status": {"error": error}, "time": 0.0})

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


Route = Callable[[Disk, str, dict[str, Any]], Any]


def _describe(disk: Disk, name: str, body: dict[str, Any]) -> Any:
    return disk.store.get_collection(name).model_copy(update={"payload_schema": disk.indexed.get(name, {})})


def _index(disk: Disk, name: str, body: dict[str, Any]) -> Any:
    asked = models.CreateFieldIndex.model_validate(body)
    done = disk.store.create_payload_index(name, asked.field_name, asked.field_schema)
    kind = asked.field_schema if isinstance(asked.field_schema, str) else asked.field_schema.type  # type: ignore[union-attr]
    info = models.PayloadIndexInfo(data_type=models.PayloadSchemaType(kind), points=0)
    disk.indexed.setdefault(name, {})[asked.field_name] = info
    return done


def _create(disk: Disk, name: str, body: dict[str, Any]) -> bool:
    return disk.store.create_collection(name, models.CreateCollection.model_validate(body).vectors)


def _upsert(disk: Disk, name: str, body: dict[str, Any]) -> Any:
    return disk.store.upsert(name, models.PointsList.model_validate(body).points)


def _retrieve(disk: Disk, name: str, body: dict[str, Any]) -> Any:
    asked = models.PointRequest.model_validate(body)
    return disk.store.retrieve(name, asked.ids, with_payload=asked.with_payload or False)


def _scroll(disk: Disk, name: str, body: dict[str, Any]) -> Any:
    asked = models.ScrollRequest.model_validate(body)
    records, following = disk.store.scroll(
        name, asked.filter, limit=asked.limit or 10, offset=asked.offset, with_payload=asked.with_payload or False
    )
    return {"points": records, "next_page_offset": following}


def _count(disk: Disk, name: str, body: dict[str, Any]) -> Any:
    return disk.store.count(name, models.CountRequest.model_validate(body).filter)


def _query(disk: Disk, name: str, body: dict[str, Any]) -> Any:
    asked = models.QueryRequest.model_validate(body)
    return disk.store.query_points(
        name,
        query=asked.query,
        using=asked.using,
        query_filter=asked.filter,
        limit=asked.limit or 10,
        with_payload=asked.with_payload or False,
    )


def _delete(disk: Disk, name: str, body: dict[str, Any]) -> Any:
    return disk.store.delete(name, SELECTOR.validate_python(body))


def _set_payload(disk: Disk, name: str, body: dict[str, Any]) -> Any:
    asked = models.SetPayload.model_validate(body)
    return disk.store.set_payload(name, asked.payload, points=asked.points)


_ROUTES: dict[tuple[str, str], Route] = {
    ("GET", LISTED): lambda disk, name, body: disk.store.get_collections(),
    ("GET", "/exists"): lambda disk, name, body: {"exists": disk.store.collection_exists(name)},
    ("GET", ""): _describe,
    ("PUT", ""): _create,
    ("DELETE", ""): lambda disk, name, body: disk.store.delete_collection(name),
    ("PUT", "/index"): _index,
    ("PUT", "/points"): _upsert,
    ("POST", "/points"): _retrieve,
    ("POST", "/points/scroll"): _scroll,
    ("POST", "/points/count"): _count,
    ("POST", "/points/query"): _query,
    ("POST", "/points/delete"): _delete,
    ("POST", "/points/payload"): _set_payload,
}


def _json(result: Any) -> Any:
    if isinstance(result, BaseModel):
        return result.model_dump(mode="json")
    if isinstance(result, list):
        return [_json(one) for one in result]
    if isinstance(result, dict):
        return {name: _json(one) for name, one in result.items()}
    return result
