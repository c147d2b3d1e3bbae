"""From Delta to a build, and what is particular to builds in folders; `test_builds.py` has what all places promise."""

import json
from pathlib import Path

import pytest

from millrace.applications import Application
from millrace.errors import RetrievalError
from millrace.lakehouse.cursors import move_cursor
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_CHUNKS
from millrace.retrieval import library
from millrace.retrieval.embed import cursor_name, lineage_id
from millrace.retrieval.index import build_index, builds_of
from millrace.retrieval.library import LibraryBuilds
from millrace.settings import Settings
from tests.retrieval.conftest import chunked, vectors_without_a_model


def built(settings: Settings, application: Application, lake: Lake) -> str:
    chunked(settings, application)
    vectors_without_a_model(lake, application)
    return build_index(settings, application, run="test")["build"]


@pytest.fixture
def folder(settings: Settings, application: Application) -> Path:
    builds = builds_of(settings, application.name, lineage_id(application))
    assert isinstance(builds, LibraryBuilds)
    return builds.folder


def leftovers(folder: Path) -> list[Path]:
    return [*folder.glob(".building-*"), *folder.rglob(".writing-*")]


@pytest.mark.slow
def test_another_content_is_another_build_and_going_back_is_the_first_one(
    settings: Settings, application: Application, lake: Lake, notes: Path
) -> None:
    before = (notes / "bread.txt").read_text()
    first = built(settings, application, lake)
    (notes / "bread.txt").write_text("Bread falls when the oven door is opened too early.")
    assert built(settings, application, lake) != first
    (notes / "bread.txt").write_text(before)
    assert built(settings, application, lake) == first


@pytest.mark.slow
def test_a_build_holds_what_was_embedded_last_while_chunks_go_on(
    settings: Settings, application: Application, lake: Lake, notes: Path
) -> None:
    build = built(settings, application, lake)
    (notes / "rain.txt").write_text("Rain falls when drops grow too heavy for the air.")
    chunked(settings, application)
    assert build_index(settings, application, run="test")["build"] == build


@pytest.mark.slow
def test_a_chunk_without_a_vector_is_refused(
    settings: Settings, application: Application, lake: Lake, notes: Path
) -> None:
    built(settings, application, lake)
    (notes / "rain.txt").write_text("Rain falls when drops grow too heavy for the air.")
    version = chunked(settings, application)["version"]
    move_cursor(lake, cursor_name(lineage_id(application)), SILVER_CHUNKS, version, run="test")
    with pytest.raises(RetrievalError, match="1 of 4 chunks have no vector"):
        build_index(settings, application, run="test")


def test_building_before_embedding_is_one_sentence(settings: Settings, application: Application) -> None:
    with pytest.raises(RetrievalError, match="refresh embeddings first"):
        build_index(settings, application, run="test")


@pytest.mark.slow
def test_a_build_that_was_interrupted_leaves_nothing_and_is_made_at_the_next_run(
    settings: Settings,
    application: Application,
    lake: Lake,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chunked(settings, application)
    vectors_without_a_model(lake, application)
    with monkeypatch.context() as patched:
        patched.setattr(library, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            build_index(settings, application, run="test")
    assert len(leftovers(folder)) == 1
    build = build_index(settings, application, run="test")["build"]
    assert leftovers(folder) == []
    assert LibraryBuilds(folder).open(build).manifest.chunks == 3


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_build_that_is_not_there_is_not_published(folder: Path) -> None:
    folder.mkdir(parents=True)
    with pytest.raises(RetrievalError, match="no index build 'nonsense'"):
        LibraryBuilds(folder).publish("nonsense")
    assert LibraryBuilds(folder).published() is None


def test_a_pointer_that_cannot_be_understood_is_one_sentence(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "current.json").write_text('{"build": ')
    with pytest.raises(RetrievalError, match="can't be understood"):
        LibraryBuilds(folder).published()


@pytest.mark.slow
def test_a_build_with_missing_points_is_refused(
    settings: Settings, application: Application, lake: Lake, folder: Path
) -> None:
    build = built(settings, application, lake)
    path = folder / build / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chunks": 99}))
    with pytest.raises(RetrievalError, match="holds 3 chunks of 99"):
        LibraryBuilds(folder).open(build)


def test_a_build_of_another_format_is_refused(
    settings: Settings, application: Application, lake: Lake, folder: Path
) -> None:
    build = built(settings, application, lake)
    path = folder / build / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(RetrievalError, match="has format 99"):
        LibraryBuilds(folder).open(build)
