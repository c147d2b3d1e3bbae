"""A Qdrant server that fails, refuses, or is told too much: on a real socket (`stand_in.py`)."""

import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse

from millrace.applications import Application
from millrace.errors import RetrievalError, SettingsError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_CHUNKS
from millrace.retrieval import points, server, service
from millrace.retrieval.builds import BuildManifest, Published, current
from millrace.retrieval.index import build_index
from millrace.retrieval.service import ServiceBuilds
from millrace.settings import Settings, read_settings
from tests.conftest import free_port
from tests.retrieval.conftest import chunked, vector_of, vectors_without_a_model
from tests.retrieval.places import Kept, write_note
from tests.retrieval.stand_in import WRITES, StandIn

pytestmark = pytest.mark.filterwarnings("ignore:.*ocal (mode|Qdrant)")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "WAITS", (0.01, 0.02))
    monkeypatch.setattr(points, "UPSERT_POINTS", 1)


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    stand_in = StandIn()
    yield stand_in
    stand_in.stop()


@pytest.fixture
def embedded(settings: Settings, application: Application) -> Kept:
    """Chunks with vectors, and no build yet."""
    embed(Kept(settings, application))
    return Kept(settings, application)


def embed(kept: Kept) -> None:
    chunked(kept.settings, kept.application)
    vectors_without_a_model(Lake.of(kept.settings, kept.application.name), kept.application)


def at(kept: Kept, url: str, key: str = "") -> Kept:
    changes = {"qdrant_url": url, "qdrant_api_key": key}
    return replace(kept, settings=Settings.model_validate(kept.settings.model_dump() | changes))


def build(kept: Kept) -> str:
    return build_index(kept.settings, kept.application, run="test")["build"]


@pytest.mark.slow
def test_a_server_that_goes_away_at_any_write_leaves_nothing_that_counts_and_the_next_run_completes_it(
    embedded: Kept, notes: Path
) -> None:
    whole = StandIn()
    first = build(at(embedded, whole.url))
    at(embedded, whole.url).builds.publish(first)
    before = texts_of(at(embedded, whole.url), first)
    whole.stop()
    write_note(notes, "Bread falls when the oven opens.")
    (notes / "rain.txt").write_text("Rain falls when drops grow too heavy for the air.")
    embed(embedded)

    refused = []
    for _ in range(12):
        dying = StandIn(disk=whole.disk)
        dying.dies_at = 1
        outcome = one_sentence_or_build(at(embedded, dying.url))
        dying.stop()
        looking = StandIn(disk=whole.disk)
        kept = at(embedded, looking.url)
        assert current(kept.builds) == first
        assert texts_of(kept, first) == before
        if dying.writes == 0:  # all was done by those that went away, and is not done again
            assert len(texts_of(kept, outcome)) == 4
            break
        refused.append(outcome)
        looking.stop()
    # The attempt, two points, one that is no longer in, the manifest.
    assert len(refused) == 5
    assert all("doesn't answer" in sentence and "\n" not in sentence for sentence in refused)


def one_sentence_or_build(kept: Kept) -> str:
    try:
        return build(kept)
    except RetrievalError as error:
        return str(error)


def texts_of(kept: Kept, build: str) -> set[str]:
    opened = kept.builds.open(build)
    found = opened.nearest(vector_of({"chunk_id": "any", "content_hash": "any"}), opened.manifest.chunks)
    assert len(found) == opened.manifest.chunks
    return {payload["text"] for _, payload in found}


@pytest.mark.slow
def test_a_refresh_sends_only_what_changed(embedded: Kept, stand_in: StandIn, notes: Path) -> None:
    kept = at(embedded, stand_in.url)
    build(kept)
    write_note(notes, "Bread falls when the oven opens.")
    embed(kept)
    stand_in.requests.clear()
    build(kept)
    # The attempt, one new point, the manifest; and one point that is no longer in.
    assert stand_in.requests.count(("PUT", "/points")) == 3
    assert stand_in.requests.count(("POST", "/points/payload")) == 1
    stand_in.requests.clear()
    build(kept)
    assert not WRITES.intersection(stand_in.requests)


@pytest.mark.slow
def test_switching_to_a_server_makes_and_publishes_the_build_though_nothing_changed(
    embedded: Kept, stand_in: StandIn
) -> None:
    made = build_index(embedded.settings, embedded.application, run="test")
    embedded.builds.publish(made["build"])
    kept = at(embedded, stand_in.url)
    assert current(kept.builds) is None
    again = build_index(kept.settings, kept.application, run="test")
    assert again == made  # the same build: `changed`, because it was not on the server
    assert again["changed"]
    assert kept.builds.publish(again["build"])
    assert current(embedded.builds) == current(kept.builds) == made["build"]


@pytest.mark.slow
def test_a_server_that_stumbles_is_asked_again(embedded: Kept, stand_in: StandIn) -> None:
    kept = at(embedded, stand_in.url)
    stand_in.unavailable = 2
    assert kept.builds.open(build(kept)).manifest.chunks == 3


@pytest.mark.slow
def test_a_server_that_is_not_there_is_one_sentence(embedded: Kept) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    for act in (lambda: build(at(embedded, url)), lambda: at(embedded, url).builds.published()):
        with pytest.raises(RetrievalError) as refused:
            act()
        assert str(refused.value).startswith(f"Qdrant at {url} doesn't answer (")
        assert str(refused.value).endswith("; start it, or correct MILLRACE_QDRANT_URL")


@pytest.mark.slow
def test_a_server_that_never_answers_does_not_hold_up_a_search(
    embedded: Kept, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "SEARCH_TIMEOUT", 1)
    kept = at(embedded, stand_in.url)
    opened = kept.builds.open(build(kept))
    stand_in.hangs = True
    begun = time.monotonic()
    with pytest.raises(RetrievalError, match=r"doesn't answer \(timed out\)"):
        opened.nearest(vector_of({"chunk_id": "any", "content_hash": "any"}), 1)
    assert time.monotonic() - begun < 4
    stand_in.hangs = False


@pytest.mark.slow
def test_a_server_that_goes_away_under_a_search_is_one_sentence_and_is_used_again_when_it_is_back(
    embedded: Kept,
) -> None:
    first = StandIn()
    kept = at(embedded, first.url)
    opened = kept.builds.open(build(kept))
    any_vector = vector_of({"chunk_id": "any", "content_hash": "any"})
    first.stop()
    with pytest.raises(RetrievalError, match="doesn't answer"):
        opened.nearest(any_vector, 1)
    again = StandIn(port=first.server_port, disk=first.disk)
    assert len(opened.nearest(any_vector, 3)) == 3
    again.stop()


@pytest.mark.slow
@pytest.mark.parametrize("key", ["", "wrong"])
def test_a_wrong_key_is_one_sentence_that_does_not_tell_it(embedded: Kept, key: str) -> None:
    stand_in = StandIn(keys={"right": "m"})
    with pytest.raises(
        RetrievalError, match=r"refuses this key \(401: Invalid API key or JWT\): it may not"
    ) as refused:
        build(at(embedded, stand_in.url, key))
    assert "set MILLRACE_QDRANT_API_KEY" in str(refused.value)
    assert "wrong" not in str(refused.value)
    assert len(stand_in.requests) == 1  # asking again would not help
    stand_in.stop()


@pytest.mark.slow
def test_a_reader_may_search_and_not_build_and_a_writer_may_do_all_but_create_the_collection(
    embedded: Kept, notes: Path
) -> None:
    stand_in = StandIn(keys={"admin": "m", "writer": "rw", "reader": "r"})
    admin, writer, reader = (at(embedded, stand_in.url, key) for key in ("admin", "writer", "reader"))
    with pytest.raises(RetrievalError, match=r"403: .* it may not create collection millrace-dev-qa-gt-all"):
        build(writer)
    first = build(admin)
    admin.builds.publish(first)
    write_note(notes, "Bread falls when the oven opens.")
    embed(embedded)
    with pytest.raises(RetrievalError, match=r"refuses this key \(403: .* it may not write to collection"):
        build(reader)
    with pytest.raises(RetrievalError, match="it may not write to collection"):
        reader.builds.publish(build(writer))
    assert writer.builds.publish(build(writer))
    opened = reader.builds.open(current(reader.builds) or "")
    assert len(opened.documents()) == len(opened.nearest(vector_of({"chunk_id": "", "content_hash": ""}), 3)) == 3
    stand_in.stop()


@pytest.mark.slow
def test_what_is_no_qdrant_server_is_one_sentence(embedded: Kept, mute_http: str) -> None:
    with pytest.raises(RetrievalError, match=r"is no Qdrant server \(404.*correct MILLRACE_QDRANT_URL"):
        build(at(embedded, mute_http))


@pytest.fixture
def mute_http() -> Iterator[str]:
    """A web server that knows none of it."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("Content-Length", "6")
            self.end_headers()
            self.wfile.write(b"nobody")

        do_POST = do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.mark.slow
def test_tls_that_can_not_be_trusted_is_one_sentence(embedded: Kept, stand_in: StandIn, tmp_path: Path) -> None:
    plain = stand_in.url.replace("http:", "https:")
    with pytest.raises(RetrievalError, match="no trusted TLS connection"):
        build(at(embedded, plain))
    url, certificate = self_signed(stand_in, tmp_path)
    with pytest.raises(RetrievalError, match=r"no trusted TLS connection \(.*CERTIFICATE_VERIFY_FAILED.*SSL_CERT_FILE"):
        build(at(embedded, url))
    assert certificate.is_file()


@pytest.mark.slow
def test_tls_by_a_named_authority_works(
    embedded: Kept, stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, certificate = self_signed(stand_in, tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    kept = at(embedded, url, "any key")
    assert len(kept.builds.open(build(kept)).documents()) == 3


def self_signed(stand_in: StandIn, folder: Path) -> tuple[str, Path]:
    """From now on `stand_in` speaks TLS; its address, and the certificate."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    port = free_port()
    front = socket.create_server(("127.0.0.1", port))
    threading.Thread(target=_forward, args=(front, context, stand_in.server_port), daemon=True).start()
    return f"https://127.0.0.1:{port}", certificate


def _forward(front: socket.socket, context: ssl.SSLContext, port: int) -> None:
    def pump(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            target.close()

    while True:
        raw, _ = front.accept()
        try:
            inside = context.wrap_socket(raw, server_side=True)
        except OSError:
            continue
        outside = socket.create_connection(("127.0.0.1", port))
        for pair in ((inside, outside), (outside, inside)):
            threading.Thread(target=pump, args=pair, daemon=True).start()


@pytest.mark.slow
def test_a_builder_that_is_overtaken_gives_up_and_the_other_build_is_untouched(
    embedded: Kept, stand_in: StandIn, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = at(embedded, stand_in.url)
    slow = ServiceBuilds._upload
    made: list[str] = []

    def overtaken(self: ServiceBuilds, new: object, serial: int) -> None:
        monkeypatch.setattr(ServiceBuilds, "_upload", slow)
        write_note(notes, "Bread falls when the oven opens.")
        embed(kept)
        made.append(build(kept))
        slow(self, new, serial)  # type: ignore[arg-type]

    monkeypatch.setattr(ServiceBuilds, "_upload", overtaken)
    with pytest.raises(RetrievalError, match="run test began another build meanwhile; this one gave up"):
        build(kept)
    assert [manifest.build for manifest in kept.builds.manifests()] == made
    assert len(texts_of(kept, made[0])) == 3
    assert any("oven" in text for text in texts_of(kept, made[0]))


@pytest.mark.slow
def test_a_build_that_lost_points_on_the_server_is_refused_and_made_again(
    embedded: Kept, stand_in: StandIn, lake: Lake
) -> None:
    kept = at(embedded, stand_in.url)
    made = build(kept)
    kept.builds.publish(made)
    builds = kept.builds
    assert isinstance(builds, ServiceBuilds)
    opened = builds.open(made)
    records, _ = stand_in.disk.store.scroll(builds.collection)
    lost = next(record for record in records if "chunk_id" in (record.payload or {}))
    stand_in.disk.store.delete(builds.collection, [lost.id])
    with pytest.raises(RetrievalError, match="holds 2 chunks of 3"):
        builds.open(made)
    with pytest.raises(RetrievalError, match="holds 2 chunks of 3"):
        opened.nearest(vector_of(lake.read(SILVER_CHUNKS).to_pylist()[0]), 3)
    assert build(kept) == made
    assert len(texts_of(kept, made)) == 3
    assert current(kept.builds) == made


@pytest.mark.slow
def test_a_build_that_was_made_again_after_its_collection_was_lost_is_found_by_who_had_it_open(
    embedded: Kept, stand_in: StandIn, lake: Lake
) -> None:
    kept = at(embedded, stand_in.url)
    made = build(kept)
    assert isinstance(kept.builds, ServiceBuilds)
    opened = kept.builds.open(made)
    stand_in.disk.store.delete_collection(kept.builds.collection)
    assert build(kept) == made
    for _ in range(2):
        assert len(opened.nearest(vector_of(lake.read(SILVER_CHUNKS).to_pylist()[0]), 3)) == 3


def test_a_server_that_wants_to_be_left_alone_is_not_waited_for_while_a_user_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(server.time, "sleep", slept.append)

    def limited(client: object) -> None:
        raise ResourceExhaustedResponse("429 Too Many Requests", 30)

    asked = server.Server(None, "http://qdrant")  # type: ignore[arg-type]
    with pytest.raises(RetrievalError, match="429"):
        asked.ask("search", limited, server.SEARCH_WAITS)
    assert slept == []
    with pytest.raises(RetrievalError, match="429"):
        asked.ask("write to", limited)
    assert slept == [30.0] * len(server.WAITS)


def test_a_collection_of_other_vectors_is_refused(embedded: Kept, stand_in: StandIn) -> None:
    from qdrant_client.models import Distance, VectorParams

    kept = at(embedded, stand_in.url)
    assert isinstance(kept.builds, ServiceBuilds)
    stand_in.disk.store.create_collection(
        kept.builds.collection, {"text": VectorParams(size=8, distance=Distance.COSINE)}
    )
    with pytest.raises(RetrievalError, match="has no vector 'text' of 384 dimensions"):
        build(kept)


@pytest.mark.slow
def test_a_build_or_pointer_of_another_format_is_one_sentence(embedded: Kept, stand_in: StandIn) -> None:
    kept = at(embedded, stand_in.url)
    builds = kept.builds
    assert isinstance(builds, ServiceBuilds)
    made = build(kept)
    manifest = builds.manifest(made).model_copy(update={"format": 99})
    builds._put(service._build_id(made), {"kind": "build", "build": made, "serial": 1, "manifest": as_json(manifest)})
    with pytest.raises(RetrievalError, match="has format 99"):
        builds.open(made)
    assert builds.manifests() == []
    builds._put(service._PUBLISHED, {"kind": "published", "pointer": "{"})
    with pytest.raises(RetrievalError, match="can't be understood"):
        builds.published()


def as_json(model: BuildManifest | Published) -> str:
    return model.model_dump_json()


def test_an_address_that_is_none_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_QDRANT_URL", "localhost:6333")
    with pytest.raises(SettingsError, match="MILLRACE_QDRANT_URL"):
        read_settings()
