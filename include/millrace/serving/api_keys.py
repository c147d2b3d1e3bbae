"""What an API key of the gateway is: how it is made and recognised, and what its holder may do. It knows no database.

A key is written `mr_<environment>_<id>_<secret>`. Only its SHA-256 is stored. That is enough here: the secret is 256
random bits, which nobody finds by guessing; slow hashes are for passwords, which people choose, and would cost every
request. An id is no secret: lists and logs show it.
"""

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, get_args

Scope = Literal["ask", "feedback", "pin", "admin"]
"""`ask` a question, give `feedback`, `pin` a release (`qa@12`), read what is for operators (`admin`: /metrics). None
holds another."""
SCOPES: tuple[Scope, ...] = get_args(Scope)

_WRITTEN = re.compile(r"mr_(dev|staging|prod)_([0-9a-f]{12})_[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True)
class ApiKey:
    """A key as it is stored, which is without its secret, and what it has spent."""

    id: str
    environment: str
    name: str
    """What it is for."""
    owner: str
    scopes: frozenset[str]
    applications: frozenset[str] | None
    """None: all."""
    requests_per_minute: int | None
    """None: no limit. So many at once, and one more each time its share of a minute has passed."""
    monthly_budget_usd: float | None
    """Of a calendar month, UTC; None: no limit."""
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    """When an answer was last charged to it."""
    month_usd: float
    """Spent in this calendar month, UTC."""
    total_usd: float
    sha256: bytes = field(repr=False)
    earlier_sha256: bytes | None = field(repr=False)
    """Of the secret before the last rotation."""
    earlier_until: datetime | None
    """When that one ceases to be valid."""

    def opened_by(self, written: str, at: datetime) -> bool:
        """Whether `written` is this key, or what it was before a rotation and still is. In constant time."""
        shown = digest(written)
        earlier = self.earlier_sha256 if self.earlier_until is not None and at < self.earlier_until else None
        return hmac.compare_digest(shown, self.sha256) | hmac.compare_digest(shown, earlier or b"")

    def ended(self, at: datetime) -> str | None:
        """Why it is not valid any more; None: it is."""
        if self.revoked_at is not None:
            return f"was revoked on {self.revoked_at:%Y-%m-%d}"
        if self.expires_at is not None and at >= self.expires_at:
            return f"expired on {self.expires_at:%Y-%m-%d}"
        return None

    def reaches(self, application: str) -> bool:
        return self.applications is None or application in self.applications


@dataclass(frozen=True)
class Written:
    """What a key says of itself to whoever reads it, valid or not."""

    environment: str
    id: str


def new_key(environment: str) -> tuple[str, str]:
    """The id of a new key, and the key as its holder writes it."""
    made = secrets.token_hex(6)
    return made, new_secret(environment, made)


def new_secret(environment: str, key_id: str) -> str:
    """A key with this id and a new secret, as its holder writes it."""
    return f"mr_{environment}_{key_id}_{secrets.token_hex(32)}"


def read_key(written: str) -> Written | None:
    """What a key says of itself; None: it is not one of ours."""
    found = _WRITTEN.fullmatch(written)
    return Written(*found.groups()) if found else None


def digest(written: str) -> bytes:
    """What is stored of a key: SHA-256 of all of it, so that neither id nor environment can be exchanged."""
    return hashlib.sha256(written.encode()).digest()
