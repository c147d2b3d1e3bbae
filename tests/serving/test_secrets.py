"""A gateway whose secrets are rotated while it answers, and one whose servers say their keys back."""

import base64
import io
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

import pytest
from pydantic import SecretStr

from millrace.applications import Application
from millrace.engines.upstream import Upstream, UpstreamEngine
from millrace.errors import SettingsError
from millrace.releases.split import Split
from millrace.retrieval.search import Retriever
from millrace.secret_sources import SecretFile, WithoutSecrets
from millrace.serving.__main__ import FORM
from millrace.serving.gateway import create_app
from millrace.settings import Settings
from millrace.sources.completion_id import CompletionKey, verify, write_keys
from tests.retrieval.stand_in import StandIn
from tests.serving.keyed_upstream import KeyedUpstream
from tests.serving.parrot import Drawer, Gateway, Parrot, Shelf, a_release
from tests.serving.searched import AlwaysNorth, a_build

pytestmark = pytest.mark.filterwarnings("ignore:.*ocal (mode|Qdrant)")

NAMES = ("completion_key", "upstream_api_key", "qdrant_api_key")
OLD = {name: f"the old {name.replace('_', ' ')}" for name in NAMES}
NEW = {name: f"the new {name.replace('_', ' ')}" for name in NAMES}
NEWEST = "the newest upstream api key"


class Answering:
    """A gateway behind two servers that ask for keys, all its keys in files."""

    def __init__(self, start: Callable[..., Gateway], folder: Path, running: ExitStack) -> None:
        self.folder = folder
        secrets = {name: SecretFile(self.write(name, OLD[name]), name) for name in NAMES}
        self.upstream = running.enter_context(KeyedUpstream(OLD["upstream_api_key"]))
        self.qdrant = StandIn({OLD["qdrant_api_key"]: "m"})
        running.callback(self.qdrant.stop)
        builds = a_build(self.qdrant.url, secrets["qdrant_api_key"])
        retriever: Drawer = Retriever(builds, AlwaysNorth())  # type: ignore[assignment, arg-type]
        served = Upstream(self.upstream.url, secrets["upstream_api_key"])
        release = a_release(UpstreamEngine(served, "m", context_tokens=1000), retriever)  # type: ignore[arg-type]
        self.settings = Settings(home=folder).model_copy(update=secrets)
        shelf = Shelf(Split(sequence=0, champion="1"), {"1": release})
        self.gateway = start(shelf, answer_cache=False, **secrets)

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        new = path.with_suffix(".new")
        new.write_text(text)
        new.chmod(0o600)
        return new.replace(path)


@pytest.fixture
def answering(start: Callable[..., Gateway], tmp_path: Path) -> Iterator[Answering]:
    with ExitStack() as running:
        yield Answering(start, tmp_path, running)


@pytest.mark.slow
def test_every_key_is_rotated_while_the_gateway_answers_and_no_request_fails(answering: Answering) -> None:
    gateway, statuses, ids, stop = answering.gateway, [], [], threading.Event()

    def callers() -> None:
        while not stop.is_set():
            answer = gateway.ask(f"question {len(ids)}")
            statuses.append(answer.status_code)
            ids.append(answer.json()["id"])
            # Also of answers from before the rotation.
            statuses.append(gateway.rate(ids[0]).status_code)
            statuses.append(gateway.rate(ids[-1]).status_code)

    def a_while() -> None:
        asked = len(ids)
        gateway.wait_until(lambda: len(ids) > asked + 8)

    threads = [threading.Thread(target=callers) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        a_while()
        # As it is done by hand: a server takes both keys, callers get the new one, the old one goes.
        answering.upstream.keys.add(NEW["upstream_api_key"])
        answering.qdrant.keys = {OLD["qdrant_api_key"]: "m", NEW["qdrant_api_key"]: "m"}
        for name in ("upstream_api_key", "qdrant_api_key"):
            answering.write(name, NEW[name])
        ends = datetime.now(UTC) + timedelta(hours=1)
        answering.write("completion_key", ring(ends))
        a_while()
        answering.upstream.keys.remove(OLD["upstream_api_key"])
        answering.qdrant.keys = {NEW["qdrant_api_key"]: "m"}
        a_while()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert set(statuses) == {200}
    assert answering.upstream.shown >= {OLD["upstream_api_key"], NEW["upstream_api_key"]}
    assert verify(OLD["completion_key"].encode(), ids[0]).application == "qa"
    assert verify(NEW["completion_key"].encode(), ids[-1]).application == "qa"
    # The time that was declared for the old ids is over.
    answering.write("completion_key", ring(datetime.now(UTC) - timedelta(seconds=1)))
    assert gateway.rate(ids[0]).status_code == 403
    assert gateway.rate(ids[-1]).status_code == 200


@pytest.mark.slow
def test_another_pseudonym_key_is_refused_because_everybody_would_be_a_stranger(
    start: Callable[..., Gateway], settings: Settings, qa: Application
) -> None:
    gateway = start(Shelf(Split(sequence=0, champion="1"), {"1": a_release(Parrot(), drawer := Drawer())}), drawer)
    assert gateway.ask().status_code == 200
    other = settings.model_copy(update={"pseudonym_key": SecretStr("another pseudonym key")})
    for _ in range(2):
        with pytest.raises(SettingsError, match="every user would be a stranger") as refused:
            create_app(other, [qa], lambda *_: Shelf())
    assert "another pseudonym key" not in str(refused.value)
    create_app(settings, [qa], lambda *_: Shelf())
    noted = Path(str(refused.value).rpartition("remove ")[2])
    assert "test pseudonym key" not in noted.read_text()
    noted.unlink()
    create_app(other, [qa], lambda *_: Shelf())


def ring(ends: datetime) -> str:
    return write_keys(
        [CompletionKey(NEW["completion_key"].encode()), CompletionKey(OLD["completion_key"].encode(), ends)]
    )


@pytest.mark.slow
def test_a_completion_key_that_cannot_be_understood_stops_nobody(
    answering: Answering, caplog: pytest.LogCaptureFixture
) -> None:
    before = answering.gateway.ask().json()["id"]
    answering.write("completion_key", "a new key\nan old key until tomorrow")
    after = answering.gateway.ask("and now?")
    assert after.status_code == 200
    assert verify(OLD["completion_key"].encode(), after.json()["id"]).application == "qa"
    assert answering.gateway.rate(before).status_code == 200
    assert "line 2 of MILLRACE_COMPLETION_KEY doesn't say until when its key verifies" in caplog.text
    assert "an old key" not in caplog.text


@pytest.mark.slow
def test_no_error_log_or_event_of_a_gateway_holds_a_secret(
    answering: Answering, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    handler.setFormatter(WithoutSecrets(FORM, answering.settings))
    logging.getLogger().addHandler(handler)
    try:
        gateway, said = answering.gateway, []
        answering.write("upstream_api_key", NEW["upstream_api_key"])
        said.append(gateway.ask("by a key that the upstream doesn't know"))
        answering.upstream.keys = {NEW["upstream_api_key"]}
        answering.write("qdrant_api_key", NEW["qdrant_api_key"])
        said.append(gateway.ask("by a key that Qdrant doesn't know"))
        said.append(gateway.rate("chatcmpl-made-up"))
        said.append(gateway.client.post("/v1/chat/completions", content=b"{"))
        said.append(gateway.client.get("/v1/models/none"))
        # What nobody foresaw has a traceback in the log.
        answering.qdrant.keys = {NEW["qdrant_api_key"]: "m"}
        monkeypatch.setattr("millrace.engines.upstream._reason", broken)
        answering.write("upstream_api_key", NEWEST)
        said.append(gateway.ask("what is unforeseen?"))
    finally:
        logging.getLogger().removeHandler(handler)
    assert [one.status_code for one in said] == [503, 503, 403, 400, 404, 500]
    assert (
        "refuses the key: Incorrect API key provided: …; set MILLRACE_UPSTREAM_API_KEY"
        in said[0].json()["error"]["message"]
    )
    assert "refuses this key (401" in said[1].json()["error"]["message"]
    events = [line.read_text() for line in settings.event_log("qa").rglob("*") if line.is_file()]
    assert any("Incorrect API key" in one for one in events)
    assert "Traceback" in log.getvalue()
    secrets = [*OLD.values(), *NEW.values(), NEWEST, "test pseudonym key"]
    everything = "\n".join([log.getvalue(), *(one.text + str(one.headers) for one in said), *events])
    assert [one for secret in secrets for one in spellings(secret) if one in everything] == []


def broken(error: Exception, upstream: Upstream) -> str:
    raise ValueError(f"{error} is not what anybody expected")


def spellings(secret: str) -> set[str]:
    return {secret, quote(secret, safe=""), base64.b64encode(secret.encode()).decode().rstrip("=")}
