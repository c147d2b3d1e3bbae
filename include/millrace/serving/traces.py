"""Exchanges as MLflow traces, for people who develop: experiment `<application>/traces`, one trace an exchange.

Behind the exchanges, never in their way: what has ended is put into a bounded queue (5 microseconds), one thread sends
what gathered there in a second, some at a time, and what finds no room, or no MLflow, is dropped and counted. A trace
costs MLflow's server about 10 ms of a processor, so a busy gateway traces a sample. The event log, and through it
`silver/exchanges`, holds the same for every exchange in every environment; nothing is decided by a trace.
"""

import contextlib
import hashlib
import json
import logging
import queue
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from millrace.errors import ReleaseError
from millrace.releases.mlflow_server import ensure_experiment, mlflow_client, require_mlflow
from millrace.serving.metrics import Metrics
from millrace.settings import Settings
from millrace.sources.event_log import Completed, Failed

if TYPE_CHECKING:
    from mlflow.entities import Span

log = logging.getLogger("millrace.serving")

WAITING = 1000
"""Ended exchanges that may wait to be sent; some kilobytes each."""
TOGETHER = 10
"""Traces in one request."""
GATHER_SECONDS = 1.0
"""How long the first of them waits for others; so no more than `TOGETHER` in this time are sent."""
LAST_SECONDS = 5.0
"""How long an ending gateway waits for the last ones."""


class ExchangeTraces:
    """Sends one application's exchanges to MLflow, if they are traced here at all. Thread-safe."""

    def __init__(self, settings: Settings, application: str, metrics: Metrics) -> None:
        self._settings = settings
        self._application = application
        self._metrics = metrics
        self._ended: queue.Queue[Completed | Failed | None] = queue.Queue(WAITING)
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._experiment: str | None = None
        self._silent = False

    def start(self) -> None:
        """Begin to send: in dev, if the settings say so."""
        if self._settings.environment == "dev" and self._settings.trace_exchanges:
            self._thread = threading.Thread(target=self._run, name=f"traces {self._application}", daemon=True)
            self._thread.start()

    def offer(self, event: Completed | Failed) -> None:
        """An exchange has ended. Returns at once, whatever becomes of it."""
        if self._thread is None:
            return
        try:
            self._ended.put_nowait(event)
        except queue.Full:
            self._count("dropped", 1)

    def stop(self) -> None:
        """Send what waits, for at most `LAST_SECONDS`."""
        if self._thread is not None:
            self._stopping.set()
            with contextlib.suppress(queue.Full):  # then it waits for nothing
                self._ended.put_nowait(None)
            self._thread.join(LAST_SECONDS)

    def _run(self) -> None:
        while not (self._stopping.is_set() and self._ended.empty()):
            gathered = [self._ended.get()]
            self._stopping.wait(GATHER_SECONDS)
            with contextlib.suppress(queue.Empty):
                while len(gathered) < TOGETHER:
                    gathered.append(self._ended.get_nowait())
            self._send([event for event in gathered if event is not None])

    def _send(self, events: Sequence[Completed | Failed]) -> None:
        if not events:
            return
        try:
            self._log(events)
        except Exception as error:  # Whatever MLflow says: the thread lives on, for when it answers again.
            self._count("dropped", len(events))
            if not self._silent:  # once an outage
                log.warning("exchanges of %s are not traced: %s", self._application, error)
            self._silent, self._experiment = True, None
        else:
            self._count("sent", len(events))
            self._silent = False

    def _log(self, events: Sequence[Completed | Failed]) -> None:
        """Raises:
        ReleaseError: MLflow doesn't answer, or refuses.
        """
        from mlflow.exceptions import MlflowException
        from mlflow.tracing.client import TracingClient

        purpose = f"trace exchanges of {self._application}"
        if self._experiment is None:
            with mlflow_client(self._settings, purpose) as client:
                self._experiment = ensure_experiment(client, f"{self._application}/traces")
        else:
            require_mlflow(self._settings, purpose)
        try:
            TracingClient(self._settings.mlflow_url).log_spans(self._experiment, [span_of(event) for event in events])
        except MlflowException as error:
            raise ReleaseError(f"MLflow failed to {purpose}: {error}") from error

    def _count(self, outcome: str, events: int) -> None:
        self._metrics.traces.labels(self._application, outcome).inc(events)


def span_of(event: Completed | Failed) -> "Span":
    """The one span of an exchange's trace. Its ids come from the completion's, so that sent twice it is one trace."""
    from mlflow.entities import Span

    digest = hashlib.sha256(event.completion_id.encode()).hexdigest()
    start = int(event.accepted_at.timestamp() * 1e9)
    trace_id = f"tr-{digest[:32]}"
    attributes: dict[str, Any] = {
        "mlflow.traceRequestId": trace_id,
        "mlflow.spanType": "CHAIN",
        "mlflow.spanInputs": {"question": event.question},
        "mlflow.spanOutputs": {"answer": event.answer},
        "user.id": event.user,
        "completion_id": event.completion_id,
        "error": event.error,
    }
    if isinstance(event, Completed):
        attributes["chunk_ids"] = event.citations
        attributes["from_cache"] = event.from_cache
        attributes["cost_usd"] = event.cost_usd
        attributes["mlflow.chat.tokenUsage"] = {
            "input_tokens": event.prompt_tokens,
            "output_tokens": event.completion_tokens,
            "total_tokens": event.prompt_tokens + event.completion_tokens,
        }
    code = "STATUS_CODE_OK" if isinstance(event, Completed) else "STATUS_CODE_ERROR"
    # Tags of the trace, which MLflow can search and show as columns.
    tags = {
        "prompt_version": event.prompt_version,
        "release_id": event.release_id,
        "release_version": event.release_version,
        "index_build": event.index_build,
        "arm": event.arm or "none",
        "simulated": str(event.simulated).lower(),
        "completion_id": event.completion_id,
    }
    attributes |= {f"mlflow.traceTag.{name}": value for name, value in tags.items()}
    return Span.from_dict(
        {
            "trace_id": trace_id,
            "span_id": digest[32:48],
            "parent_span_id": None,
            "name": "exchange",
            "start_time_unix_nano": start,
            "end_time_unix_nano": start + int(event.seconds * 1e9),
            "status": {"code": code, "message": event.error or ""},
            "attributes": {name: json.dumps(value) for name, value in attributes.items() if value is not None},
        }
    )
