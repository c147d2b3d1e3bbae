"""The gateway as `millrace up` runs it: `python -m millrace.serving` over MLflow, a real index and a real model."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import httpx
import openai
import pytest

from millrace.applications import load_application
from millrace.evaluation.canaries import publish_build
from millrace.releases.declare import declare_release
from millrace.releases.published_split import publish_split, read_split
from millrace.releases.split import Split
from millrace.retrieval.chunk import refresh_chunks
from millrace.retrieval.embed import refresh_embeddings
from millrace.retrieval.index import build_index
from millrace.settings import Settings
from millrace.sources.event_log import read_events
from millrace.sources.ingest import land_documents, refine_documents
from tests.conftest import DECLARATIONS, choose_free_ports, gateway_environment
from tests.serving.parrot import EVER

pytestmark = pytest.mark.model

QUESTION = "How many task instances may the scheduler run at the same time?"


@dataclass(frozen=True)
class Whole:
    settings: Settings
    url: str
    champion: str
    challenger: str

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, mlflow_uri: str) -> Iterator[Whole]:
    """Documents, an index build, two releases and a split; the gateway is started before any of them."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "applications").mkdir()
    declaration = (DECLARATIONS / "qa.toml").read_text().replace('name = "qa"', 'name = "served"')
    (folder / "applications" / "served.toml").write_text(declaration)
    settings = Settings(
        home=folder / "home",
        applications=folder / "applications",
        gateway_port=choose_free_ports()["gateway_port"],
        mlflow_uri=mlflow_uri,
        spark_tables=frozenset(),
        completion_key="test completion key",
        pseudonym_key="test pseudonym key",
        threads=2,
    )
    application = load_application(settings, "served")
    with _process(settings) as process:
        _wait(lambda: httpx.get(f"{settings.gateway_url}/healthz", trust_env=False).status_code == 200, process, 60)
        assert httpx.get(f"{settings.gateway_url}/readyz", trust_env=False).status_code == 503
        for stage in (land_documents, refine_documents, refresh_chunks, refresh_embeddings):
            stage(settings, application, run="test")
        publish_build(settings, application, build_index(settings, application, run="test")["build"], run="test")
        champion = declare_release(settings, application, variant=None, run="test")["version"]
        challenger = declare_release(settings, application, variant="terse", run="test")["version"]
        publish_split(settings, application.name, Split(sequence=0, champion=champion))
        _wait(lambda: httpx.get(f"{settings.gateway_url}/readyz", trust_env=False).status_code == 200, process, 120)
        yield Whole(settings, settings.gateway_url, champion, challenger)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) in (0, -signal.SIGTERM)


def test_a_real_model_answers_from_real_documents_the_same_streamed_pinned_or_not(whole: Whole) -> None:
    client = whole.client()
    ask = {"messages": [{"role": "user", "content": QUESTION}], "user": "ann"}
    done = client.chat.completions.create(model="served", **ask)
    assert done.choices[0].message.content
    told = done.model_extra["millrace"]
    assert told["release_version"] == whole.champion
    assert any("parallelism" in citation["title"] for citation in told["citations"])
    assert done.usage.completion_tokens > 0
    chunks = list(client.chat.completions.create(model=f"served@{whole.champion}", stream=True, **ask))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == done.choices[0].message.content
    rated = httpx.post(f"{whole.url}/v1/feedback", json={"completion_id": done.id, "rating": 1}, trust_env=False)
    assert rated.status_code == 200
    events = [line.event for line in read_events(whole.settings.event_log("served"), *EVER)]
    assert [event.kind for event in events if event.completion_id == done.id] == ["accepted", "completed", "feedback"]


def test_a_rollout_is_followed_and_taken_back_without_a_failed_request(whole: Whole) -> None:
    client = whole.client()

    def version(user: str) -> str:
        done = client.chat.completions.create(
            model="served", user=user, messages=[{"role": "user", "content": f"{QUESTION} ({user})"}]
        )
        return done.model_extra["millrace"]["release_version"]

    before = read_split(whole.settings, "served")
    publish_split(
        whole.settings,
        "served",
        Split(sequence=1, rollout_id="r", epoch=1, champion=whole.champion, challenger=whole.challenger, share=1.0),
    )
    _wait(lambda: version("ann") == whole.challenger, None, 60)
    publish_split(whole.settings, "served", before.model_copy(update={"sequence": 2}))
    _wait(lambda: version("bob") == whole.champion, None, 60)


@contextmanager
def _process(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-m", "millrace.serving"], env=gateway_environment(settings))
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _wait(holds, process: subprocess.Popen[bytes] | None, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process is None or process.poll() is None, "the gateway is gone"
        with suppress(httpx.TransportError):
            if holds():
                return
        time.sleep(0.1)
    pytest.fail("it never came true")
