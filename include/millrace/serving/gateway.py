"""The gateway: OpenAI's API in front of releases, with every exchange and every word of feedback on disk first.

`create_app` puts the parts together and knows HTTP; what happens to a question is in `exchange.py`, who answers it in
`traffic.py`. Ids are signed, so any gateway of a deployment takes feedback on the answer of any other.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException

from millrace.applications import Application
from millrace.errors import SettingsError, SourceError
from millrace.secret_sources import secrets_of
from millrace.serving import openai_format
from millrace.serving.admission import Admission, Caller
from millrace.serving.answer_cache import AnswerCache
from millrace.serving.api_keys import Scope
from millrace.serving.asked import MAX_BODY, Asked, read_asked, read_said
from millrace.serving.exchange import Answered, Begun, Desk, Piece, Told, hold
from millrace.serving.metrics import Metrics
from millrace.serving.refusal import Refusal, unavailable
from millrace.serving.traces import ExchangeTraces
from millrace.serving.traffic import RegisteredReleases, Releases, Traffic
from millrace.settings import Settings
from millrace.sources.completion_id import CompletionKeys
from millrace.sources.event_log import EventLog, Feedback, now
from millrace.sources.pseudonym import note_key, noted_in, require_same_key

CACHED_ANSWERS = 10_000
"""Per application; some kilobytes each."""


def create_app(
    settings: Settings,
    applications: Sequence[Application],
    releases: Callable[[Settings, Application], Releases] = RegisteredReleases,
) -> FastAPI:
    """The gateway for `applications`. Nothing is loaded or written before the app is started.

    Args:
        releases: where an application's releases come from; the MLflow registry, unless a test knows better.

    Raises:
        SettingsError: a key is missing, so that ids could be forged or users recognised; the pseudonym key is another
            than before; or callers need API keys, and nowhere is said where those are kept.
    """
    completion_keys = CompletionKeys(settings.completion_key)
    # Once, whatever becomes of its file: with another key, users whom it knows would be strangers from here on.
    pseudonym_key = _pseudonym_key(settings)
    noted = noted_in(settings)
    require_same_key(pseudonym_key, noted)
    secrets = secrets_of(settings)
    admission = Admission(settings)
    metrics = Metrics()
    desks = {
        application.name: Desk(
            application=application,
            traffic=Traffic(application.name, releases(settings, application), secrets),
            events=EventLog(settings.event_log(application.name)),
            cache=AnswerCache(CACHED_ANSWERS) if settings.answer_cache else None,
            metrics=metrics,
            traces=ExchangeTraces(settings, application.name, metrics),
            completion_keys=completion_keys,
            secrets=secrets,
        )
        for application in applications
    }
    workers = _Workers(settings.gateway_workers, settings.gateway_queue, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        note_key(pseudonym_key, noted)
        for desk in desks.values():
            desk.traffic.start()
            desk.traces.start()
        yield
        await asyncio.to_thread(_close, workers, list(desks.values()), admission)

    app = FastAPI(title="Millrace gateway", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    async def admitted(request: Request, scope: Scope, *, pays: bool = False) -> Caller:
        # Before anything of the body is read. In a thread, because the database may be asked.
        if not admission.required:
            return admission.anybody
        return await asyncio.to_thread(admission.admit, request.headers, scope, pays=pays)

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> Response:
        return _refused(refusal, metrics)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        sentence = f"{request.method} {request.url.path}: {error.detail}"
        return _refused(Refusal(error.status_code, sentence, code="unknown_url"), metrics)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        caller = await admitted(request, "ask", pays=True)
        asked = read_asked(await _body(request), request.headers, pseudonym_key)
        caller.require_application(asked.application)
        if asked.pin:
            caller.require("pin")
        desk = desks.get(asked.application)
        if desk is None:
            raise Refusal(
                404,
                f"there is no application {asked.application!r}; there are {', '.join(desks)}",
                code="model_not_found",
                param="model",
            )
        exchange = workers.take(desk, asked, caller.charge)
        begun = await exchange.begin()
        if asked.stream:
            return StreamingResponse(_streamed(asked, begun, exchange), media_type="text/event-stream")
        async for told in exchange.rest():
            if isinstance(told, Answered):
                return JSONResponse(openai_format.completion(asked, begun, told))
        raise AssertionError("an exchange ends with an answer or a refusal")

    @app.post("/v1/feedback")
    async def feedback(request: Request) -> Response:
        caller = await admitted(request, "feedback")
        said = read_said(await _body(request), request.headers, pseudonym_key)
        try:
            issued = completion_keys.verify(said.completion_id, now())
        except SourceError as error:
            raise Refusal(403, str(error), code="forged_completion_id", param="completion_id") from None
        caller.require_application(issued.application)
        desk = desks.get(issued.application)
        if desk is None:
            raise Refusal(
                404, f"application {issued.application!r} is not served here any more", code="unknown_application"
            )
        event = Feedback(
            completion_id=said.completion_id,
            application=issued.application,
            simulated=said.simulated,
            user=said.user,
            rating=said.rating,
            comment=said.comment,
            correction=said.correction,
        )
        try:
            await desk.events.append_async(event)
        except SourceError as error:
            raise unavailable(str(error), code="not_recorded") from None
        metrics.feedback.labels(issued.application).inc()
        return JSONResponse({"id": event.event_id, "object": "feedback", "completion_id": said.completion_id})

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        caller = await admitted(request, "ask")
        named = {
            name: since
            for desk in desks.values()
            for name, since in desk.traffic.models().items()
            if caller.may_ask(name)
        }
        return {"object": "list", "data": [_model(name, since) for name, since in named.items()]}

    @app.get("/v1/models/{name}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        caller = await admitted(request, "ask")
        desk = desks.get(name.partition("@")[0])
        since = desk.traffic.models().get(name) if desk else None
        if since is None or not caller.may_ask(name):
            raise Refusal(404, f"there is no model {name!r}; see /v1/models", code="model_not_found", param="model")
        return _model(name, since)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "up"}

    @app.get("/readyz")
    async def readyz() -> Response:
        # An application that has no release yet says so, and keeps nobody from those that have one.
        troubles = {name: desk.traffic.not_ready for name, desk in desks.items()}
        waiting = {name for name, desk in desks.items() if desk.traffic.unreleased}
        released = desks.keys() - waiting
        ready = bool(released) and not any(troubles[name] for name in released)
        body = {
            "status": "ready" if ready else "not ready",
            "applications": {name: trouble or "ready" for name, trouble in troubles.items()},
        }
        return JSONResponse(body, status_code=200 if ready else 503)

    @app.get("/metrics")
    async def exposition(request: Request) -> Response:
        await admitted(request, "admin")
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


class _Workers:
    """The threads in which exchanges are held, and how many may wait for one."""

    def __init__(self, workers: int, queue: int, metrics: Metrics) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="exchange")
        self._most = workers + queue
        self._taken = 0
        self._metrics = metrics

    def take(self, desk: Desk, asked: Asked, charge: Callable[[float], None]) -> "_Listener":
        """Begin an exchange. Called in the event loop, like the release of its place: no lock is needed.

        Raises:
            Refusal: 429, too many are waiting.
        """
        if self._taken >= self._most:
            raise Refusal(
                429, f"{self._taken} exchanges are at work or waiting; come back", code="overloaded", retry_after=1
            )
        self._taken += 1
        self._metrics.at_work.set(self._taken)
        loop = asyncio.get_running_loop()
        exchange = _Listener()

        def tell(told: Told) -> None:
            loop.call_soon_threadsafe(exchange.told.put_nowait, told)

        def work() -> None:
            hold(desk, asked, tell, exchange.left, charge)
            loop.call_soon_threadsafe(self._release)

        self._pool.submit(work)
        return exchange

    def close(self) -> None:
        """Wait for every exchange to end."""
        self._pool.shutdown(wait=True)

    def _release(self) -> None:
        self._taken -= 1
        self._metrics.at_work.set(self._taken)


class _Listener:
    """The event loop's side of an exchange that a worker thread holds."""

    def __init__(self) -> None:
        self.told: asyncio.Queue[Told] = asyncio.Queue()
        self.left = threading.Event()
        self._first: Told | None = None

    async def begin(self) -> Begun:
        """Once the exchange is on disk and the first words, or all, are there: until then a refusal can still say so.

        Raises:
            Refusal: there is no answer.
        """
        begun = await self._next()
        assert isinstance(begun, Begun)
        self._first = await self._next()
        return begun

    async def rest(self) -> AsyncIterator[Piece | Answered]:
        """What follows, up to the answer. Leaving this early cancels the generation."""
        told = self._first
        try:
            while isinstance(told, Piece):
                yield told
                told = await self._next()
            assert isinstance(told, Answered)
            yield told
        finally:
            self.left.set()

    async def _next(self) -> Told:
        try:
            told = await self.told.get()
        except asyncio.CancelledError:
            self.left.set()
            raise
        if isinstance(told, Refusal):
            raise told
        return told


async def _streamed(asked: Asked, begun: Begun, exchange: _Listener) -> AsyncIterator[bytes]:
    yield openai_format.opening(asked, begun)
    try:
        async for told in exchange.rest():
            if isinstance(told, Piece):
                yield openai_format.words(asked, begun, told.text)
            else:
                yield openai_format.closing(asked, begun, told)
    except Refusal as refusal:
        yield openai_format.broken(refusal)
    finally:
        exchange.left.set()


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise Refusal(413, f"the request is larger than {MAX_BODY} bytes; send less", code="too_large")
    return bytes(body)


def _refused(refusal: Refusal, metrics: Metrics) -> Response:
    metrics.refusals.labels(str(refusal.status)).inc()
    return JSONResponse(refusal.body(), status_code=refusal.status, headers=refusal.headers())


def _model(name: str, since: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": since, "owned_by": "millrace"}


def _pseudonym_key(settings: Settings) -> bytes:
    key = settings.pseudonym_key.get_secret_value().encode()
    if not key:
        raise SettingsError("MILLRACE_PSEUDONYM_KEY is empty; `millrace up` makes one, or set your own")
    return key


def _close(workers: _Workers, desks: Sequence[Desk], admission: Admission) -> None:
    workers.close()
    admission.close()
    for desk in desks:
        desk.events.close()
        desk.traces.stop()
        desk.traffic.stop()
