"""The gateway over HTTP: what it promises to callers, and what it leaves on disk."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from fastapi.testclient import TestClient

from millrace.applications import Application
from millrace.errors import ReleaseError, SettingsError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_EXCHANGES, SILVER_FEEDBACK
from millrace.releases.split import Split, assign
from millrace.serving.gateway import create_app
from millrace.settings import Settings
from millrace.sources.completion_id import issue, verify
from millrace.sources.event_log import CLIENT_LEFT, now
from millrace.sources.pseudonym import pseudonym
from tests.serving.parrot import Drawer, Gateway, Parrot, Shelf, a_release

Start = Callable[..., Gateway]


def error_of(response: httpx.Response) -> str:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return error["message"]


def test_the_official_client_gets_an_answer_with_release_build_citations_and_usage(gateway: Gateway) -> None:
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0)
    done = client.chat.completions.create(
        model="qa", user="ann", messages=[{"role": "user", "content": "why is that?"}]
    )
    assert done.choices[0].message.content == "you asked why is that?"
    assert done.choices[0].finish_reason == "stop"
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (5, 5, 10)
    told = done.model_extra["millrace"]
    assert done.system_fingerprint == f"{told['release_id']}:build-1"
    assert told["citations"] == [{"chunk_id": "chunk-1", "title": "A title", "uri": "file:///a"}]
    assert (told["release_version"], told["arm"], told["from_cache"]) == ("1", None, False)
    assert verify(b"test completion key", done.id).application == "qa"


def test_the_official_client_streams_the_same_answer_and_the_last_chunk_says_the_rest(gateway: Gateway) -> None:
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0)
    chunks = list(
        client.chat.completions.create(
            model="qa@champion",
            messages=[{"role": "user", "content": [{"type": "text", "text": "why is that?"}]}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == "you asked why is that?"
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "stop"
    assert [chunk.usage.total_tokens for chunk in chunks if chunk.usage] == [10], "clients add them up"
    assert chunks[-1].choices == []
    assert chunks[-1].model_extra["millrace"]["index_build"] == "build-1"
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_asynchronous_client_works_too(gateway: Gateway) -> None:
    import asyncio

    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="unused") as client:
            done = await client.chat.completions.create(
                model="qa", messages=[{"role": "user", "content": "why is that?"}]
            )
            return done.choices[0].message.content or ""

    assert asyncio.run(ask()) == "you asked why is that?"


def test_an_exchange_is_accepted_and_completed_on_disk_and_holds_no_name(gateway: Gateway, settings: Settings) -> None:
    body = gateway.ask(user="ann@example.org", headers={"X-Millrace-Simulated": "true"}).json()
    accepted, completed = gateway.events(body["id"])
    assert (accepted.kind, completed.kind) == ("accepted", "completed")
    assert completed.answer == "you asked why is that?"
    assert completed.citations == ("chunk-1",)
    assert completed.user == pseudonym(b"test pseudonym key", "ann@example.org")
    assert accepted.simulated
    assert completed.simulated
    assert completed.cost_usd == pytest.approx((5 * 0.02 + 5 * 0.06) / 1e6)
    assert "ann@example.org" not in "".join(line.text for line in gateway.lines())


def test_who_names_no_user_is_a_new_user_each_time_and_a_header_names_one_too(start: Start) -> None:
    drawer = Drawer()
    gateway = start(Shelf(Split(sequence=0, champion="1"), {"1": a_release(Parrot(), drawer)}), answer_cache=False)
    for fields in ({"user": None}, {"user": None}, {"user": None, "headers": {"X-Millrace-User": "bob"}}):
        assert gateway.ask(**fields).status_code == 200
    users = [event.user for event in gateway.events() if event.kind == "accepted"]
    assert len(set(users)) == 3
    assert users[2] == pseudonym(b"test pseudonym key", "bob")
    assert gateway.ask(user="ann", headers={"X-Millrace-User": "bob"}).status_code == 400


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"temperature": 0.7}, "temperature"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"stop": ["x"]}, "stop"),
        ({"seed": 1}, "seed"),
        ({"surprise": True}, "surprise"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}, "messages[0].role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x" * 4001}]}, "messages"),
        ({"user": ""}, "user"),
        ({"user": 3}, "user"),
        ({"stream": "yes"}, "stream"),
        ({"headers": {"X-Millrace-Simulated": "perhaps"}}, "simulated"),
    ],
)
def test_what_would_change_the_answer_is_refused_with_one_sentence(unmoved: Gateway, fields: dict, param: str) -> None:
    response = unmoved.ask(**fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert error_of(response)


def test_values_that_ask_for_nothing_special_are_let_through(gateway: Gateway) -> None:
    assert gateway.ask(
        n=1, temperature=None, tools=[], response_format={"type": "text"}, metadata={"a": "b"}
    ).is_success


def test_bodies_that_are_no_request_are_refused(unmoved: Gateway) -> None:
    post = lambda body: unmoved.client.post("/v1/chat/completions", content=body)  # noqa: E731
    assert post(b"{").status_code == 400
    assert post(b"[]").status_code == 400
    assert post(b'{"model":"qa","messages":[{"role":"user","content":"\\ud800"}]}').status_code == 400
    assert post(b"x" * (2 << 20)).status_code == 413
    assert unmoved.client.get("/v1/nothing").status_code == 404
    assert error_of(unmoved.client.get("/v1/chat/completions"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "status"), [("other", 404), ("qa@99", 404), ("qa@challenger", 404), ("qa@1", 200), ("qa@champion", 200)]
)
def test_models_are_found_or_refused_by_name(gateway: Gateway, model: str, status: int) -> None:
    response = gateway.ask(model=model)
    assert response.status_code == status
    if status == 404:
        assert response.json()["error"]["code"] == "model_not_found"


def test_models_are_listed_with_the_time_since_they_can_be_asked(gateway: Gateway) -> None:
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="unused")
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) == {"qa", "qa@champion", "qa@1"}
    assert 0 <= time.time() - listed["qa"].created < 60
    assert client.models.retrieve("qa@champion").owned_by == "millrace"


def test_an_identical_question_is_answered_from_the_cache_and_is_an_exchange_of_its_own(start: Start) -> None:
    parrot, drawer = Parrot(), Drawer()
    gateway = start(Shelf(Split(sequence=0, champion="1"), {"1": a_release(parrot, drawer)}), drawer)
    first, again, other = gateway.ask(" why?"), gateway.ask("why? ", user="bob"), gateway.ask("how?")
    assert [one.json()["millrace"]["from_cache"] for one in (first, again, other)] == [False, True, False]
    assert first.json()["choices"] == again.json()["choices"]
    assert first.json()["id"] != again.json()["id"]
    (hit,) = [event for event in gateway.events(again.json()["id"]) if event.kind == "completed"]
    assert (hit.from_cache, hit.cost_usd) == (True, 0)
    drawer.published = "build-2"
    assert not gateway.ask("why?").json()["millrace"]["from_cache"]
    streamed = gateway.ask("why?", stream=True).text
    assert '"from_cache": true' in streamed


def test_releases_that_are_compared_are_both_computed(start: Start) -> None:
    # Most users meet the champion: from memory it would answer more of them, and faster.
    split = Split(sequence=1, rollout_id="r", epoch=1, champion="1", challenger="2", share=0.5, salt="s")
    gateway = start(Shelf(split, {one: a_release(Parrot(), Drawer()) for one in ("1", "2")}))
    told = [gateway.ask(user=user).json()["millrace"] for user in ("ann", "bob", "cho", "dan", "eve") * 2]
    assert {one["arm"] for one in told} == {"champion", "challenger"}
    assert not any(one["from_cache"] for one in told)


def test_without_the_setting_nothing_is_cached(start: Start) -> None:
    gateway = start(Shelf(Split(sequence=0, champion="1"), {"1": a_release(Parrot(), Drawer())}), answer_cache=False)
    assert [gateway.ask().json()["millrace"]["from_cache"] for _ in range(2)] == [False, False]


def a_rollout(challenger: Parrot | Exception, share: float = 0.5, champion: Parrot | None = None) -> Shelf:
    drawer = Drawer()
    second = challenger if isinstance(challenger, Exception) else a_release(challenger, drawer, prompt_version="2")
    return Shelf(
        Split(sequence=3, rollout_id="r", epoch=2, champion="1", challenger="2", share=share, salt="s"),
        {"1": a_release(champion or Parrot(), drawer), "2": second},
    )


def test_the_split_decides_by_user_and_every_event_says_how(start: Start) -> None:
    shelf = a_rollout(Parrot(prefix="i say"))
    gateway = start(shelf)
    for number in range(20):
        user = f"user {number}"
        body = gateway.ask(user=user).json()
        expected = assign(shelf.published, pseudonym(b"test pseudonym key", user))
        assert (body["millrace"]["arm"], body["millrace"]["release_version"]) == (expected.arm, expected.version)
        for event in gateway.events(body["id"]):
            assert (event.rollout_id, event.epoch, event.assignment_probability) == ("r", 2, 0.5)
            assert (event.arm, event.pinned) == (expected.arm, False)
    pinned = gateway.ask(model="qa@challenger").json()
    assert pinned["choices"][0]["message"]["content"].startswith("i say")
    assert [(event.arm, event.pinned, event.rollout_id) for event in gateway.events(pinned["id"])] == [
        (None, True, None)
    ] * 2


@pytest.mark.parametrize(
    ("challenger", "why"),
    [
        (ReleaseError("version 2 has no weights"), "release 2 can't be loaded: version 2 has no weights"),
        (RuntimeError("segmentation"), "release 2 can't be loaded: segmentation"),
    ],
)
def test_if_the_challenger_cannot_be_loaded_the_champion_answers_and_the_failure_is_evidence(
    start: Start, challenger: Exception, why: str
) -> None:
    gateway = start(a_rollout(challenger, share=1.0))
    body = gateway.ask().json()
    assert body["choices"][0]["message"]["content"] == "you asked why is that?"
    assert (body["millrace"]["arm"], body["millrace"]["release_version"]) == ("challenger", "1")
    _, completed = gateway.events(body["id"])
    assert (completed.fell_back, completed.arm, completed.error) == (True, "challenger", why)


@pytest.mark.parametrize("stream", [False, True])
def test_if_the_challenger_breaks_the_champion_answers_and_the_failure_is_evidence(start: Start, stream: bool) -> None:
    challenger = Parrot()
    gateway = start(a_rollout(challenger, share=1.0))
    challenger.breaks_after = 0
    response = gateway.ask(stream=stream)
    assert response.status_code == 200
    accepted, completed = gateway.events()
    assert (accepted.release_version, completed.release_version) == ("2", "1")
    assert (completed.fell_back, completed.arm, completed.error) == (True, "challenger", "the parrot choked")
    assert (
        'millrace_fallbacks_total{application="qa",arm="challenger",version="2"} 1.0'
        in gateway.client.get("/metrics").text
    )


def test_a_challenger_that_breaks_after_its_first_word_ends_the_stream_with_an_error(start: Start) -> None:
    challenger = Parrot()
    gateway = start(a_rollout(challenger, share=1.0))
    challenger.breaks_after = 2
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0)
    stream = client.chat.completions.create(model="qa", messages=[{"role": "user", "content": "why?"}], stream=True)
    with pytest.raises(openai.APIError, match="the parrot choked"):
        list(stream)
    _, failed = gateway.events()
    assert (failed.kind, failed.error, failed.answer, failed.arm) == (
        "failed",
        "the parrot choked",
        "you asked",
        "challenger",
    )


def test_a_champion_that_breaks_is_a_503_and_a_failed_exchange(start: Start) -> None:
    parrot = Parrot()
    gateway = start(Shelf(Split(sequence=0, champion="1"), {"1": a_release(parrot, Drawer())}))
    parrot.breaks_after = 0
    response = gateway.ask()
    assert (response.status_code, error_of(response)) == (503, "the parrot choked")
    assert [event.kind for event in gateway.events()] == ["accepted", "failed"]


def test_a_client_that_leaves_in_the_stream_cancels_it_and_the_log_says_so(start: Start) -> None:
    parrot = Parrot()
    gateway = start(Shelf(Split(sequence=0, champion="1"), {"1": a_release(parrot, Drawer())}))
    parrot.pause = 0.05
    body = {"model": "qa", "messages": [{"role": "user", "content": "word " * 400}], "stream": True}
    with gateway.client.stream("POST", "/v1/chat/completions", json=body) as response:
        next(response.iter_lines())
    gateway.wait_until(lambda: len(gateway.events()) == 2)
    _, failed = gateway.events()
    assert (failed.kind, failed.error) == ("failed", CLIENT_LEFT)
    assert len(failed.answer.split()) < 200
    assert 'outcome="left"' in gateway.client.get("/metrics").text


def test_feedback_is_acknowledged_when_it_is_on_disk(gateway: Gateway) -> None:
    completion_id = gateway.ask().json()["id"]
    response = gateway.rate(completion_id, 0.25, comment="meh", correction="because")
    assert response.status_code == 200
    said = gateway.events(completion_id)[-1]
    assert said.event_id == response.json()["id"]
    assert (said.rating, said.comment, said.correction, said.simulated) == (0.25, "meh", "because", False)


def test_any_replica_takes_feedback_on_the_answer_of_another(gateway: Gateway) -> None:
    assert gateway.rate(issue(b"test completion key", "qa", now())).status_code == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ('{"completion_id": %s, "rating": NaN}', 422),
        ('{"completion_id": %s, "rating": 1.01}', 422),
        ('{"completion_id": %s, "rating": -0.01}', 422),
        ('{"completion_id": %s, "rating": 1e999}', 422),
        ('{"completion_id": %s, "rating": true}', 422),
        ('{"completion_id": %s, "rating": "1"}', 422),
        ('{"completion_id": %s}', 422),
        ('{"completion_id": %s, "rating": 1, "stars": 5}', 422),
        ('{"completion_id": %s, "rating": 1, "comment": "' + "x" * 4001 + '"}', 422),
        ('{"completion_id": %s, "rating": 1, "comment": 5}', 422),
        ('{"completion_id": %s, "rating": 1, "comment": "' + "x" * (1 << 20) + '"}', 413),
        ('{"rating": 1}', 422),
        ('{"completion_id": 7, "rating": 1}', 422),
        ("never mind", 422),
        ('{"completion_id": "chatcmpl-forged", "rating": 1}', 403),
        ('{"completion_id": "", "rating": 1}', 403),
    ],
)
def test_bad_feedback_is_refused_with_the_right_status_and_leaves_nothing(
    unmoved: Gateway, body: str, status: int
) -> None:
    completion_id = issue(b"test completion key", "qa", now())
    body = body % json.dumps(completion_id) if "%s" in body else body
    response = unmoved.client.post("/v1/feedback", content=body)
    assert response.status_code == status
    assert error_of(response)


def test_feedback_on_an_application_that_is_gone_is_a_404(unmoved: Gateway) -> None:
    assert unmoved.rate(issue(b"test completion key", "gone", now())).status_code == 404


@pytest.mark.slow
def test_when_too_many_wait_a_caller_is_told_to_come_back(start: Start) -> None:
    parrot = Parrot()
    shelf = Shelf(Split(sequence=0, champion="1"), {"1": a_release(parrot, Drawer())})
    gateway = start(shelf, gateway_workers=1, gateway_queue=1)
    parrot.pause = 0.1
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda number: gateway.ask(f"question {number}"), range(6)))
    assert sorted({answer.status_code for answer in answers}) == [200, 429]
    assert sum(answer.status_code == 200 for answer in answers) == 2
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["Retry-After"] == "1"
    assert error_of(refused)
    parrot.pause = 0
    assert gateway.ask().status_code == 200


def test_a_full_disk_is_a_503_and_nothing_was_acknowledged(start: Start, full_disk: Path) -> None:
    shelf = Shelf(Split(sequence=0, champion="1"), {"1": a_release(Parrot(), Drawer())})
    gateway = start(shelf, home=full_disk / "home")
    completion_id = gateway.ask().json()["id"]
    answered, rated = [completion_id], 0
    while (response := gateway.ask("x" * 3000)).status_code == 200:
        answered.append(response.json()["id"])
    assert response.status_code == 503
    assert "No space left on device; free space" in error_of(response)
    while (response := gateway.rate(completion_id, comment="y" * 2000)).status_code == 200:
        rated += 1
    assert response.status_code == 503
    assert "No space left on device" in error_of(response)
    events = gateway.events()
    assert sorted(event.completion_id for event in events if event.kind == "completed") == sorted(answered)
    assert sum(event.kind == "feedback" for event in events) == rated
    assert gateway.client.get("/healthz").status_code == 200


def test_a_gateway_starts_before_there_is_a_registry_a_release_or_an_index_and_says_what_is_missing(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millrace.serving.traffic.RETRY_SECONDS", 0.05)
    drawer = Drawer(None)
    shelf = Shelf(None, {"1": a_release(Parrot(), drawer)}, reachable=False)
    gateway = start(shelf, drawer, ready=False)

    def says(reason: str) -> Callable[[], bool]:
        return lambda: reason in gateway.client.get("/readyz").text

    gateway.wait_until(says("MLflow at http://nowhere does not answer"))
    assert gateway.client.get("/healthz").status_code == 200
    assert gateway.client.get("/readyz").status_code == 503
    response = gateway.ask()
    assert (response.status_code, response.headers["Retry-After"]) == (503, "2")
    assert "is not ready" in error_of(response)
    shelf.reachable = True
    gateway.wait_until(says("no release of qa is champion yet"))
    shelf.published = Split(sequence=0, champion="1")
    gateway.wait_until(says("no index build is published yet"))
    drawer.published = "build-1"
    gateway.wait_until(gateway.ready)
    assert gateway.ask().status_code == 200


def test_an_application_without_a_release_keeps_nobody_from_one_that_has_its_own(
    settings: Settings, qa: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millrace.serving.traffic.POLL_SECONDS", 0.05)
    drawer = Drawer()
    shelves = {name: Shelf(None, {"1": a_release(Parrot(), drawer)}) for name in ("qa", "second")}
    second = qa.model_copy(update={"name": "second"})
    app = create_app(settings, [qa, second], lambda _, application: shelves[application.name])
    with TestClient(app) as client:

        def becomes(status: int, **states: str) -> None:
            end = time.monotonic() + 10
            while True:
                response = client.get("/readyz")
                told = response.json()["applications"]
                if response.status_code == status and all(said in told[name] for name, said in states.items()):
                    return
                assert time.monotonic() < end, response.text
                time.sleep(0.01)

        becomes(503, qa="no release of qa is champion yet", second="no release of second is champion yet")
        shelves["qa"].published = Split(sequence=0, champion="1")
        becomes(200, qa="ready", second="no release of second is champion yet")
        shelves["second"].published = Split(sequence=0, champion="gone")
        becomes(200, qa="ready", second="the champion, version gone, can't be loaded")
    with TestClient(create_app(settings, [qa, second], lambda _, application: shelves[application.name])) as client:
        becomes(503, qa="ready", second="the champion, version gone, can't be loaded")


def test_metrics_tell_exchanges_seconds_and_tokens_by_application_arm_and_version(gateway: Gateway) -> None:
    completion_id = gateway.ask().json()["id"]
    gateway.rate(completion_id)
    gateway.ask(n=2)
    text = gateway.client.get("/metrics").text
    labels = 'application="qa",arm="none"'
    assert f'millrace_exchanges_total{{{labels},outcome="completed",version="1"}} 1.0' in text
    assert f'millrace_exchange_seconds_count{{{labels},version="1"}} 1.0' in text
    assert f'millrace_tokens_total{{{labels},kind="completion",version="1"}} 5.0' in text
    assert 'millrace_feedback_total{application="qa"} 1.0' in text
    assert 'millrace_refusals_total{status="400"} 1.0' in text


def test_without_its_keys_a_gateway_is_not_made(settings: Settings, qa) -> None:
    for key in ("completion_key", "pseudonym_key"):
        bare = Settings(**{**settings.model_dump(), key: ""})
        with pytest.raises(SettingsError, match=f"MILLRACE_{key.upper()} is empty"):
            create_app(bare, [qa], lambda *_: Shelf())


@pytest.mark.stack
def test_what_the_gateway_answered_and_took_reaches_silver_once(gateway: Gateway, ingest, lake: Lake) -> None:
    ids = [
        gateway.ask(f"question {number}", headers={"X-Millrace-Simulated": "true"}).json()["id"] for number in range(5)
    ]
    for number, completion_id in enumerate(ids[:3]):
        gateway.rate(completion_id, number / 2)
        gateway.rate(completion_id, number / 2)
    ingest()
    exchanges = lake.read(SILVER_EXCHANGES).to_pylist()
    assert sorted(row["completion_id"] for row in exchanges) == sorted(ids)
    assert {row["state"] for row in exchanges} == {"completed"}
    assert all(row["simulated"] for row in exchanges)
    feedback = {row["completion_id"]: row for row in lake.read(SILVER_FEEDBACK).to_pylist()}
    assert {completion_id: row["rating"] for completion_id, row in feedback.items()} == {
        completion_id: number / 2 for number, completion_id in enumerate(ids[:3])
    }
    assert all(row["simulated"] for row in feedback.values())
