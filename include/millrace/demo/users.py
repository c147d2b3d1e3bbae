"""Simulated users: they ask through the gateway by HTTP and rate what they get against the known answer, with noise.

No person is behind any of it, and every request says so (`X-Millrace-Simulated`), so that every table and page can.
They know the gateways' addresses and their questions; releases and splits they can't see, only what an answer says.
"""

import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import httpx

from millrace.applications import Demo
from millrace.scoring.overlap import token_f1
from millrace.sources.questions import Question

SIMULATED = {"X-Millrace-Simulated": "true"}
POOR = 0.5
"""Token-F1 below which an answer is worth correcting."""
AT_ONCE = 4


@dataclass(frozen=True)
class Visit:
    """One simulated user's question and what came of it."""

    user: str
    completion_id: str
    release_version: str
    rating: float | None
    """None: this user did not rate."""


class SimulatedUsers:
    """A crowd that asks `questions` of `application`. Ratings repeat for the same crowd, user and answer.

    With `corrections`, who rates a poor answer also writes a better one. Crowds that measure a rollout write
    none: the next fine-tune would train on the questions that the next rollout is measured with. `api_key` is what they
    show a gateway that requires one. Of several gateways each user asks one and rates at the next.
    """

    def __init__(
        self,
        gateway_urls: Sequence[str],
        application: str,
        questions: Sequence[Question],
        demo: Demo,
        *,
        crowd: str,
        corrections: bool,
        api_key: str = "",
    ) -> None:
        shown = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._gateways = [httpx.Client(base_url=url, headers=SIMULATED | shown, timeout=120) for url in gateway_urls]
        self._application = application
        self._questions = questions
        self._demo = demo
        self._crowd = crowd
        self._corrections = corrections

    def visit(self, number: int) -> Visit:
        """User `number` asks one question and perhaps rates the answer.

        Raises:
            httpx.HTTPError: the gateway did not answer, or refused.
        """
        user = f"simulated-{self._crowd}-{number}"
        chance = random.Random(user)
        question = chance.choice(self._questions)
        asked, rated = (self._gateways[turn % len(self._gateways)] for turn in (number, number + 1))
        answered = asked.post(
            "/v1/chat/completions",
            json={
                "model": self._application,
                "user": user,
                "messages": [{"role": "user", "content": question.question}],
            },
        )
        answered.raise_for_status()
        body = answered.json()
        rating = self._rate(body["id"], body["choices"][0]["message"]["content"], question, chance, rated)
        return Visit(user, body["id"], body["millrace"]["release_version"], rating)

    def visits(self, count: int, first: int = 0) -> list[Visit]:
        """`count` users, a few at a time."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(self.visit, range(first, first + count)))

    def _rate(
        self, completion_id: str, answer: str, question: Question, chance: random.Random, gateway: httpx.Client
    ) -> float | None:
        if chance.random() >= self._demo.answer_rate:
            return None
        score = token_f1(answer, question.answer)
        rating = min(1.0, max(0.0, score + chance.gauss(0, self._demo.noise)))
        feedback: dict[str, object] = {"completion_id": completion_id, "rating": rating}
        if self._corrections and score < POOR:
            feedback["correction"] = question.answer
        gateway.post("/v1/feedback", json=feedback).raise_for_status()
        return rating


class Traffic:
    """New simulated users keep coming, `users_per_minute` at most, until the block ends.

    `visits` holds what happened so far; an error of a visit is kept in `failures`, not raised.
    """

    def __init__(self, users: SimulatedUsers, users_per_minute: int) -> None:
        self.visits: list[Visit] = []
        self.failures: list[str] = []
        self._users = users
        self._pause = 60 / users_per_minute
        self._stop = threading.Event()
        self._numbers = iter(range(10**9))
        self._next = threading.Lock()
        self._threads = [threading.Thread(target=self._come, name=f"simulated-users-{i}") for i in range(AT_ONCE)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _come(self) -> None:
        while not self._stop.is_set():
            with self._next:
                number = next(self._numbers)
                self._stop.wait(self._pause)
            try:
                self.visits.append(self._users.visit(number))
            except httpx.HTTPError as error:
                self.failures.append(str(error))
                self._stop.wait(1)
