"""One exchange from question to answer: accepted on disk before the first word, ended on disk before the last.

Runs in a worker thread, so that it comes to its end whatever becomes of the connection, and tells its caller through
`Told` messages. It does not know HTTP, nor which release ought to answer (`traffic.py`).
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from pydantic import SecretStr

from millrace.applications import Application
from millrace.errors import EngineError, MillraceError, ReleaseError, SourceError
from millrace.releases.pipeline import Answer, AnswerPipeline, AnswerStream
from millrace.releases.split import Arm
from millrace.secret_sources import hide
from millrace.serving.answer_cache import AnswerCache
from millrace.serving.asked import Asked
from millrace.serving.metrics import Metrics
from millrace.serving.refusal import Refusal, unavailable
from millrace.serving.traces import ExchangeTraces
from millrace.serving.traffic import Route, Traffic
from millrace.sources.completion_id import CompletionKeys
from millrace.sources.event_log import CLIENT_LEFT, Accepted, Completed, EventLog, Failed

log = logging.getLogger("millrace.serving")


@dataclass(frozen=True)
class Begun:
    """The exchange is on disk; words follow."""

    completion_id: str
    at: datetime


@dataclass(frozen=True)
class Piece:
    """The next words."""

    text: str


@dataclass(frozen=True)
class Answered:
    """The whole answer; it is on disk."""

    answer: Answer
    release_version: str
    arm: Arm | None
    from_cache: bool
    fell_back: bool


Told = Begun | Piece | Answered | Refusal
"""Begun, then pieces, then Answered; or a Refusal at any point, which is the last."""


@dataclass(frozen=True)
class Desk:
    """Where one application's exchanges are held, and what they need around them."""

    application: Application
    traffic: Traffic
    events: EventLog
    cache: AnswerCache | None
    metrics: Metrics
    traces: ExchangeTraces
    completion_keys: CompletionKeys
    secrets: Sequence[SecretStr] = ()
    """What is hidden in the words of an error, which are kept."""


def hold(
    desk: Desk,
    asked: Asked,
    tell: Callable[[Told], None],
    left: threading.Event,
    charge: Callable[[float], None],
) -> None:
    """Answer `asked`. Always tells exactly one last message; never raises.

    Args:
        left: set when nobody listens any more; the generation is cancelled then.
        charge: called with what was computed for the caller costs, in US dollars, before the last message: also for one
            who left, or to leave early would be to ask for nothing.
    """
    try:
        with desk.traffic.route(asked.pin, asked.user) as route:
            tell(_Exchange(desk, asked, route, tell, left, charge).run())
    except Refusal as refusal:
        tell(refusal)
    except MillraceError as error:
        tell(unavailable(str(error)))
    except Exception as error:
        # The caller waits for a last word: it must come whatever broke.
        log.exception("an exchange of %s broke", desk.application.name)
        tell(Refusal(500, f"the answer broke: {type(error).__name__}", code="internal_error"))


@dataclass
class _Exchange:
    desk: Desk
    asked: Asked
    route: Route
    tell: Callable[[Told], None]
    left: threading.Event
    charge: Callable[[float], None]
    sent: str = ""
    challenger_error: str | None = None

    def run(self) -> Answered:
        """Raises:
        Refusal: no release could answer, or the disk did not take the exchange.
        """
        self.id = self.desk.completion_keys.issue(self.desk.application.name, self.asked.at)
        pipeline, version = self._first_choice()
        build = _build(pipeline)
        self._append(Accepted(**self._about(pipeline, version, build)))
        self.tell(Begun(self.id, self.asked.at))
        try:
            try:
                answer, cached = self._answer(pipeline, build)
            except _ClientLeft:
                raise
            except Exception as error:
                # A challenger may break with anything; as long as no word of it has left, the champion answers.
                if self.route.fallback is None or self.challenger_error is not None or self.sent:
                    raise
                self.challenger_error = self._sentence(error)
                pipeline, version = self.route.fallback, self.route.fallback_version or ""
                build = _build(pipeline)
                answer, cached = self._answer(pipeline, build)
        except _ClientLeft:
            self._fail(pipeline, version, build, CLIENT_LEFT, "left")
            raise Refusal(499, CLIENT_LEFT, code="client_left") from None
        except Exception as error:
            self._fail(pipeline, version, build, self._sentence(error), "failed")
            if isinstance(error, ReleaseError):  # the question does not fit this release's prompt
                raise Refusal(400, str(error), code="context_length_exceeded", param="messages") from error
            raise
        return self._complete(pipeline, version, answer, cached)

    def _first_choice(self) -> tuple[AnswerPipeline, str]:
        route = self.route
        if route.pipeline is not None:
            return route.pipeline, route.assignment.version
        if route.fallback is None:
            raise unavailable(f"release {route.assignment.version} can't answer: {route.broken}")
        self.challenger_error = f"release {route.assignment.version} can't be loaded: {route.broken}"
        return route.fallback, route.fallback_version or ""

    def _answer(self, pipeline: AnswerPipeline, build: str) -> tuple[Answer, bool]:
        """The answer, told piece by piece, and whether it came from the cache."""
        key = (pipeline.release_id, build, self.asked.question)
        # Without a build nobody knows what an answer is of: the index came back, or went away, meanwhile. And releases
        # that are compared are both computed: the one with more users would be fast because it remembers more.
        cache = self.desk.cache if build and self.route.assignment.arm is None else None
        known = cache.get(key) if cache else None
        if known is not None:
            self._say(known.text)
            return replace(known, seconds=time.perf_counter() - self.asked.started), True
        stream = pipeline.stream(self.asked.question, build=build or None)
        try:
            for piece in self._until_left(stream):
                self._say(piece)
        except _ClientLeft:
            stream.close()
            with suppress(EngineError):  # it broke meanwhile, and nobody knows what it had computed
                usage = stream.answer.usage
                self.charge(self._cost(pipeline, usage.prompt_tokens, usage.completion_tokens))
            raise
        finally:
            stream.close()
        answer = stream.answer
        if cache and answer.finish_reason != "cancelled":
            cache.put(key, answer)
        return answer, False

    def _until_left(self, stream: AnswerStream) -> Iterator[str]:
        for piece in stream:
            if self.left.is_set():
                raise _ClientLeft
            yield piece

    def _say(self, text: str) -> None:
        if text:
            self.sent += text
            self.tell(Piece(text))

    def _complete(self, pipeline: AnswerPipeline, version: str, answer: Answer, cached: bool) -> Answered:
        usage = answer.usage
        computed = (0, 0) if cached else (usage.prompt_tokens, usage.completion_tokens)
        cost = self._cost(pipeline, *computed)
        fell_back = self.challenger_error is not None
        seconds = time.perf_counter() - self.asked.started
        self._append(
            Completed(
                **self._about(pipeline, version, answer.index_build),
                answer=answer.text,
                citations=tuple(hit.chunk_id for hit in answer.citations),
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                seconds=seconds,
                cost_usd=cost,
                from_cache=cached,
                fell_back=fell_back,
                error=self.challenger_error,
            )
        )
        self.charge(cost)
        labels = self._measure("completed", seconds)
        for kind, tokens in zip(("prompt", "completion"), computed, strict=True):
            self.desk.metrics.tokens.labels(*labels, kind).inc(tokens)
        if cached:
            self.desk.metrics.cached.labels(*labels).inc()
        if fell_back:
            self.desk.metrics.fallbacks.labels(*labels).inc()
        return Answered(answer, version, self.route.assignment.arm, cached, fell_back)

    def _fail(self, pipeline: AnswerPipeline, version: str, build: str, error: str, outcome: str) -> None:
        if self.challenger_error is not None:
            error = f"{error}; before it, the challenger: {self.challenger_error}"
        seconds = time.perf_counter() - self.asked.started
        self._measure(outcome, seconds)
        self._append(
            Failed(
                **self._about(pipeline, version, build),
                answer=self.sent or None,
                seconds=seconds,
                error=error,
                fell_back=self.challenger_error is not None,
            )
        )

    def _cost(self, pipeline: AnswerPipeline, prompt_tokens: int, completion_tokens: int) -> float:
        return self.desk.application.prices.answer(pipeline.manifest.generator.name, prompt_tokens, completion_tokens)

    def _measure(self, outcome: str, seconds: float) -> tuple[str, str, str]:
        """Counted under the release that was assigned, which is not always the one that answered."""
        assignment = self.route.assignment
        labels = (self.desk.application.name, assignment.arm or "none", assignment.version)
        self.desk.metrics.exchanges.labels(*labels, outcome).inc()
        self.desk.metrics.seconds.labels(*labels).observe(seconds)
        return labels

    def _sentence(self, error: Exception) -> str:
        return hide(str(error) or type(error).__name__, *self.desk.secrets)

    def _about(self, pipeline: AnswerPipeline, version: str, build: str) -> dict[str, Any]:
        assignment = self.route.assignment
        prompt = pipeline.manifest.prompt
        return {
            "completion_id": self.id,
            "application": self.desk.application.name,
            "simulated": self.asked.simulated,
            "user": self.asked.user,
            "question": self.asked.question,
            "release_id": pipeline.release_id,
            "release_version": version,
            "index_build": build,
            "prompt_version": f"{prompt.name}/{prompt.version}",
            "rollout_id": assignment.rollout_id,
            "epoch": assignment.epoch,
            "arm": assignment.arm,
            "assignment_probability": assignment.probability if assignment.arm else None,
            "pinned": self.route.pinned,
            "accepted_at": self.asked.at,
        }

    def _append(self, event: Accepted | Completed | Failed) -> None:
        try:
            self.desk.events.append(event)
        except SourceError as error:
            raise unavailable(str(error), code="not_recorded") from None
        if not isinstance(event, Accepted):
            self.desk.traces.offer(event)


class _ClientLeft(Exception):
    """Nobody listens any more."""


def _build(pipeline: AnswerPipeline) -> str:
    """The index build that will be searched; empty where there is none: answering says why, and is recorded."""
    try:
        return pipeline.retriever.build
    except MillraceError:
        return ""
