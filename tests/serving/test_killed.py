"""A gateway killed under load loses nothing that it acknowledged; one that is asked to end, ends well."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import BRONZE_EVENTS, SILVER_EXCHANGES, SILVER_FEEDBACK
from millrace.settings import Settings

pytestmark = pytest.mark.stack

ROOT = Path(__file__).parents[2]


@dataclass
class Acknowledged:
    """What callers hold in their hands: ids of whole answers, streamed or not, and ratings that were taken."""

    answers: dict[str, str] = field(default_factory=dict)
    ratings: dict[str, float] = field(default_factory=dict)


@contextmanager
def a_gateway(home: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.serving.a_process", str(home)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        url = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        end = time.monotonic() + 30
        while True:
            with suppress(httpx.TransportError):
                if httpx.get(f"{url}/readyz", trust_env=False).status_code == 200:
                    break
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        yield process, url
    finally:
        process.kill()
        process.wait()


def ask_and_rate(url: str, name: str, stop: threading.Event, taken: Acknowledged) -> None:
    """A caller who goes on until the gateway is gone."""
    with httpx.Client(base_url=url, trust_env=False, timeout=20) as client, suppress(httpx.TransportError):
        for number in range(10**6):
            if stop.is_set():
                return
            question = f"question {number} of {name}?"
            body = {"model": "qa", "user": name, "messages": [{"role": "user", "content": question}]}
            if number % 2:
                lines = client.post("/v1/chat/completions", json=body | {"stream": True}).text.splitlines()
                if "data: [DONE]" not in lines:
                    return
                completion_id = lines[0].split('"id": "')[1].split('"')[0]
            else:
                answered = client.post("/v1/chat/completions", json=body)
                answered.raise_for_status()
                completion_id = answered.json()["id"]
            taken.answers[completion_id] = f"you asked {question}"
            rating = (number % 11) / 10
            rated = client.post("/v1/feedback", json={"completion_id": completion_id, "rating": rating})
            rated.raise_for_status()
            taken.ratings[completion_id] = rating


def under_load(url: str, taken: Acknowledged, until: Callable[[], object], crowd: str) -> None:
    stop = threading.Event()
    callers = [
        threading.Thread(target=ask_and_rate, args=(url, f"{crowd}-{number}", stop, taken)) for number in range(6)
    ]
    for caller in callers:
        caller.start()
    try:
        until()
    finally:
        stop.set()
        for caller in callers:
            caller.join()


def test_after_kill_9_under_load_everything_acknowledged_is_in_silver_exactly_once(
    settings: Settings, ingest: Callable[[], None], lake: Lake
) -> None:
    taken = Acknowledged()
    for life in range(2):
        with a_gateway(settings.home) as (process, url):

            def kill_when_busy(process: subprocess.Popen[str] = process, wanted: int = 40 * (life + 1)) -> None:
                end = time.monotonic() + 30
                while len(taken.ratings) < wanted:
                    assert time.monotonic() < end
                    time.sleep(0.005)
                os.kill(process.pid, signal.SIGKILL)
                process.wait()

            under_load(url, taken, kill_when_busy, f"life {life}")
    assert len(taken.ratings) >= 80
    ingest()
    exchanges = lake.read(SILVER_EXCHANGES, ["completion_id", "state", "answer"]).to_pylist()
    found = {row["completion_id"]: row for row in exchanges}
    assert len(found) == len(exchanges)
    assert {key: found[key]["answer"] for key in taken.answers} == taken.answers
    assert {found[key]["state"] for key in taken.answers} == {"completed"}
    feedback = lake.read(SILVER_FEEDBACK, ["completion_id", "rating"]).to_pylist()
    ratings = {row["completion_id"]: row["rating"] for row in feedback}
    assert len(ratings) == len(feedback)
    assert {key: ratings[key] for key in taken.ratings} == taken.ratings
    events = lake.read(BRONZE_EVENTS, ["kind", "completion_id"]).to_pylist()
    counted = [(event["kind"], event["completion_id"]) for event in events]
    assert len(counted) == len(set(counted))


def test_sigterm_lets_exchanges_end_and_the_process_leaves_with_success(settings: Settings) -> None:
    with a_gateway(settings.home) as (process, url):
        answers: list[httpx.Response] = []

        def ask() -> None:
            body = {"model": "qa", "messages": [{"role": "user", "content": "word " * 600}]}
            answers.append(httpx.post(f"{url}/v1/chat/completions", json=body, trust_env=False, timeout=20))

        slow = threading.Thread(target=ask)
        slow.start()
        time.sleep(0.3)
        process.terminate()
        slow.join()
        assert process.wait(timeout=20) in (0, -signal.SIGTERM)
        assert answers[0].status_code == 200
