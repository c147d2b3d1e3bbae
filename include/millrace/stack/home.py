"""The data directory of a deployment: its format version, its secrets, and the lock of whoever runs the stack.

It does not know which parts there are.
"""

import base64
import fcntl
import json
import os
import secrets
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from millrace import FORMAT_VERSION
from millrace.errors import StackError
from millrace.private_files import write_json, write_private
from millrace.secret_sources import SecretFile, is_set
from millrace.settings import Settings
from millrace.stack.migration import migrate


@dataclass(frozen=True)
class Secrets:
    """What the first start generates and later starts reuse. `secrets.json`, readable by its owner only."""

    completion_key: str
    pseudonym_key: str
    airflow_password: str
    airflow_service_password: str
    airflow_fernet_key: str
    airflow_jwt_secret: str
    airflow_secret_key: str
    spark_secret: str


PRIVATE = ("run", "logs", "lake", "events", "training", "releases", "indexes", "streams")
"""Folders that no other account of the machine may look into: what users said is in them."""
RESTORING = "restoring.json"
"""File of a home whose restore from a backup has begun and not ended."""


def prepare_home(settings: Settings) -> None:
    """Create `settings.home` with its folders, or check that this version may use what is there. A home of an older
    format is left for `bring_up_to_date`.

    Raises:
        StackError: a newer Millrace wrote it, its version can't be read, it can't be written, or its restore from a
            backup didn't end.
    """
    home = settings.home
    if (home / RESTORING).exists():
        raise StackError(f"{home} is half restored from a backup; repeat that `millrace restore`, which completes it")
    read_format(home)
    try:
        # As root, PostgreSQL runs as a user of its own, who must be able to pass through.
        home.mkdir(parents=True, exist_ok=True, mode=0o711 if os.geteuid() == 0 else 0o700)
        for name in PRIVATE:
            (home / name).mkdir(exist_ok=True, mode=0o700)
            # One that an earlier version made. A volume of somebody else's is theirs to close.
            if (home / name).stat().st_uid == os.geteuid():
                (home / name).chmod(0o700)
        if not (home / "format.json").exists():
            write_json(home / "format.json", {"format": FORMAT_VERSION})
    except OSError as error:
        raise StackError(f"{home} can't be used: {error.strerror}; set MILLRACE_HOME to a folder of yours") from None


def bring_up_to_date(home: Path) -> Path | None:
    """Migrate a home of an older format, whose lock the caller holds; the copy that was made of it, or None.

    Raises:
        StackError: it can't be done; the home is as it was.
    """
    found = read_format(home)
    if found is None or found == FORMAT_VERSION:
        return None
    copy = migrate(home, found)
    write_json(home / "format.json", {"format": FORMAT_VERSION})
    return copy


def read_format(home: Path) -> int | None:
    """The format of `home`; None: nothing was written there yet.

    Raises:
        StackError: a newer Millrace wrote it, or its version can't be read.
    """
    path = home / "format.json"
    if not path.exists():
        return None
    try:
        found = int(json.loads(path.read_text())["format"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StackError(f"{path} doesn't say which format the data has ({error!r}); restore it") from None
    if found > FORMAT_VERSION:
        raise StackError(
            f"{home} has format {found}, written by a newer Millrace, and this one knows up to {FORMAT_VERSION}; "
            "upgrade Millrace or set MILLRACE_HOME to another folder"
        )
    return found


def registry_mark(home: Path) -> Path:
    """The file that says which environment's releases are in the embedded MLflow."""
    return home / "mlflow" / "environment.json"


def obtain_secrets(home: Path) -> Secrets:
    """The secrets of `home`, generated where they are missing.

    Raises:
        StackError: the file is there and can't be understood. It is never replaced: pseudonyms depend on it.
    """
    path = home / "secrets.json"
    known: dict[str, str] = {}
    if path.exists():
        try:
            known = {str(name): str(value) for name, value in json.loads(path.read_text()).items()}
        except (OSError, ValueError, AttributeError) as error:
            raise StackError(f"{path} can't be read ({error}); restore it, or use another MILLRACE_HOME") from None
    made = Secrets(**{field.name: known.get(field.name) or _new_secret(field.name) for field in fields(Secrets)})
    if asdict(made) != known:
        write_json(path, known | asdict(made))
    return made


def with_secrets(settings: Settings, found: Secrets) -> Settings:
    """`settings` with its keys filled in from `found`, except those that the environment sets. The parts read them
    from files in `run/secrets`, made here, so that a rotation reaches those that run."""
    keys = {
        name: SecretFile(hand_out(settings.home, name, getattr(found, name)), f"MILLRACE_{name.upper()}")
        for name in ("completion_key", "pseudonym_key")
        if not is_set(getattr(settings, name))
    }
    return settings.model_copy(update=keys)


def hand_out(home: Path, name: str, value: str) -> Path:
    """The file from which the parts read a secret of `home`, with `value` in it."""
    folder = home / "run" / "secrets"
    folder.mkdir(exist_ok=True, mode=0o700)
    write_private(folder / name, value)
    return folder / name


def keep_secret(home: Path, name: str, value: str) -> Path:
    """Put `value` in the place of a secret that was generated, for those who run and for later starts. Returns where it
    is kept.

    Raises:
        StackError: as `obtain_secrets`.
    """
    obtain_secrets(home)  # which refuses what it can't understand
    path = home / "secrets.json"
    write_json(path, json.loads(path.read_text()) | {name: value})
    hand_out(home, name, value)
    return path


class HomeLock:
    """Held by the one process that runs the stack of a home. The kernel releases it when that process ends."""

    def __init__(self, home: Path) -> None:
        self._path = home / "run" / "lock"
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def acquire(self) -> bool:
        """Whether this process holds the lock now."""
        if self._descriptor is not None:
            return True
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _new_secret(name: str) -> str:
    if name == "airflow_fernet_key":
        return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()
    return secrets.token_urlsafe(18 if name == "airflow_password" else 64)
