"""Requests to a Qdrant server: bounded in time, asked again where that can help, and failing in one sentence.

It knows HTTP and keys; what is asked is its callers' business. Every request that goes through here is idempotent, so
that asking again is safe.
"""

import logging
import random
import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

from pydantic import SecretStr

from millrace.errors import RetrievalError
from millrace.secret_sources import NO_SECRET, hide

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

log = logging.getLogger("millrace.retrieval")

T = TypeVar("T")

WAITS = (0.5, 1.0, 2.0, 4.0)
"""Seconds before a builder asks again, each lengthened by up to a half at random."""
SEARCH_WAITS = (0.1,)
"""The same while a user waits for an answer."""
TIMEOUT = 30
"""Seconds that one request of a builder may take."""
SEARCH_TIMEOUT = 5
"""The same while a user waits."""

_PASSING = {408, 429, 500, 502, 503, 504}


class Missing(RetrievalError):
    """The server has no such collection."""


class Server:
    """A Qdrant server, or what has its API. Thread-safe if `client` is.

    Args:
        address: its URL, for a person.
        api_key: what is never in a message, even if the server says it back.
    """

    def __init__(self, client: "QdrantClient", address: str, api_key: SecretStr = NO_SECRET) -> None:
        self._client = client
        self.address = address
        self._api_key = api_key

    def ask(self, what: str, request: Callable[["QdrantClient"], T], waits: tuple[float, ...] | None = None) -> T:
        """What `request` returns.

        Args:
            what: it does, as the end of "this key may not …".
            waits: seconds before each further try; None: `WAITS`. Where they are `SEARCH_WAITS`, a server that asks to
                be left alone for more than `SEARCH_TIMEOUT` isn't asked again.

        Raises:
            Missing: there is no such collection.
            RetrievalError: the server can't be reached, refuses the key, or answers something else.
        """
        waits = WAITS if waits is None else waits
        for wait in (*waits, None):
            try:
                return request(self._client)
            except RetrievalError:  # said by `request` itself
                raise
            except Exception as error:  # the client raises its own, httpx's, and in local mode ValueError
                again = _worth_another_try(error)
                hurry = waits is SEARCH_WAITS
                if wait is None or again is None or (hurry and again > SEARCH_TIMEOUT):
                    raise self._sentence(error, what) from error
                pause = max(again, wait * (1 + random.random() / 2))
                log.warning("Qdrant at %s: %s; asking again in %.1f s", self.address, self._reason(error), pause)
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _sentence(self, error: Exception, what: str) -> RetrievalError:
        from qdrant_client.http.exceptions import UnexpectedResponse

        reason = self._reason(error)
        if isinstance(error, UnexpectedResponse):
            if error.status_code in (401, 403):
                return RetrievalError(
                    f"Qdrant at {self.address} refuses {_whose(self._api_key)} ({reason}): it may not {what}; set "
                    "MILLRACE_QDRANT_API_KEY to one that may (docs/qdrant.md)"
                )
            if error.status_code == 404 and "not found" not in reason.lower():
                return RetrievalError(f"{self.address} is no Qdrant server ({reason}); correct MILLRACE_QDRANT_URL")
            if error.status_code == 404:
                return Missing(f"Qdrant at {self.address}: {reason}; run refresh_embeddings")
        if isinstance(error, ValueError) and "not found" in reason:  # local mode's 404
            return Missing(f"Qdrant at {self.address}: {reason}; run refresh_embeddings")
        if _is_tls(error):
            return RetrievalError(
                f"Qdrant at {self.address}: no trusted TLS connection ({reason}); correct MILLRACE_QDRANT_URL, or name "
                "the authority that signed its certificate in SSL_CERT_FILE"
            )
        if _is_network(error):
            return RetrievalError(
                f"Qdrant at {self.address} doesn't answer ({reason}); start it, or correct MILLRACE_QDRANT_URL"
            )
        return RetrievalError(f"Qdrant at {self.address} could not {what}: {reason}")

    def _reason(self, error: Exception) -> str:
        return hide(_reason(error), self._api_key)


def _whose(key: SecretStr) -> str:
    """Whose key this is, if it says so of itself, as a token of `millrace access` does."""
    import jwt

    try:
        said = jwt.decode(key.get_secret_value(), options={"verify_signature": False})
    except jwt.InvalidTokenError:
        return "this key"
    return f"the token of {said.get('subject', 'nobody')}"


@lru_cache(maxsize=8)
def connect(url: str, api_key: SecretStr) -> Server:
    """The server at `url`; one client, with its connections, per process. Sends nothing yet.

    Args:
        url: `http://…` or `https://…` (TLS), with the port unless it is 6333.
        api_key: an API key or a JWT, asked before every request, so that a rotated one counts from the next on; empty:
            none.
    """
    from qdrant_client import QdrantClient

    # The server takes a key as a bearer's token, too; only that the client asks for anew.
    provider = api_key.get_secret_value if api_key.get_secret_value() else None
    with warnings.catch_warnings():
        # A key over plain HTTP is for a server on this machine or in a private network: docs/qdrant.md says so.
        warnings.filterwarnings("ignore", message="Auth token provider is used with an insecure connection")
        client = QdrantClient(url=url, auth_token_provider=provider, timeout=TIMEOUT, check_compatibility=False)
    return Server(client, url, api_key)


def _worth_another_try(error: Exception) -> float | None:
    """Seconds to wait at least; None: asking again can't help."""
    from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
    from qdrant_client.http.exceptions import UnexpectedResponse

    if isinstance(error, ResourceExhaustedResponse):
        return min(float(error.retry_after_s), TIMEOUT)
    if isinstance(error, UnexpectedResponse):
        return 0.0 if error.status_code in _PASSING else None
    return 0.0 if _is_network(error) and not _is_tls(error) else None


def _is_network(error: Exception) -> bool:
    import httpx
    from qdrant_client.http.exceptions import ResponseHandlingException

    source = error.source if isinstance(error, ResponseHandlingException) else error
    return isinstance(source, httpx.TransportError)


def _is_tls(error: Exception) -> bool:
    return _is_network(error) and "SSL" in _reason(error)


def _reason(error: Exception) -> str:
    """In a few words, what the server or the network said."""
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

    if isinstance(error, UnexpectedResponse):
        try:
            said = error.structured()["status"]["error"]
        except (ValueError, KeyError, TypeError):
            said = error.content.decode(errors="replace").strip() or error.reason_phrase
        return f"{error.status_code}: {' '.join(str(said).split())[:300]}"
    if isinstance(error, ResponseHandlingException):
        return _reason(error.source)
    return " ".join(str(error).split())[:300] or type(error).__name__
