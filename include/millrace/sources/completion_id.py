"""Signed completion ids: any replica with the key can tell an id that a gateway issued from one that somebody made up.

An id carries its application and when it was issued (so that a reader needs no older partitions); the signature
proves only that, not that the exchange completed. Holding an id is the permission to rate its answer.
"""

import base64
import hashlib
import hmac
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime

from millrace.errors import SourceError

PREFIX = "chatcmpl-"
_TAG = 22  # characters: 16 bytes of HMAC-SHA256
_TIME, _RANDOM = 4, 12  # bytes
LONGEST = 200
"""Characters; nothing longer is even decoded."""


@dataclass(frozen=True)
class Issued:
    """What a verified id says of itself. `at` in UTC, whole seconds."""

    application: str
    at: datetime


def issue(key: bytes, application: str, at: datetime) -> str:
    """A new id for an exchange of `application` that begins at `at`."""
    payload = int(at.timestamp()).to_bytes(_TIME) + secrets.token_bytes(_RANDOM) + application.encode()
    text = _encoded(payload)
    return f"{PREFIX}{text}{_tag(key, text)}"


def verify(key: bytes, completion_id: str) -> Issued:
    """What `completion_id` says.

    Raises:
        SourceError: no gateway with this key issued it.
    """
    text, tag = completion_id.removeprefix(PREFIX)[:-_TAG], completion_id[-_TAG:]
    well_formed = completion_id.startswith(PREFIX) and len(completion_id) <= LONGEST and completion_id.isascii()
    # The tag is over the text itself, so that no second spelling of the same bytes passes.
    if not well_formed or not text or not hmac.compare_digest(tag, _tag(key, text)):
        raise SourceError(
            f"completion id {completion_id[:LONGEST]!r} was not issued by this deployment; send the id of an answer"
        )
    payload = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    return Issued(
        application=payload[_TIME + _RANDOM :].decode(),
        at=datetime.fromtimestamp(int.from_bytes(payload[:_TIME]), UTC),
    )


def _tag(key: bytes, text: str) -> str:
    return _encoded(hmac.digest(key, text.encode(), hashlib.sha256)[:16])


def _encoded(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()
