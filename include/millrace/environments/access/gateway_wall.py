"""What API keys an environment's gateway has, as its audit trail tells: whoever reads its lake can read that.

Every key that is made, rotated or revoked is in the trail with what it may do, as `millrace key` keeps it. What
somebody changes in the database by hand isn't. Keys are counted by what they may do; whose they are doesn't matter.
"""

import json
from collections import Counter
from datetime import datetime
from typing import Any

import pyarrow.compute as pc

from millrace.environments.access.matrix import Held
from millrace.errors import AccessError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_AUDIT, PLATFORM
from millrace.settings import Settings

KEY = "key/"
"""How the resource of an entry begins that is about a key of the gateway."""


def held(settings: Settings, environment: str, *, at: datetime) -> list[Held]:
    """How many valid keys there are, by what they may do.

    Raises:
        LakehouseError: the trail can't be read, or the caller may not.
        AccessError: an older Millrace made a key, and told too little of it.
    """
    lake = Lake.of(settings, PLATFORM, environment=environment)
    if not lake.exists(OPS_AUDIT):
        return []
    names = ["sequence", "resource", "outcome", "details"]
    rows = lake.read(OPS_AUDIT, names, where=pc.field("action") == "key").sort_by("sequence").to_pylist()
    last = {row["resource"]: row for row in rows if row["resource"].startswith(KEY)}
    valid = [json.loads(row["details"]) for row in last.values() if row["outcome"] != "revoked"]
    if untold := sum("expires_at" not in details for details in valid):
        raise AccessError(
            f"an older Millrace made {untold} of the keys of {environment}, and told the audit trail too little of "
            "them; rotate or revoke them (`millrace key list`)"
        )
    found = Counter(_what(details) for details in valid if not _ended(details["expires_at"], at))
    return [
        Held(f"keys for {scopes}", applications, f"{count} of them")
        for (scopes, applications), count in sorted(found.items())
    ]


def _ended(expires_at: str | None, at: datetime) -> bool:
    return expires_at is not None and datetime.fromisoformat(expires_at) <= at


def _what(details: dict[str, Any]) -> tuple[str, str]:
    """Scopes, and applications; empty: all."""
    return ", ".join(details["scopes"]), ", ".join(details["applications"] or ())
