"""Gateways over parrots, in every state that a test needs."""

import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from millrace.applications import Application
from millrace.releases.split import Split
from millrace.serving.api_keys import ApiKey
from millrace.serving.key_store import KeyStore
from millrace.settings import Settings
from millrace.sources.feedback import land_events, refine_feedback
from millrace.stack.postgres import Postgres
from tests.serving.databases import Database
from tests.serving.parrot import EVER, Drawer, Gateway, Parrot, Shelf, a_release, listening


@pytest.fixture
def start(settings: Settings, qa: Application, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Gateway]]:
    """Starts a gateway over a shelf; stops it, gracefully, at the end of the test."""
    monkeypatch.setattr("millrace.serving.traffic.POLL_SECONDS", 0.05)
    with ExitStack() as running:

        def run(shelf: Shelf, drawer: Drawer | None = None, ready: bool = True, **changes: Any) -> Gateway:
            changed = settings.model_copy(update=changes)
            gateway = running.enter_context(listening(changed, qa, shelf, drawer or Drawer()))
            if ready:
                gateway.wait_until(gateway.ready)
            return gateway

        yield run


@pytest.fixture
def gateway(start: Callable[..., Gateway]) -> Gateway:
    """One champion, no rollout."""
    drawer = Drawer()
    return start(Shelf(Split(sequence=0, champion="1"), {"1": a_release(Parrot(), drawer)}), drawer)


@pytest.fixture(scope="module")
def unmoved(tmp_path_factory: pytest.TempPathFactory, qa: Application) -> Iterator[Gateway]:
    """The same, for all tests of a module that leave nothing behind."""
    home = tmp_path_factory.mktemp("unmoved")
    settings = Settings(home=home, completion_key="test completion key", pseudonym_key="test pseudonym key")
    drawer = Drawer()
    shelf = Shelf(Split(sequence=0, champion="1"), {"1": a_release(Parrot(), drawer)})
    with listening(settings, qa, shelf, drawer) as gateway:
        gateway.wait_until(gateway.ready)
        yield gateway
        assert gateway.events() == []


@pytest.fixture
def ingest(settings: Settings, qa: Application) -> Callable[[], None]:
    """Everything in the event log into silver, twice, as a retried task would."""

    def run() -> None:
        for _ in range(2):
            land_events(settings, qa, *EVER, run="test")
            refine_feedback(settings, qa, *EVER, run="test")

    return run


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of its own, of 64 KiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small tmpfs")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture(scope="session")
def postgres(open_folder: Path) -> Iterator[Postgres]:
    """One PostgreSQL for the whole session. Tests share it: each makes a database of its own."""
    folder = Path(tempfile.mkdtemp(dir=open_folder))
    server = Postgres(folder / "postgres")
    server.prepare()
    user = server.system_user
    process = subprocess.Popen(
        server.command(), user=user, group=user, extra_groups=[] if user else None, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while not server.answers():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield server
    finally:
        process.send_signal(signal.SIGQUIT)  # at once: nothing of it is kept
        process.wait(30)


@pytest.fixture
def database(postgres: Postgres) -> Iterator[Database]:
    """An empty database, and its ways of being away."""
    name = f"keys_{uuid.uuid4().hex}"
    postgres.create_database(name)
    with Database(name, postgres.url(name), postgres.url("postgres")) as made:
        yield made


@pytest.fixture
def keyed(settings: Settings, database: Database) -> Settings:
    """Settings of a gateway that requires keys."""
    return settings.model_copy(update={"gateway_keys": "required", "keys_url": SecretStr(database.url)})


@pytest.fixture
def store(keyed: Settings) -> Iterator[KeyStore]:
    made = KeyStore(keyed)
    yield made
    made.close()


@pytest.fixture
def make(store: KeyStore) -> Callable[..., tuple[ApiKey, str]]:
    """Makes a key for scopes; without more it has no limits."""

    def run(*scopes: str, into: KeyStore = store, **changes: Any) -> tuple[ApiKey, str]:
        about: dict[str, Any] = {
            "owner": "ann",
            "applications": None,
            "requests_per_minute": None,
            "monthly_budget_usd": None,
            "expires_at": None,
            "actor": "bob",
        }
        return into.create("a test", scopes=scopes or ("ask", "feedback"), **about | changes)

    return run
