"""Gateways that require API keys, over HTTP and a real PostgreSQL: who comes in, who doesn't, and what it costs."""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import current_thread
from typing import Any

import httpx
import openai
import pytest

from millrace.applications import Application
from millrace.errors import SettingsError
from millrace.lakehouse.audit.key_uses import KeyUses
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_AUDIT, PLATFORM
from millrace.releases.split import Split
from millrace.serving import admission
from millrace.serving.api_keys import SCOPES, ApiKey, new_key, new_secret
from millrace.serving.gateway import create_app
from millrace.serving.key_store import KeyStore
from millrace.settings import Settings
from millrace.sources.completion_id import issue
from millrace.sources.event_log import now
from millrace.sources.pseudonym import pseudonym
from tests.serving.databases import Database
from tests.serving.parrot import Drawer, Gateway, Parrot, Shelf, a_release, listening
from tests.serving.test_gateway import error_of

pytestmark = pytest.mark.slow

Make = Callable[..., tuple[ApiKey, str]]
Open = Callable[..., Gateway]
COST = (5 * 0.02 + 5 * 0.06) / 1e6
"""Of the parrot's answer to the question that a test asks by default."""


@pytest.fixture
def opened(start: Callable[..., Gateway], keyed: Settings) -> Open:
    """Starts a gateway that requires keys; every call another one, behind the same database."""

    def run(parrot: Parrot | None = None, **changes: object) -> Gateway:
        shelf = Shelf(Split(sequence=0, champion="1"), {"1": a_release(parrot or Parrot(), Drawer())})
        given = {"gateway_keys": "required", "keys_url": keyed.keys_url, "answer_cache": False}
        return start(shelf, **given | changes)

    return run


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a gateway remembers, it forgets within a test."""
    monkeypatch.setattr(admission, "CACHE_SECONDS", 0.2)
    monkeypatch.setattr(admission, "RETRY_SECONDS", 0.05)


def shown(written: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {written}"}


def ask(gateway: Gateway, written: str, **fields: object) -> httpx.Response:
    return gateway.ask(headers=shown(written), **fields)


def code(response: httpx.Response) -> str:
    assert error_of(response)
    return response.json()["error"]["code"]


def test_each_endpoint_asks_for_its_scope_and_none_holds_another(opened: Open, make: Make) -> None:
    gateway = opened()
    rated = {"completion_id": issue(b"test completion key", "qa", now()), "rating": 1}
    endpoints: dict[str, tuple[set[str], Callable[[dict[str, str]], httpx.Response]]] = {
        "ask": ({"ask"}, lambda headers: gateway.ask(headers=headers)),
        "pin a version": ({"ask", "pin"}, lambda headers: gateway.ask(model="qa@1", headers=headers)),
        "pin the champion": ({"ask", "pin"}, lambda headers: gateway.ask(model="qa@champion", headers=headers)),
        "rate": ({"feedback"}, lambda headers: gateway.client.post("/v1/feedback", json=rated, headers=headers)),
        "list": ({"ask"}, lambda headers: gateway.client.get("/v1/models", headers=headers)),
        "look one up": ({"ask"}, lambda headers: gateway.client.get("/v1/models/qa", headers=headers)),
        "watch": ({"admin"}, lambda headers: gateway.client.get("/metrics", headers=headers)),
    }
    held = [{scope} for scope in SCOPES] + [{"ask", "pin"}, {"feedback", "admin"}, set(SCOPES)]
    for scopes in held:
        _, written = make(*scopes)
        for name, (needed, call) in endpoints.items():
            response = call(shown(written))
            assert response.status_code == (200 if needed <= scopes else 403), (name, scopes)
            if response.status_code == 403:
                assert code(response) == "insufficient_permissions"
    for _, call in endpoints.values():
        response = call({})
        assert (response.status_code, code(response)) == (401, "invalid_api_key")
        assert response.headers["WWW-Authenticate"] == "Bearer"
    for path in ("/healthz", "/readyz"):
        assert gateway.client.get(path).status_code == 200
    assert gateway.client.get("/openapi.json").status_code == 404


def test_what_is_no_valid_key_of_this_environment_is_refused_and_leaves_nothing(opened: Open, make: Make) -> None:
    key, written = make()
    gateway = opened()
    headers = {
        "no API key: send one": [{}, {"Authorization": written}, {"Authorization": f"Basic {written}"}],
        "no API key of Millrace": [shown(one) for one in ("unused", "sk-123", written[:-1], f"{written}0", "mr_é")],
        "an API key of staging, and the gateway is dev's": [shown(written.replace("mr_dev", "mr_staging"))],
        "this API key is not valid": [shown(new_key("dev")[1]), shown(new_secret("dev", key.id))],
    }
    for said, shapes in headers.items():
        for shape in shapes:
            sent = {name: value.encode() for name, value in shape.items()}
            response = gateway.client.post("/v1/chat/completions", content=b"{", headers=sent)
            assert (response.status_code, code(response)) == (401, "invalid_api_key")
            assert said in error_of(response)
    assert gateway.events() == []
    assert ask(gateway, written).status_code == 200
    assert gateway.client.get("/v1/models", headers={"authorization": f"bearer  {written}"}).status_code == 200


def test_a_revoked_key_is_out_as_soon_as_it_is_looked_up_again(
    opened: Open, make: Make, store: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, written = make()
    monkeypatch.setattr(admission, "CACHE_SECONDS", 2.0)
    gateway = opened()
    assert ask(gateway, written).status_code == 200
    store.revoke(key.id, actor="bob", reason="lost")
    assert ask(gateway, written).status_code == 200
    gateway.wait_until(lambda: ask(gateway, written).status_code == 401, seconds=5)
    assert f"API key {key.id} was revoked on" in error_of(ask(gateway, written))


def test_an_expired_key_is_out_at_that_moment(opened: Open, make: Make) -> None:
    gateway = opened()
    _, written = make(expires_at=now() + timedelta(seconds=1.5))
    assert ask(gateway, written).status_code == 200
    gateway.wait_until(lambda: ask(gateway, written).status_code == 401, seconds=5)
    assert "expired on" in error_of(ask(gateway, written))


def test_a_new_secret_is_valid_at_once_and_the_one_before_as_long_as_was_said(
    opened: Open, make: Make, store: KeyStore
) -> None:
    key, first = make()
    gateway = opened()
    assert ask(gateway, first).status_code == 200
    _, second = store.rotate(key.id, overlap=timedelta(seconds=1.5), actor="bob")
    assert ask(gateway, second).status_code == 200
    assert ask(gateway, first).status_code == 200
    gateway.wait_until(lambda: ask(gateway, first).status_code == 401, seconds=5)
    assert ask(gateway, second).status_code == 200


def test_a_key_for_some_applications_reaches_no_other(opened: Open, make: Make) -> None:
    gateway = opened()
    _, ours = make("ask", "feedback", applications=["qa", "later"])
    _, theirs = make("ask", "feedback", "pin", applications=["other"])
    assert ask(gateway, ours).status_code == 200
    rated = issue(b"test completion key", "qa", now())
    assert gateway.rate(rated).status_code == 401
    for response in (
        ask(gateway, theirs),
        gateway.client.post("/v1/feedback", json={"completion_id": rated, "rating": 1}, headers=shown(theirs)),
    ):
        assert (response.status_code, code(response)) == (403, "insufficient_permissions")
        assert "is for other only" in error_of(response)
    listed = {
        written: [one["id"] for one in gateway.client.get("/v1/models", headers=shown(written)).json()["data"]]
        for written in (ours, theirs)
    }
    assert listed == {ours: ["qa"], theirs: []}
    assert gateway.client.get("/v1/models/qa", headers=shown(theirs)).status_code == 404
    assert gateway.client.get("/v1/models/qa@1", headers=shown(ours)).status_code == 404


def test_two_gateways_share_a_keys_rate(opened: Open, make: Make) -> None:
    gateways = (opened(), opened())
    key, written = make(requests_per_minute=5)

    def call(number: int) -> httpx.Response:
        return gateways[number % 2].client.get("/v1/models", headers=shown(written))

    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(call, range(12)))
    assert sum(answer.status_code == 200 for answer in answers) == 5
    refused = [answer for answer in answers if answer.status_code != 200]
    assert {(answer.status_code, code(answer)) for answer in refused} == {(429, "rate_limit_exceeded")}
    assert all(1 <= int(answer.headers["Retry-After"]) <= 13 for answer in refused)
    assert f"API key {key.id} may make 5 requests a minute; come back in" in error_of(refused[0])


def test_two_gateways_share_a_keys_budget(opened: Open, make: Make, store: KeyStore, database: Database) -> None:
    gateways = (opened(), opened())
    key, written = make("ask", "feedback", monthly_budget_usd=2.5 * COST)
    statuses = [ask(gateways[number % 2], written).status_code for number in range(4)]
    assert statuses == [200, 200, 200, 429]
    refused = ask(gateways[0], written)
    assert (code(refused), refused.json()["error"]["type"]) == ("insufficient_quota", "insufficient_quota")
    assert f"API key {key.id} has spent its $1e-06 of this month (UTC); ann can ask for more" in error_of(refused)
    assert store.find(key.id).month_usd == pytest.approx(3 * COST)
    # Only what costs is refused.
    rated = {"completion_id": issue(b"test completion key", "qa", now()), "rating": 1}
    assert gateways[0].client.post("/v1/feedback", json=rated, headers=shown(written)).status_code == 200
    database.run("update api_keys.keys set month = month - interval '1 month'")
    assert ask(gateways[1], written).status_code == 200


def test_who_leaves_early_pays_for_what_was_computed_and_a_cached_answer_is_free(
    opened: Open, make: Make, store: KeyStore
) -> None:
    parrot = Parrot()
    gateway = opened(parrot, answer_cache=True)
    key, written = make()
    for _ in range(3):
        assert ask(gateway, written).status_code == 200
    assert store.find(key.id).total_usd == pytest.approx(COST)
    parrot.pause = 0.05
    body = {"model": "qa", "messages": [{"role": "user", "content": "word " * 400}], "stream": True}
    with gateway.client.stream("POST", "/v1/chat/completions", json=body, headers=shown(written)) as response:
        next(response.iter_lines())
    gateway.wait_until(lambda: "failed" in [event.kind for event in gateway.events()])
    spent = store.find(key.id).total_usd - COST
    assert 400 * 0.02e-6 < spent < 600 * 0.02e-6 + 200 * 0.06e-6


def test_while_the_database_is_away_known_keys_come_in_and_nobody_else(
    opened: Open, make: Make, store: KeyStore, database: Database, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = opened()
    key, known = make(requests_per_minute=5, monthly_budget_usd=5.5 * COST)
    _, unknown = make()
    assert ask(gateway, known).status_code == 200
    database.go_away()
    for response in (ask(gateway, unknown), ask(gateway, new_key("dev")[1])):
        assert (response.status_code, code(response)) == (503, "keys_unavailable")
        assert response.headers["Retry-After"] == "2"
    assert ask(gateway, new_secret("dev", key.id)).status_code == 401
    time.sleep(0.3)
    # Past its requests, which nobody can count now; but not past its budget.
    statuses = [ask(gateway, known).status_code for _ in range(7)]
    assert statuses == [200] * 5 + [429] * 2
    assert store_total(database, key) == pytest.approx(COST)
    database.come_back()
    gateway.wait_until(lambda: ask(gateway, unknown).status_code == 200)
    assert store.find(key.id).total_usd == pytest.approx(6 * COST)

    monkeypatch.setattr(admission, "GRACE_SECONDS", 0.3)
    database.go_away()
    gateway.wait_until(lambda: ask(gateway, unknown).status_code == 503)
    database.come_back()


def store_total(database: Database, key: ApiKey) -> float:
    """As the database says it while it is away for the gateway."""
    database.come_back()
    ((total,),) = database.run(f"select total_usd from api_keys.keys where id = '{key.id}'")
    database.go_away()
    return float(total)


def test_a_gateway_begins_without_the_database_and_answers_when_it_is_there(
    opened: Open, make: Make, database: Database, quick: None
) -> None:
    _, written = make()
    database.go_away()
    gateway = opened()
    assert gateway.client.get("/healthz").status_code == 200
    assert ask(gateway, written).status_code == 503
    database.come_back()
    gateway.wait_until(lambda: ask(gateway, written).status_code == 200)


def test_a_database_that_refuses_is_no_reason_to_let_anybody_in(
    opened: Open, make: Make, database: Database, quick: None
) -> None:
    gateway = opened()
    _, written = make(requests_per_minute=5)
    assert ask(gateway, written).status_code == 200
    database.run("alter table api_keys.keys rename column rested_at to gone")
    assert ask(gateway, written).status_code == 503


def test_what_was_owed_when_a_gateway_ends_is_in_the_database(
    keyed: Settings, qa: Application, make: Make, store: KeyStore, database: Database
) -> None:
    key, written = make()
    shelf = Shelf(Split(sequence=0, champion="1"), {"1": a_release(Parrot(), Drawer())})
    with listening(keyed, qa, shelf, Drawer()) as gateway:
        gateway.wait_until(gateway.ready)
        assert ask(gateway, written).status_code == 200
        database.go_away()
        assert gateway.ask("another question", headers=shown(written)).status_code == 200
        database.come_back()
    assert store.find(key.id).total_usd > COST


def test_the_official_client_knows_each_refusal_and_tries_only_those_again_that_pass(opened: Open, make: Make) -> None:
    gateway, sent = opened(), []
    transport = httpx.Client(trust_env=False, event_hooks={"request": [sent.append]})

    def create(written: str, model: str = "qa", **options: object) -> str:
        client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=written, http_client=transport, **options)
        done = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "why is that?"}])
        return done.choices[0].message.content

    _, written = make("ask", monthly_budget_usd=0.5 * COST)
    _, slow = make("ask", requests_per_minute=1)
    with pytest.raises(openai.AuthenticationError, match="not valid") as unauthorised:
        create(new_key("dev")[1])
    with pytest.raises(openai.PermissionDeniedError, match="this needs pin") as denied:
        create(written, "qa@1")
    assert create(written) == create(slow) == "you asked why is that?"
    with pytest.raises(openai.RateLimitError, match="has spent") as spent:
        create(written)
    assert len(sent) == 5
    with pytest.raises(openai.RateLimitError, match="may make 1 requests a minute") as often:
        create(slow, max_retries=0)
    transport.close()
    assert [error.value.code for error in (unauthorised, denied, spent, often)] == [
        "invalid_api_key", "insufficient_permissions", "insufficient_quota", "rate_limit_exceeded",
    ]  # fmt: skip


def test_no_secret_is_in_a_log_an_event_a_table_or_an_answer(
    opened: Open, make: Make, store: KeyStore, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    gateway = opened()
    key, first = make("ask", "feedback", "admin", requests_per_minute=100)
    _, second = store.rotate(key.id, overlap=timedelta(hours=1), actor="bob")
    revoked, third = make()
    store.revoke(revoked.id, actor="bob", reason="lost")
    answers = [ask(gateway, written, model=model) for written in (first, second, third) for model in ("qa", "qa@1")]
    answers += [ask(gateway, f"{first}0"), gateway.client.get("/metrics", headers=shown(second))]
    assert {answer.status_code for answer in answers} == {200, 401, 403}
    database.go_away()
    ask(gateway, new_key("dev")[1])
    database.come_back()
    ((rows,),) = database.run("select string_agg(k::text, ' ') from api_keys.keys k")
    places = [caplog.text, rows, *(answer.text for answer in answers), *(line.text for line in gateway.lines())]
    assert f"API key {key.id} created by bob" in caplog.text
    for written in (first, second, third):
        secret = written.rsplit("_", 1)[1]
        assert not [place for place in places if secret[:20] in place]


def test_a_refusal_is_told_once_a_minute_and_names_the_key(
    opened: Open, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = opened()
    key, written = make("ask")
    caplog.set_level(logging.INFO, "millrace.keys")
    caplog.clear()
    for _ in range(3):
        ask(gateway, written, model="qa@1")
        ask(gateway, new_key("dev")[1])
        ask(gateway, new_secret("dev", key.id))
    told = [record.getMessage() for record in caplog.records if record.name == "millrace.keys"]
    assert told == [
        f"dev: API key {key.id} refused by the gateway: API key {key.id} has the scopes ask, and this needs pin; use a "
        "key that has it",
        "dev: API key unknown refused by the gateway: this API key is not valid",
        f"dev: API key {key.id} refused by the gateway: this API key is not valid",
    ]


def test_the_user_is_whom_the_caller_names_not_the_key(opened: Open, make: Make) -> None:
    gateway = opened()
    key, written = make()
    completion_id = ask(gateway, written, user="ann@example.org").json()["id"]
    accepted, _ = gateway.events(completion_id)
    assert accepted.user == pseudonym(b"test pseudonym key", "ann@example.org")
    assert key.id not in "".join(line.text for line in gateway.lines())


def test_without_a_place_for_keys_a_gateway_that_requires_them_is_not_made(settings: Settings, qa: Application) -> None:
    for changes in ({"gateway_keys": "required"}, {"environment": "prod"}, {"bind": "0.0.0.0"}):
        with pytest.raises(SettingsError, match="MILLRACE_KEYS_URL is empty"):
            create_app(settings.model_copy(update=changes), [qa], lambda *_: Shelf())


def test_in_dev_on_this_machine_any_key_and_none_will_do(gateway: Gateway, settings: Settings) -> None:
    assert not settings.keys_required
    for headers in ({}, shown("anything"), shown(new_key("prod")[1])):
        assert gateway.ask(headers=headers, model="qa@1").status_code == 200
    assert gateway.client.get("/metrics").status_code == 200


def test_what_became_of_a_key_and_what_it_was_used_for_is_in_the_audit_trail(
    keyed: Settings,
    qa: Application,
    make: Make,
    store: KeyStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    key, written = make("ask")
    gave = store.rotate(key.id, overlap=timedelta(hours=1), actor="bob")[1]
    drawer = Drawer()
    shelf = Shelf(Split(sequence=0, champion="1"), {"1": a_release(Parrot(), drawer)})
    monkeypatch.setattr(admission, "LOOK_SECONDS", 0.05)
    threads = set()
    flush = KeyUses.flush
    monkeypatch.setattr(
        KeyUses, "flush", lambda *told, **more: threads.add(current_thread().name) or flush(*told, **more)
    )
    with listening(keyed, qa, shelf, drawer) as gateway:
        gateway.wait_until(gateway.ready)
        assert [ask(gateway, one).status_code for one in (written, gave, gave)] == [200, 200, 200]
        assert gateway.client.get("/metrics", headers=shown(gave)).status_code == 403
        assert ask(gateway, "sk-123").status_code == 401
        assert trail(keyed, "key_use") == []
        head = keyed.home / "audit" / f"{keyed.environment}.json"
        known = head.read_bytes()
        head.write_text("what nobody can read")
        monkeypatch.setattr(admission, "now", lambda: now() + timedelta(hours=1))
        assert ask(gateway, gave).status_code == 200
        gateway.wait_until(lambda: "the uses of API keys wait for the audit trail" in caplog.text)
        head.write_bytes(known)
        over = Counter({(key.id, "ask"): 4, (key.id, "refused"): 1, ("unknown", "refused"): 1})
        gateway.wait_until(lambda: uses(keyed) == over)
        assert threads == {"key uses"}, "no request waits for the lake"
        monkeypatch.setattr(admission, "now", now)
        assert gateway.client.get("/v1/models", headers=shown(gave)).status_code == 200
        assert uses(keyed) == over
    assert uses(keyed) == over + Counter({(key.id, "ask"): 1})
    store.revoke(key.id, actor="bob", reason="ann@example.org left")
    kept = [(entry["resource"], entry["actor"], entry["outcome"]) for entry in trail(keyed, "key")]
    assert kept == [(f"key/{key.id}", "person/bob", outcome) for outcome in ("created", "rotated", "revoked")]


def trail(settings: Settings, action: str) -> list[dict[str, Any]]:
    entries = Lake.of(settings, PLATFORM).read(OPS_AUDIT).sort_by("sequence").to_pylist()
    return [entry for entry in entries if entry["action"] == action]


def uses(settings: Settings) -> Counter[tuple[str, str]]:
    """Of each key, by outcome."""
    counts: Counter[tuple[str, str]] = Counter()
    for entry in trail(settings, "key_use"):
        counts[entry["resource"].removeprefix("key/"), entry["outcome"]] += json.loads(entry["details"])["uses"]
    return counts
