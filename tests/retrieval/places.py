"""The places where index builds can be kept, for tests of what all of them promise."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from qdrant_client import QdrantClient

from millrace.applications import Application
from millrace.retrieval import index
from millrace.retrieval.builds import Builds
from millrace.retrieval.index import declared_builds
from millrace.retrieval.server import Server, connect
from millrace.retrieval.service import ServiceBuilds
from millrace.settings import Settings
from tests.retrieval.stand_in import StandIn

PLACES = ("library", "memory", "socket", "server")
"""Folders; the client's local mode; the same behind HTTP; a real server, where one is named."""


@dataclass(frozen=True)
class Kept:
    """An application whose builds are kept in one of the places."""

    settings: Settings
    application: Application

    @property
    def builds(self) -> Builds:
        return declared_builds(self.settings, self.application)


@contextmanager
def kept_in(
    place: str, settings: Settings, application: Application, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Kept]:
    if place == "library":
        yield Kept(settings, application)
    elif place == "memory":
        server = Server(QdrantClient(":memory:"), "memory")
        monkeypatch.setattr(index, "connect", lambda url, key: server)
        yield Kept(settings.model_copy(update={"qdrant_url": "http://memory"}), application)
    elif place == "socket":
        stand_in = StandIn()
        yield Kept(settings.model_copy(update={"qdrant_url": stand_in.url}), application)
        stand_in.stop()
    else:
        yield from _on_a_server(settings, application)


def _on_a_server(settings: Settings, application: Application) -> Iterator[Kept]:
    url = os.environ.get("TEST_QDRANT_URL")
    if not url:
        pytest.skip("MILLRACE_QDRANT_URL names no Qdrant server")
    given = Settings.model_validate(
        settings.model_dump() | {"qdrant_url": url, "qdrant_api_key": os.environ.get("TEST_QDRANT_API_KEY", "")}
    )
    kept = Kept(given, application.model_copy(update={"name": f"test_{uuid.uuid4().hex[:8]}"}))
    yield kept
    builds = kept.builds
    assert isinstance(builds, ServiceBuilds)
    client = connect(url, given.qdrant_api_key)
    client.ask("delete", lambda qdrant: qdrant.delete_collection(builds.collection))


def write_note(notes: Path, text: str) -> None:
    """Another content: one document of three is another one."""
    (notes / "bread.txt").write_text(text)
