"""Exchanges as traces in a real MLflow: what they say, and that they are never in the way of an exchange."""

import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from millrace.applications import Application
from millrace.releases.retention import delete_traces
from millrace.releases.split import Split
from millrace.serving.key_store import KeyStore
from millrace.serving.metrics import Metrics
from millrace.serving.traces import WAITING, ExchangeTraces
from millrace.settings import Settings
from tests.serving.parrot import Drawer, Gateway, Parrot, Shelf, a_release, listening

pytestmark = pytest.mark.slow


def a_shelf(parrot: Parrot | None = None) -> Shelf:
    drawer = Drawer()
    return Shelf(Split(sequence=0, champion="1"), {"1": a_release(parrot or Parrot(), drawer)})


def counted(gateway: Gateway, application: str, outcome: str) -> float:
    prefix = f'millrace_traces_total{{application="{application}",outcome="{outcome}"}} '
    lines = gateway.client.get("/metrics").text.splitlines()
    return next((float(line.removeprefix(prefix)) for line in lines if line.startswith(prefix)), 0.0)


@pytest.fixture
def traced(settings: Settings, mlflow_uri: str) -> Settings:
    return settings.model_copy(update={"mlflow_uri": mlflow_uri, "trace_exchanges": True})


@pytest.fixture
def own(qa: Application) -> Application:
    return qa.model_copy(update={"name": f"traces_{uuid.uuid4().hex[:8]}"})


def test_every_exchange_is_a_trace_with_what_answered_it(traced: Settings, own: Application) -> None:
    with listening(traced, own, a_shelf(), Drawer()) as gateway:
        gateway.wait_until(gateway.ready)
        said = [gateway.ask(f"why is {n}?", model=own.name).json() for n in (1, 2, 1)]
        gateway.wait_until(lambda: counted(gateway, own.name, "sent") == 3, seconds=30)
    traces = {trace.info.tags["completion_id"]: trace for trace in _traces(traced, own)}
    assert set(traces) == {one["id"] for one in said}
    first = traces[said[0]["id"]]
    tags = first.info.tags
    assert (tags["prompt_version"], tags["release_version"], tags["index_build"]) == ("qa/1", "1", "build-1")
    assert tags["release_id"].startswith("rel-")
    (span,) = first.data.spans
    assert span.inputs == {"question": "why is 1?"}
    assert span.outputs == {"answer": said[0]["choices"][0]["message"]["content"]}
    assert span.attributes["chunk_ids"] == ["chunk-1"]
    assert first.info.token_usage["input_tokens"] == said[0]["usage"]["prompt_tokens"]
    assert first.info.token_usage["output_tokens"] == said[0]["usage"]["completion_tokens"]
    assert traces[said[2]["id"]].data.spans[0].attributes["from_cache"] is True


def test_old_traces_are_deleted_and_recent_ones_are_not(traced: Settings, own: Application) -> None:
    assert delete_traces(traced, own.name, before=datetime.now(UTC)) == 0
    with listening(traced, own, a_shelf(), Drawer()) as gateway:
        gateway.wait_until(gateway.ready)
        gateway.ask("why?", model=own.name)
        gateway.wait_until(lambda: counted(gateway, own.name, "sent") == 1, seconds=30)
    assert delete_traces(traced, own.name, before=datetime.now(UTC) - timedelta(hours=1)) == 0
    assert len(_traces(traced, own)) == 1
    assert delete_traces(traced, own.name, before=datetime.now(UTC) + timedelta(hours=1)) == 1
    assert _traces(traced, own) == []


def test_an_exchange_that_failed_is_a_trace_in_error_with_the_reason(traced: Settings, own: Application) -> None:
    parrot = Parrot()
    with listening(traced, own, a_shelf(parrot), Drawer()) as gateway:
        gateway.wait_until(gateway.ready)
        parrot.breaks_after = 2
        assert gateway.ask(model=own.name).status_code == 503
        gateway.wait_until(lambda: counted(gateway, own.name, "sent") == 1, seconds=30)
    (trace,) = _traces(traced, own)
    assert trace.info.state == "ERROR"
    assert trace.data.spans[0].status.description == "the parrot choked"


def test_an_exchange_neither_fails_nor_waits_where_mlflow_does_not_answer(
    start: Callable[..., Gateway],
) -> None:
    gateway = start(a_shelf(), trace_exchanges=True, mlflow_uri="http://127.0.0.1:9")
    started = time.perf_counter()
    for n in range(3):
        assert gateway.ask(f"why is {n}?").status_code == 200
    assert time.perf_counter() - started < 2
    gateway.wait_until(lambda: counted(gateway, "qa", "dropped") == 3)
    assert len([event for event in gateway.events() if event.kind == "completed"]) == 3


@pytest.mark.parametrize("changes", [{}, {"trace_exchanges": True, "environment": "prod"}])
def test_nothing_is_traced_unless_it_is_asked_for_and_never_outside_of_dev(
    start: Callable[..., Gateway], keyed: Settings, make: Callable[..., tuple[Any, str]], changes: dict[str, Any]
) -> None:
    _, written = make("ask", "admin", into=KeyStore(keyed.model_copy(update=changes)))
    gateway = start(a_shelf(), mlflow_uri="http://127.0.0.1:9", keys_url=keyed.keys_url, **changes)
    gateway.client.headers["Authorization"] = f"Bearer {written}"
    assert gateway.ask().status_code == 200
    assert gateway.settings.trace_exchanges == bool(changes)
    time.sleep(1.5)  # longer than traces gather
    assert counted(gateway, "qa", "dropped") == counted(gateway, "qa", "sent") == 0


def test_an_ending_gateway_sends_what_waits(traced: Settings, own: Application) -> None:
    with listening(traced, own, a_shelf(), Drawer()) as gateway:
        gateway.wait_until(gateway.ready)
        for n in range(12):
            gateway.ask(f"why is {n}?", model=own.name)
    assert len(_traces(traced, own)) == 12


def test_what_finds_no_room_is_dropped_and_counted_at_once(settings: Settings, gateway: Gateway) -> None:
    gateway.ask()
    (event,) = [event for event in gateway.events() if event.kind == "completed"]
    metrics = Metrics()
    # A sender that is held up for ever: one that never started.
    traces = ExchangeTraces(settings.model_copy(update={"trace_exchanges": True}), "qa", metrics)
    traces._thread = threading.Thread()
    for _ in range(WAITING + 7):
        traces.offer(event)
    assert metrics.traces.labels("qa", "dropped")._value.get() == 7


def _traces(settings: Settings, application: Application) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(settings.mlflow_url)
    experiment = client.get_experiment_by_name(f"{application.name}/traces")
    return client.search_traces(locations=[experiment.experiment_id])
