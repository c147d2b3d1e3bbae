import json
from pathlib import Path

import pytest

from millrace.applications import Application
from millrace.errors import RetrievalError
from millrace.lakehouse.cursors import move_cursor
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_CHUNKS
from millrace.retrieval import index
from millrace.retrieval.embed import cursor_name, lineage_id
from millrace.retrieval.index import OpenBuild, build_index, builds_folder, current_build, publish, read_manifest
from millrace.settings import Settings
from tests.retrieval.conftest import chunked, vector_of, vectors_without_a_model


def built(settings: Settings, application: Application, lake: Lake) -> str:
    chunked(settings, application)
    vectors_without_a_model(lake, application)
    return build_index(settings, application, run="test")["build"]


@pytest.fixture
def folder(settings: Settings, application: Application) -> Path:
    return builds_folder(settings, application)


def leftovers(folder: Path) -> list[Path]:
    return [*folder.glob(".building-*"), *folder.rglob(".writing-*")]


def test_a_build_finds_each_chunk_by_its_own_vector(
    settings: Settings, application: Application, lake: Lake, folder: Path
) -> None:
    opened = OpenBuild(folder, built(settings, application, lake))
    chunks = lake.read(SILVER_CHUNKS).to_pylist()
    assert opened.documents() == {chunk["document_id"] for chunk in chunks}
    for chunk in chunks:
        ((score, payload),) = opened.nearest(vector_of(chunk), 1)
        assert score == pytest.approx(1, abs=1e-5)
        assert payload == {name: chunk[name] for name in ("chunk_id", "document_id", "title", "text", "uri", "section")}


def test_an_unchanged_state_is_the_same_build_and_is_not_made_again(
    settings: Settings, application: Application, lake: Lake, folder: Path
) -> None:
    build = built(settings, application, lake)
    made = read_manifest(folder, build)
    again = build_index(settings, application, run="another run")
    assert again == {"build": build, "lineage": made.lineage, "chunks": 3, "changed": False}
    assert read_manifest(folder, build) == made


def test_another_content_is_another_build_and_going_back_is_the_first_one(
    settings: Settings, application: Application, lake: Lake, notes: Path
) -> None:
    before = (notes / "bread.txt").read_text()
    first = built(settings, application, lake)
    (notes / "bread.txt").write_text("Bread falls when the oven door is opened too early.")
    assert built(settings, application, lake) != first
    (notes / "bread.txt").write_text(before)
    assert built(settings, application, lake) == first


def test_a_build_holds_what_was_embedded_last_while_chunks_go_on(
    settings: Settings, application: Application, lake: Lake, notes: Path
) -> None:
    build = built(settings, application, lake)
    (notes / "rain.txt").write_text("Rain falls when drops grow too heavy for the air.")
    chunked(settings, application)
    assert build_index(settings, application, run="test")["build"] == build


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
        patched.setattr(index, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            build_index(settings, application, run="test")
    assert len(leftovers(folder)) == 1
    build = build_index(settings, application, run="test")["build"]
    assert leftovers(folder) == []
    assert OpenBuild(folder, build).manifest.chunks == 3


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_publishing_moves_the_pointer_once_and_remembers_the_way_back(
    settings: Settings, application: Application, lake: Lake, folder: Path, notes: Path
) -> None:
    first = built(settings, application, lake)
    assert current_build(folder) is None
    assert publish(folder, first)
    assert not publish(folder, first)
    (notes / "bread.txt").write_text("Bread falls when the oven door is opened too early.")
    second = built(settings, application, lake)
    assert current_build(folder) == first
    assert publish(folder, second)
    pointer = json.loads((folder / "current.json").read_text())
    assert (pointer["build"], pointer["previous"]) == (second, first)
    assert publish(folder, pointer["previous"])
    assert current_build(folder) == first


def test_a_build_that_is_not_there_is_not_published(folder: Path) -> None:
    folder.mkdir(parents=True)
    with pytest.raises(RetrievalError, match="no index build 'nonsense'"):
        publish(folder, "nonsense")
    assert current_build(folder) is None


def test_a_pointer_that_cannot_be_understood_is_one_sentence(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "current.json").write_text('{"build": ')
    with pytest.raises(RetrievalError, match="can't be understood"):
        current_build(folder)


def test_old_builds_go_but_never_the_published_one_nor_the_one_before_it(
    settings: Settings, application: Application, lake: Lake, folder: Path, notes: Path
) -> None:
    builds = []
    for i in range(7):
        (notes / "bread.txt").write_text(f"Loaf number {i} came out of the oven.")
        builds.append(built(settings, application, lake))
        if i < 2:
            publish(folder, builds[-1])
    there = {path.name for path in folder.iterdir() if path.is_dir()}
    assert there == {builds[0], builds[1], *builds[3:]}


def test_a_build_with_missing_points_is_refused(
    settings: Settings, application: Application, lake: Lake, folder: Path
) -> None:
    build = built(settings, application, lake)
    path = folder / build / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chunks": 99}))
    with pytest.raises(RetrievalError, match="holds 3 chunks of 99"):
        OpenBuild(folder, build)


def test_a_build_of_another_format_is_refused(
    settings: Settings, application: Application, lake: Lake, folder: Path
) -> None:
    build = built(settings, application, lake)
    path = folder / build / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(RetrievalError, match="has format 99"):
        OpenBuild(folder, build)
