"""Signed completion ids: any replica with the key can tell an id that a gateway issued from one that somebody made up.

An id carries its application and when it was issued (so that a reader needs no older partitions); the signature
proves only that, not that the exchange completed. Holding an id is the permission to rate its answer.

The setting holds one key a line, the newest first. It signs; those after it verify, each for ever or, as in
`<key> until 2026-08-01T00:00:00+00:00`, what happens until then. So a rotation ends no conversation, and what was
accepted in its time stays accepted when tables are made again.
"""

import base64
import hashlib
import hmac
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import SecretStr

from millrace.errors import SettingsError, SourceError

PREFIX = "chatcmpl-"
_TAG = 22  # characters: 16 bytes of HMAC-SHA256
_TIME, _RANDOM = 4, 12  # bytes
LONGEST = 200
"""Characters; nothing longer is even decoded."""
_UNTIL = " until "

log = logging.getLogger("millrace.secrets")


@dataclass(frozen=True)
class Issued:
    """What a verified id says of itself. `at` in UTC, whole seconds."""

    application: str
    at: datetime


@dataclass(frozen=True)
class CompletionKey:
    """One key, and until when it verifies; None: for ever."""

    key: bytes
    until: datetime | None = None


class CompletionKeys:
    """The keys of a deployment, read from its secret anew at each use: a rotation counts at once. Thread-safe."""

    def __init__(self, secret: SecretStr) -> None:
        """
        Raises:
            SettingsError: there is no key, or a line can't be understood.
        """
        self._secret = secret
        self._text = secret.get_secret_value()
        self._keys = read_keys(self._text)

    def issue(self, application: str, at: datetime) -> str:
        """As `issue`, with the newest key."""
        return issue(self._all()[0].key, application, at)

    def verify(self, completion_id: str, at: datetime | None) -> Issued:
        """What `completion_id` says.

        Args:
            at: when it is shown, so that a key that had ended by then doesn't count; None: whenever.

        Raises:
            SourceError: no gateway with one of these keys issued it.
        """
        keys = self._all()
        for one in keys[1:]:
            if one.until is None or at is None or at <= one.until:
                try:
                    return verify(one.key, completion_id)
                except SourceError:
                    continue
        return verify(keys[0].key, completion_id)

    def _all(self) -> list[CompletionKey]:
        text = self._secret.get_secret_value()
        if text != self._text:
            try:
                self._keys = read_keys(text)
            except SettingsError as error:
                log.error("%s; the keys before go on", error)
            self._text = text
        return self._keys


def read_keys(text: str) -> list[CompletionKey]:
    """The keys that the setting's text lists, the one that signs first.

    Raises:
        SettingsError: there is none, or a line can't be understood; no key is in the message.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise SettingsError("MILLRACE_COMPLETION_KEY is empty; `millrace up` makes one, or set your own")
    return [_read_key(number, line) for number, line in enumerate(lines)]


def write_keys(keys: Sequence[CompletionKey]) -> str:
    """The text that `read_keys` reads."""
    return "\n".join(
        one.key.decode() + (f"{_UNTIL}{one.until.astimezone(UTC).isoformat()}" if one.until else "") for one in keys
    )


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


def _read_key(number: int, line: str) -> CompletionKey:
    key, until, moment = line.rpartition(_UNTIL)
    if not until:
        return CompletionKey(line.encode())
    try:
        end = datetime.fromisoformat(moment)
    except ValueError:
        end = None
    if not key or end is None or end.tzinfo is None:
        raise SettingsError(
            f"line {number + 1} of MILLRACE_COMPLETION_KEY doesn't say until when its key verifies: write `<key>"
            f"{_UNTIL}2026-08-01T00:00:00+00:00`, with a time zone"
        )
    if number == 0:
        raise SettingsError("the first key of MILLRACE_COMPLETION_KEY signs and has no end; put a new key before it")
    return CompletionKey(key.encode(), end)


def _tag(key: bytes, text: str) -> str:
    return _encoded(hmac.digest(key, text.encode(), hashlib.sha256)[:16])


def _encoded(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()
