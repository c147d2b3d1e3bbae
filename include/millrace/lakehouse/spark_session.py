"""A session on a Spark Connect server: opened once per process and server, and errors said in one sentence.

It knows how the server is reached and what its errors look like; it does not know tables (`spark.py`).
"""

import logging
import os
import re
import socket
import threading
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pyspark.errors import PySparkException
from pyspark.errors.exceptions.connect import SparkConnectGrpcException
from pyspark.sql.connect.client import DefaultChannelBuilder
from pyspark.sql.connect.client.retries import DefaultPolicy
from pyspark.sql.connect.session import SparkSession

from millrace.errors import ConflictError, LakehouseError

T = TypeVar("T")


class Refused(Exception):
    """What the server said, in one sentence, of work that it could not do; the engine knows of which table."""


CONNECT_SECONDS = 5.0

# Of the session, not of the server: the server may be somebody else's.
_CONFIGURATION = {
    "spark.sql.session.timeZone": "UTC",
    # Spark's own default, INT96, holds nanoseconds of a narrower range and gives no statistics.
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    "spark.sql.execution.arrow.maxRecordsPerBatch": "1000",
    # Causes are told only with the server's stacks.
    "spark.sql.connect.serverStacktrace.enabled": "true",
}

# A server that comes back is to be found at once; the default is to look again after up to two minutes.
_CHANNEL = [("grpc.max_reconnect_backoff_ms", 1000), ("grpc.use_local_subchannel_pool", 1)]

_sessions: dict[tuple[int, str], SparkSession] = {}
_opening = threading.Lock()


def on_server(url: str, work: Callable[[SparkSession], T]) -> T:
    """What `work` returns, given the session of this process on the server at `url`.

    A session that is lost, because the server was restarted or the session was idle for an hour, is opened anew and
    `work` repeated, which must be safe.

    Raises:
        LakehouseError: the server doesn't answer, or refuses the token.
        ConflictError: the server refused a commit because another came first.
        Refused: anything else.
    """
    try:
        try:
            return work(_session(url))
        except SparkConnectGrpcException as error:
            if not _lost(error):
                raise
            _sessions.pop((os.getpid(), url), None)
            return work(_session(url))
    except PySparkException as error:
        raise _translated(url, error) from error


def adopt(url: str, session: SparkSession) -> None:
    """Let this process use `session` for the server at `url`: inside a streaming batch, which runs beside the server,
    the server hands one out, and another can't be opened where it was started with a token."""
    _sessions[(os.getpid(), url)] = session


def _session(url: str) -> SparkSession:
    # A forked child must not use its parent's connection.
    key = (os.getpid(), url)
    _reach(url)
    with _opening:
        if key not in _sessions:
            # PySpark logs every error with its stack before raising it.
            logging.getLogger("pyspark.sql.connect.client").setLevel(logging.CRITICAL)
            session: Any = SparkSession.builder.channelBuilder(DefaultChannelBuilder(url, _CHANNEL)).create()
            # The default waits and retries for minutes.
            session.client.set_retry_policies([DefaultPolicy(max_retries=4, max_backoff=2000)])
            for name, value in _CONFIGURATION.items():
                session.conf.set(name, value)
            _sessions[key] = session
        return _sessions[key]


def _reach(url: str) -> None:
    """Raise at once if nobody listens: gRPC would wait."""
    address = urlsplit(url)
    try:
        socket.create_connection((address.hostname or "", address.port or 15002), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise LakehouseError(
            f"the Spark Connect server at {shown(url)} can't be reached ({error}); see `millrace status`, then retry"
        ) from None


def says(error: PySparkException, *conditions: str) -> bool:
    """Whether the error is of one of these conditions. Delta's reach the client as text only."""
    return any(f"[{condition}" in str(error) for condition in conditions)


def _lost(error: PySparkException) -> bool:
    """Whether the session is gone, rather than its work refused."""
    unavailable = isinstance(error, SparkConnectGrpcException) and "StatusCode.UNAVAILABLE" in str(error)
    return unavailable or says(error, "INVALID_HANDLE.SESSION", "RETRIES_EXCEEDED")


def _translated(url: str, error: PySparkException) -> Exception:
    said = _sentence(str(error))
    if says(error, "DELTA_CONCURRENT", "DELTA_METADATA_CHANGED", "DELTA_PROTOCOL_CHANGED"):
        return ConflictError(f"another writer committed first ({said})")
    if _lost(error):
        return LakehouseError(
            f"the Spark Connect server at {shown(url)} stopped answering; see its log and `millrace status`, then retry"
        )
    if "UNAUTHENTICATED" in said:
        return LakehouseError(
            f"the Spark Connect server at {shown(url)} refuses this token ({said}); "
            "set MILLRACE_SPARK_TOKEN to the one that it was started with"
        )
    return Refused(said)


def shown(url: str) -> str:
    """The address without its parameters: one may be a token."""
    return url.partition("/;")[0]


def _sentence(text: str) -> str:
    """What happened, out of a report with the stacks of two languages."""
    if full := re.search(r"No space left on device|Disk quota exceeded", text):
        return full.group()  # it stands deep among the causes
    if refused := re.search(r"AccessDeniedException: .*", text):
        return refused.group()[:600]  # and so does this
    text = text.split("JVM stacktrace:")[0]
    if "Traceback (most recent call last)" in text:
        # The last line of the innermost Python traceback that is an exception.
        raised = re.findall(r"^\s*(?:[\w.]+\.)?(\w*(?:Error|Exception|Exit|Interrupt)\b.*)$", text, re.MULTILINE)
        if raised:
            return str(raised[-1]).strip()
    return " ".join(text.split())[:600]
