"""A lease: of those that ask for it, one at a time has it, until it gives it back or falls silent for its term.

It is one object in the lake's store, written only by conditional puts, so two can't take it at once. Whoever has it
writes it anew every sixth of the term. Whoever wants it takes it after watching it unchanged for a whole term by its
own clock: no two machines' clocks are compared. Whoever could not write it for half the term counts it as lost; with
tries that may take a sixth of it, one in a third, that leaves a sixth to have stopped by.
"""

import json
import time
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from botocore.exceptions import BotoCoreError, ClientError

from millrace.errors import AccessRefused, LakehouseError
from millrace.lakehouse.storage import ObjectStore, bucket_and_prefix

TERM = 30.0
"""Seconds."""


@dataclass
class Lease:
    """Of `what`, at `uri` (`s3://bucket/key`), for `holder`, which a person reads when refused."""

    store: ObjectStore
    uri: str
    what: str
    holder: str
    term: float = TERM
    _etag: str = field(default="", init=False)
    """Of the object as this holder wrote it; empty: it has no lease."""
    _written: float = field(default=0.0, init=False)
    """When it began to write that, by the monotonic clock."""
    _count: int = field(default=0, init=False)
    _token: str = field(default_factory=lambda: uuid4().hex, init=False)

    def __post_init__(self) -> None:
        self._bucket, self._key = bucket_and_prefix(self.uri)
        self._client: Any = self.store.client(seconds=self.term / 12, tries=1)  # to connect, and to answer

    def acquire(self) -> None:
        """Take it; where somebody has it, wait until it is known whether they live.

        Raises:
            LakehouseError: they do, or the store does not answer.
            AccessRefused: the store refuses this identity.
        """
        try:
            seen, etag = self._look()
            since = time.monotonic()
            while seen and not seen["given_back"] and time.monotonic() - since < self.term:
                time.sleep(self.term / 30)
                found, found_etag = self._look()
                if found_etag != etag and found and not found["given_back"]:
                    raise self._held(found)
                seen, etag = found, found_etag
            if not self._write({"IfMatch": etag} if etag else {"IfNoneMatch": "*"}):
                raise self._held(self._look()[0])
        except (ClientError, BotoCoreError) as error:
            raise LakehouseError(
                f"the lease of {self.what} ({self.uri}) can't be had: {error}; see the object store"
            ) from error

    def renew(self) -> None:
        """Say that its holder lives. A store that doesn't answer is asked again by the next call.

        Raises:
            LakehouseError: it is lost: somebody else took it, or nobody can know that nobody did.
        """
        lost = f"the lease of {self.what} ({self.uri}) is lost"
        try:
            if self._write({"IfMatch": self._etag}):
                return
            found, etag = self._look()
            if found.get("token") != self._token:
                raise LakehouseError(f"{lost}: {found.get('holder', 'somebody else')} has it")
            # An earlier renewal arrived, and its answer did not. Counted on: the next must be seen as another.
            self._etag, self._count = etag, found["count"]
        except (ClientError, BotoCoreError) as error:
            if time.monotonic() - self._written > self.term / 2:
                raise LakehouseError(f"{lost}: the object store did not answer in time ({error})") from error

    def give_back(self) -> None:
        """Let the next one have it at once. Without an answer of the store it has to wait for the term."""
        try:
            self._write({"IfMatch": self._etag}, given_back=True)
        except (ClientError, BotoCoreError):
            return

    def _look(self) -> tuple[dict[str, Any], str]:
        """What it says, and its ETag; nothing, if nobody ever took it."""
        try:
            found = self._client.get_object(Bucket=self._bucket, Key=self._key)
        except ClientError as error:
            if error.response["Error"]["Code"] == "NoSuchKey":
                return {}, ""
            raise self._refused(error) from error
        return json.loads(found["Body"].read()), found["ETag"]

    def _write(self, condition: dict[str, str], *, given_back: bool = False) -> bool:
        """Whether it could be written on this condition."""
        began = time.monotonic()
        said = {"holder": self.holder, "token": self._token, "count": self._count + 1, "given_back": given_back}
        try:
            written = self._client.put_object(
                Bucket=self._bucket, Key=self._key, Body=json.dumps(said).encode(), **condition
            )
        except ClientError as error:
            if error.response["Error"]["Code"] in ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey"):
                return False
            raise self._refused(error) from error
        self._etag, self._written, self._count = written["ETag"], began, self._count + 1
        return True

    def _held(self, said: dict[str, Any]) -> LakehouseError:
        return LakehouseError(
            f"{said.get('holder', 'somebody')} has the lease of {self.what} ({self.uri}) and renews it; end that one "
            "first, or choose another lake or environment"
        )

    def _refused(self, error: ClientError) -> Exception:
        """`error`, or what it means for a person."""
        if error.response["Error"]["Code"] != "AccessDenied":
            return error
        return AccessRefused(
            f"the object store does not let {self.store.identity} take the lease of {self.what} ({self.uri}); use the "
            "credential of the environment that it is of (docs/lake.md)"
        )
