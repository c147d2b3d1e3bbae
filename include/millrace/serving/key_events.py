"""What happens to API keys: made, revoked, rotated, or shown and refused. Told in one place, to the log and to the
audit trail.

An event names keys by id; nothing in it opens anything.
"""

import logging
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from millrace.lakehouse.audit.chain import record_act
from millrace.settings import Settings
from millrace.sources.event_log import now

log = logging.getLogger("millrace.keys")


Kind = Literal["created", "revoked", "rotated", "refused"]


@dataclass(frozen=True)
class KeyEvent:
    """`actor` did it, or showed it."""

    kind: Kind
    key_id: str | None
    """None: what was shown is no key of this environment."""
    actor: str
    """Who, as the operating system knows them; the gateway, where it refused."""
    told: str
    """What the key may do, why it ended, why it was refused; for the log, since people wrote some of it."""
    scopes: tuple[str, ...] = ()
    applications: tuple[str, ...] | None = None
    """None: all."""
    expires_at: datetime | None = None
    at: datetime = field(default_factory=now)


def record_key_event(settings: Settings, event: KeyEvent) -> None:
    """Every event passes here once. Refusals of one key for one reason: the first in a minute; the audit trail has
    them among its uses (`admission.py`).

    Raises:
        LakehouseError: the audit trail can't be written; what happened to the key stands.
    """
    log.info(
        "%s: API key %s %s by %s: %s",
        settings.environment,
        event.key_id or "unknown",
        event.kind,
        event.actor,
        event.told,
    )
    if event.kind == "refused":
        return
    record_act(
        settings, event.actor, "key", f"key/{event.key_id}", event.kind,
        at=event.at, details=_allowed(event),
    )  # fmt: skip


def _allowed(event: KeyEvent) -> dict[str, Any]:
    """What the key may do, so that the trail tells of every key there is (`environments/access/gateway_wall.py`)."""
    return {
        "scopes": list(event.scopes),
        "applications": None if event.applications is None else list(event.applications),
        "expires_at": event.expires_at and event.expires_at.isoformat(),
    }
