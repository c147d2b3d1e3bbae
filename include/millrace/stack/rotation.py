"""Where this deployment's secrets come from, and a new completion key while everything runs.

Of all secrets only this one is Millrace's own to rotate: the others are issued by the servers that ask for them, and
the pseudonym key stays, since with another one every user would be a stranger.
"""

import os
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from pydantic import SecretStr

from millrace.errors import SettingsError
from millrace.lakehouse.audit.chain import record_act
from millrace.private_files import write_private
from millrace.secret_sources import SecretFile, SecretVariable, is_set
from millrace.settings import Settings
from millrace.sources.completion_id import CompletionKey, read_keys, write_keys
from millrace.stack.home import Secrets, keep_secret, obtain_secrets

COMPLETION_KEY = "completion_key"


@dataclass(frozen=True)
class Rotated:
    """`kept` is the file with the keys; ids that the key before signed are taken until `until`."""

    kept: Path
    until: datetime


def source(settings: Settings, name: str) -> str:
    """Where the secret `name` comes from, for a person; never what it is. Asks no vault."""
    secret: SecretStr = getattr(settings, name)
    if isinstance(secret, SecretFile):
        return f"file {secret.path}"
    if isinstance(secret, SecretVariable):
        return f"Airflow's Variable {secret.variable}"
    if is_set(secret):
        return "environment"
    generated = settings.home / "secrets.json"
    return f"generated, {generated}" if name in Secrets.__annotations__ and generated.exists() else ""


def completion_keys(settings: Settings) -> tuple[CompletionKey, ...]:
    """This deployment's keys, the one that signs first; none, where none was generated or set yet, or Airflow has it.

    Raises:
        SettingsError: they can't be read.
    """
    if isinstance(settings.completion_key, SecretVariable):
        return ()
    text = settings.completion_key.get_secret_value()
    if not text and (settings.home / "secrets.json").exists():
        text = obtain_secrets(settings.home).completion_key
    return tuple(read_keys(text)) if text else ()


def rotate_completion_key(settings: Settings, new: str, *, overlap: timedelta, actor: str, now: datetime) -> Rotated:
    """Sign with `new` from now on. Every gateway and task that reads the file follows at its next use.

    Args:
        overlap: how long ids that the key before signed are still taken.
        actor: the person who does it.

    Raises:
        SettingsError: the keys come from where they can't be changed, or there are none yet.
        StackError: the home's secrets can't be read.
        LakehouseError: the audit trail can't be written; the rotation stands.
    """
    secret, until = settings.completion_key, now + overlap
    if isinstance(secret, SecretVariable):
        raise SettingsError("MILLRACE_COMPLETION_KEY comes from Airflow's secrets backend; rotate it there")
    if not isinstance(secret, SecretFile) and is_set(secret):
        raise SettingsError(
            "MILLRACE_COMPLETION_KEY comes from the environment, which no process can change for the others: put it in "
            "a file and name that in MILLRACE_COMPLETION_KEY_FILE"
        )
    found = completion_keys(settings)
    if not found:
        raise SettingsError(f"there is no completion key in {settings.home} yet; the first `millrace up` makes one")
    before, *earlier = found
    text = write_keys([CompletionKey(new.encode()), CompletionKey(before.key, until), *earlier])
    if isinstance(secret, SecretFile):
        kept = secret.path
        _rewrite(kept, text)
    else:
        kept = keep_secret(settings.home, COMPLETION_KEY, text)
    record_act(
        settings, actor, "key", f"secret/{COMPLETION_KEY}", "rotated",
        at=now, details={"earlier_until": until.isoformat()},
    )  # fmt: skip
    return Rotated(kept, until)


def _rewrite(path: Path, text: str) -> None:
    """Replace the content of somebody's file in one step; whoever could read it can read it then.

    Raises:
        SettingsError: it can't be written, or would be another user's than before.
    """
    new = path.with_name(f".{path.name}.new")
    try:
        found = path.stat()
        write_private(new, text)
        new.chmod(found.st_mode)
        os.chown(new, found.st_uid, found.st_gid)
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise SettingsError(
            f"{path} can't be replaced ({error.strerror}); rotate as the user whose file it is"
        ) from None
