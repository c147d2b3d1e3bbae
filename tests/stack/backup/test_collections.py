"""Collections of a Qdrant server. With MILLRACE_QDRANT_URL a real one makes the snapshots; without, what is sent and
how refusals are told is held against a stand-in, and whether a server recovers from a snapshot is not observed."""

import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from pydantic import SecretStr

from millrace.errors import BackupError, RetrievalError
from millrace.retrieval import server
from millrace.retrieval.server import connect
from millrace.settings import Settings
from millrace.stack.backup import restore, save
from millrace.stack.home import prepare_home

KEY = "may manage"


class Snapshots(ThreadingHTTPServer):
    """A server whose collections are their snapshots."""

    daemon_threads = True

    def __init__(self, collections: dict[str, bytes]) -> None:
        self.collections = collections
        self.made: dict[str, bytes] = {}
        """Snapshots on its disk."""
        self.asked: list[tuple[str, str, dict[str, list[str]]]] = []
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    server: Snapshots

    def do_GET(self) -> None:
        body = self._body()
        address = urlsplit(self.path)
        self.server.asked.append((self.command, address.path, parse_qs(address.query)))
        # Either, as Qdrant's `extract_key` does.
        if KEY not in (self.headers.get("api-key"), (self.headers.get("Authorization") or "").removeprefix("Bearer ")):
            self._say(403, {"status": {"error": "Forbidden: Global manage access is required"}})
            return
        path = re.fullmatch(r"/collections(?:/([^/]+)(?:/snapshots(?:/(.+))?)?)?", address.path)
        assert path, self.path
        name, snapshot = path.groups()
        match self.command, snapshot:
            case "GET", None:
                self._say(200, {"result": {"collections": [{"name": one} for one in self.server.collections]}})
            case "POST", None:
                self.server.made[f"{name}-1.snapshot"] = self.server.collections[name]
                made = {"name": f"{name}-1.snapshot", "creation_time": None, "size": 1, "checksum": None}
                self._say(200, {"result": made})
            case "POST", "upload":
                self.server.collections[name] = body
                self._say(200, {"result": True})
            case "GET", _:
                self._send(200, self.server.made[snapshot])
            case "DELETE", _:
                del self.server.made[snapshot]
                self._say(200, {"result": True})

    do_POST = do_DELETE = do_GET

    def _body(self) -> bytes:
        """What was sent; of a form, its file."""
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = self.headers.get("Content-Type", "")
        if not kind.startswith("multipart/form-data"):
            return sent
        form = BytesParser().parsebytes(f"Content-Type: {kind}\r\n\r\n".encode() + sent)
        [file] = form.get_payload()
        assert file.get_param("name", header="content-disposition") == "snapshot"
        return file.get_payload(decode=True)

    def _say(self, status: int, answer: object) -> None:
        self._send(status, json.dumps({"status": "ok", "time": 0.0} | answer).encode())

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def snapshots(monkeypatch: pytest.MonkeyPatch) -> Iterator[Snapshots]:
    monkeypatch.setattr(server, "WAITS", (0.01,))
    with Snapshots({"millrace-dev-qa-l1": b"vectors" * 1000, "millrace-prod-qa-l1": b"not ours"}) as running:
        yield running
        running.shutdown()


def on(url: str, settings: Settings, key: str = KEY) -> Settings:
    prepare_home(settings)
    return settings.model_copy(update={"qdrant_url": url, "qdrant_api_key": SecretStr(key)})


def test_the_environments_collections_are_saved_leave_nothing_behind_and_go_back(
    snapshots: Snapshots, settings: Settings, tmp_path: Path
) -> None:
    kept = on(snapshots.url, settings)
    saved = save(kept, tmp_path / "backups")
    assert set(saved.manifest.parts["collections"]) == {"millrace-dev-qa-l1"}
    assert not snapshots.made
    shutil.rmtree(kept.home)
    with pytest.raises(BackupError, match="collection millrace-dev-qa-l1 is there already; delete it"):
        restore(kept, tmp_path / "backups")
    vectors = snapshots.collections.pop("millrace-dev-qa-l1")
    restore(kept, tmp_path / "backups")
    assert snapshots.collections == {"millrace-dev-qa-l1": vectors, "millrace-prod-qa-l1": b"not ours"}
    [how] = [query for _, path, query in snapshots.asked if path.endswith("/upload")]
    blob = saved.manifest.parts["collections"]["millrace-dev-qa-l1"]
    assert how == {"priority": ["snapshot"], "wait": ["true"], "checksum": [blob.sha256]}


def test_a_key_that_may_not_and_a_server_that_is_away_are_one_sentence_and_no_backup(
    snapshots: Snapshots, settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(RetrievalError, match=r"refuses this key .*Global manage.*: it may not list collections"):
        save(on(snapshots.url, settings, "a guess"), tmp_path / "backups")
    with pytest.raises(RetrievalError, match=r"Qdrant at http://127\.0\.0\.1:1 doesn't answer"):
        save(on("http://127.0.0.1:1", settings), tmp_path / "backups")
    assert list((tmp_path / "backups" / "backups").iterdir()) == []


def test_a_real_server_recovers_what_it_had(settings: Settings, tmp_path: Path) -> None:
    if not (url := os.environ.get("TEST_QDRANT_URL")):
        pytest.skip("MILLRACE_QDRANT_URL names no Qdrant server")
    from qdrant_client import models

    kept = on(url, settings, os.environ.get("TEST_QDRANT_API_KEY", ""))
    client = connect(url, kept.qdrant_api_key)
    name = f"millrace-dev-backup-{tmp_path.name}"
    vectors = models.VectorParams(size=4, distance=models.Distance.COSINE)
    points = [models.PointStruct(id=n, vector=[1, n, 0, 0], payload={"n": n}) for n in range(100)]
    client.ask("create", lambda qdrant: qdrant.create_collection(name, vectors))
    client.ask("write to", lambda qdrant: qdrant.upsert(name, points, wait=True))

    def held() -> object:
        return client.ask("read", lambda qdrant: qdrant.scroll(name, limit=1000, with_vectors=True)[0])

    before = held()
    save(kept, tmp_path / "backups")
    client.ask("delete", lambda qdrant: qdrant.delete_collection(name))
    shutil.rmtree(kept.home)
    restore(kept, tmp_path / "backups")
    assert held() == before
    client.ask("delete", lambda qdrant: qdrant.delete_collection(name))
