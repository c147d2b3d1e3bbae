"""Two gateway processes behind one PostgreSQL, one registry and one home are one gateway to whoever asks."""

import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import httpx
import mlflow
import pytest

from millrace.applications import Application, Rollout
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_EXCHANGES, SILVER_FEEDBACK
from millrace.releases.published_split import read_split
from millrace.releases.registry import RELEASE_TAG
from millrace.releases.split import assign
from millrace.rollout import people
from millrace.rollout.controller import tick
from millrace.serving.api_keys import ApiKey
from millrace.settings import PROJECT, Settings
from millrace.sources.event_log import read_events
from millrace.sources.feedback import land_events, refine_feedback
from millrace.sources.pseudonym import pseudonym
from tests.conftest import free_ports_in_a_row, gateway_environment
from tests.serving.parrot import EVER
from tests.serving.test_admission import COST

pytestmark = pytest.mark.long

USERS = [f"user {number}" for number in range(30)]


@dataclass(frozen=True)
class Replicas:
    settings: Settings
    application: Application
    processes: tuple["subprocess.Popen[bytes]", ...]
    clients: tuple[httpx.Client, ...]
    """One for each gateway."""

    def ask(self, at: int, key: str, user: str = "ann") -> httpx.Response:
        body = {
            "model": self.application.name,
            "user": user,
            "messages": [{"role": "user", "content": "why is that?"}],
        }
        return self.clients[at].post("/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"})

    def versions(self, at: int, key: str) -> dict[str, str]:
        """User → who answered them."""
        return {user: self.ask(at, key, user).json()["millrace"]["release_version"] for user in USERS}


@pytest.fixture
def replicas(keyed: Settings, mlflow_uri: str, qa: Application) -> Iterator[Replicas]:
    """Both serve version 1 of four that are registered."""
    policy = Rollout.model_validate({"steps": [{"share": 0.5, "margin": 0.3}], "window_seconds": 20})
    application = qa.model_copy(update={"name": f"qa_{uuid.uuid4().hex[:8]}", "rollout": policy})
    first, second = free_ports_in_a_row(2)
    settings = keyed.model_copy(
        update={"mlflow_uri": mlflow_uri, "gateway_port": first, "gateways": 2, "answer_cache": False}
    )
    register(settings, application)
    tick(settings, application, run="test")
    with ExitStack() as stack:
        processes = []
        for port in (first, second):
            own = settings.model_copy(update={"gateway_port": port})
            given = gateway_environment(own) | {
                "MILLRACE_GATEWAY_KEYS": "required",
                "MILLRACE_KEYS_URL": settings.keys_url.get_secret_value(),
                "MILLRACE_ANSWER_CACHE": "false",
            }
            command = [sys.executable, "-m", "tests.serving.a_replica", application.name]
            process = subprocess.Popen(command, env=given, cwd=PROJECT)
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        clients = tuple(
            stack.enter_context(httpx.Client(base_url=url, trust_env=False, timeout=20))
            for url in settings.gateway_urls
        )
        for process, client in zip(processes, clients, strict=True):
            until(lambda client=client: client.get("/readyz").status_code == 200, process)
        yield Replicas(settings, application, tuple(processes), clients)


def register(settings: Settings, application: Application) -> None:
    """Four versions without weights: parrots need none."""
    client = mlflow.MlflowClient(tracking_uri=settings.mlflow_url, registry_uri=settings.mlflow_url)
    client.create_registered_model(application.name)
    run = client.create_run("0").info
    for _ in range(4):
        client.create_model_version(
            application.name,
            source=f"{run.artifact_uri}/release",
            run_id=run.run_id,
            tags={RELEASE_TAG: "r"},
            await_creation_for=0,
        )


def test_both_follow_the_journal_and_give_each_user_the_same_release(
    replicas: Replicas, make: Callable[..., tuple[ApiKey, str]]
) -> None:
    settings, application = replicas.settings, replicas.application
    _, key = make("ask")
    assert Counter(replicas.versions(0, key).values()) == {"1": len(USERS)}

    people.admit(settings, application, "2", actor="ann", reason="to be tried", simulated=True)
    tick(settings, application, run="test")
    split = read_split(settings, application.name)
    assert split is not None
    secret = settings.pseudonym_key.get_secret_value().encode()
    expected = {user: assign(split, pseudonym(secret, user)).version for user in USERS}
    assert set(expected.values()) == {"1", "2"}
    for at in (0, 1):
        until(lambda at=at: replicas.versions(at, key) == expected, replicas.processes[at])

    people.roll_back(settings, application, actor="ann", reason="it was tried")
    for at in (0, 1):
        until(lambda at=at: set(replicas.versions(at, key).values()) == {"1"}, replicas.processes[at])


def test_a_keys_rate_and_budget_hold_over_both(replicas: Replicas, make: Callable[..., tuple[ApiKey, str]]) -> None:
    _, limited = make("ask", requests_per_minute=20)
    started = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: replicas.ask(n % 2, limited), range(60)))
    refilled = int((time.monotonic() - started) / 3)
    told = [answer.status_code for answer in answers]
    assert set(told) == {200, 429}
    assert 20 <= told.count(200) <= 20 + refilled
    refused = {(n % 2, answer.json()["error"]["code"]) for n, answer in enumerate(answers) if answer.status_code == 429}
    assert refused == {(at, "rate_limit_exceeded") for at in (0, 1)}

    _, paid = make("ask", monthly_budget_usd=6.5 * COST)
    told = [replicas.ask(n % 2, paid).status_code for n in range(12)]
    assert told == [200] * 7 + [429] * 5
    assert {replicas.ask(at, paid).json()["error"]["code"] for at in (0, 1)} == {"insufficient_quota"}


def test_feedback_at_the_other_gateway_counts_once_and_each_writes_segments_of_its_own(
    replicas: Replicas, make: Callable[..., tuple[ApiKey, str]]
) -> None:
    settings, application = replicas.settings, replicas.application
    _, key = make()
    headers = {"Authorization": f"Bearer {key}"}
    answered = {replicas.ask(n % 2, key, user).json()["id"]: n % 2 for n, user in enumerate(USERS)}
    ratings = {}
    for number, (completion, at) in enumerate(answered.items()):
        ratings[completion] = number / len(answered)
        # At the other one; every third also at the one that answered, as by a caller who is unsure.
        for gateway in (1 - at, at) if number % 3 == 0 else (1 - at,):
            said = {"completion_id": completion, "rating": ratings[completion]}
            assert replicas.clients[gateway].post("/v1/feedback", json=said, headers=headers).status_code == 200

    written: dict[str, set[tuple[str, str]]] = {}
    for line in read_events(settings.event_log(application.name), *EVER):
        written.setdefault(line.segment[len("2026-01-01T00-") :].split("-")[0], set()).add(
            (line.event.kind, line.event.completion_id)
        )
    assert set(written) == {str(process.pid) for process in replicas.processes}
    for at, process in enumerate(replicas.processes):
        completed = {completion for kind, completion in written[str(process.pid)] if kind == "completed"}
        assert completed == {completion for completion, by in answered.items() if by == at}

    for _ in range(2):
        land_events(settings, application, *EVER, run="test")
        refine_feedback(settings, application, *EVER, run="test")
    lake = Lake.of(settings, application.name)
    exchanges = lake.read(SILVER_EXCHANGES, ["completion_id", "state"]).to_pylist()
    assert sorted((row["completion_id"], row["state"]) for row in exchanges) == [
        (completion, "completed") for completion in sorted(answered)
    ]
    feedback = lake.read(SILVER_FEEDBACK, ["completion_id", "rating"]).to_pylist()
    assert len(feedback) == len(answered)
    assert {row["completion_id"]: row["rating"] for row in feedback} == ratings


def test_when_one_is_gone_the_other_goes_on(replicas: Replicas, make: Callable[..., tuple[ApiKey, str]]) -> None:
    _, key = make()
    completion = replicas.ask(0, key).json()["id"]
    replicas.processes[0].kill()
    replicas.processes[0].wait()
    assert replicas.ask(1, key).status_code == 200
    said = {"completion_id": completion, "rating": 1}
    rated = replicas.clients[1].post("/v1/feedback", json=said, headers={"Authorization": f"Bearer {key}"})
    assert rated.status_code == 200


def until(holds: Callable[[], bool], process: "subprocess.Popen[bytes]", seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, "the gateway is gone"
        with suppress(httpx.TransportError):
            if holds():
                return
        time.sleep(0.1)
    pytest.fail("it never came true")
