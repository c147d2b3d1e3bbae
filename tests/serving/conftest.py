"""Gateways over parrots, in every state that a test needs."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from millrace.applications import Application
from millrace.releases.split import Split
from millrace.settings import Settings
from millrace.sources.feedback import land_events, refine_feedback
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
