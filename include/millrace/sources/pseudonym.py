"""The name under which a user is stored: a keyed hash, so that without the key nobody can tell who it was."""

import contextlib
import hashlib
import hmac
import os
from pathlib import Path

from millrace.errors import SettingsError
from millrace.settings import Settings


def pseudonym(key: bytes, user: str) -> str:
    """32 hexadecimal digits (128 bits of HMAC-SHA256); the same user has the same one in every application."""
    return hmac.digest(key, user.encode(), hashlib.sha256).hex()[:32]


def noted_in(settings: Settings) -> Path:
    """Where a home notes which key its users' pseudonyms are made with."""
    return settings.home / "events" / f"{settings.environment}.pseudonym_key"


def require_same_key(key: bytes, noted: Path) -> None:
    """
    Args:
        noted: the file in which `note_key` noted the key of what is stored; it need not be there.

    Raises:
        SettingsError: `key` is another.
    """
    with contextlib.suppress(FileNotFoundError):
        found = noted.read_text().strip()
        if found and not hmac.compare_digest(found, _fingerprint(key)):  # empty: nothing could be noted
            raise SettingsError(
                "MILLRACE_PSEUDONYM_KEY is another than what is stored was written with, so every user would be a "
                "stranger: their exposures, ratings and erasures would not be found. Set the key from before; if it is "
                f"lost, or they shall be strangers, remove {noted}"
            )


def note_key(key: bytes, noted: Path) -> None:
    """Write down which key it is, unless one is noted; the key can't be told from that. On a full disk the next start
    does it."""
    with contextlib.suppress(OSError):
        noted.parent.mkdir(parents=True, exist_ok=True)
        making = noted.with_name(f".{noted.name}.{os.getpid()}")
        try:
            making.write_text(_fingerprint(key))
            with contextlib.suppress(FileNotFoundError):
                if not noted.read_text().strip():  # as an earlier Millrace left it on a full disk
                    noted.unlink()
            os.link(making, noted)  # whole, and only if there is none
        finally:
            making.unlink(missing_ok=True)


def _fingerprint(key: bytes) -> str:
    return pseudonym(key, "which key is it?")
