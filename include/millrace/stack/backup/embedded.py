"""The stores that the embedded stack keeps in the home, PostgreSQL and the object store: those that run, or else each
alone for as long as a backup or a restore needs it.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from millrace.errors import BackupError
from millrace.settings import PROJECT, Settings
from millrace.stack.home import HomeLock
from millrace.stack.object_store import object_store_parts
from millrace.stack.parts import postgres_part
from millrace.stack.postgres import Postgres
from millrace.stack.runner import running_alone


def runs(settings: Settings, *, databases: bool) -> bool:
    """Whether the stores answer, of which `databases` is one."""
    postgres = not databases or Postgres(settings.home / "postgres").answers()
    return postgres and (not settings.object_store_port or object_store_parts(settings)[0].ready(0))


@contextmanager
def running_postgres(settings: Settings) -> Iterator[Postgres]:
    """The caller holds the home's lock unless it runs.

    Raises:
        StackError: it can't be started.
    """
    postgres = Postgres(settings.home / "postgres")
    with ExitStack() as running:
        if not postgres.answers():
            running.enter_context(running_alone(postgres_part(settings), settings.home, PROJECT))
        yield postgres


@contextmanager
def running_object_store(settings: Settings) -> Iterator[None]:
    """As `running_postgres`; nothing, where the lake is elsewhere."""
    parts = object_store_parts(settings) if settings.object_store_port else []
    with ExitStack() as running:
        if parts and not parts[0].ready(0):
            for part in parts:
                running.enter_context(running_alone(part, settings.home, PROJECT))
        yield


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """Nobody else starts the stack of `home` meanwhile.

    Raises:
        BackupError: somebody does.
    """
    (home / "run").mkdir(exist_ok=True, mode=0o700)
    (home / "logs").mkdir(exist_ok=True, mode=0o700)
    lock = HomeLock(home)
    if not lock.acquire():
        raise BackupError(f"the stack of {home} is starting or ending; try again when it has")
    try:
        yield
    finally:
        lock.release()
