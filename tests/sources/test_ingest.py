import logging
from pathlib import Path
from typing import Any

import pytest

from millrace.applications import Application
from millrace.errors import SourceError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import BRONZE_DOCUMENTS, SILVER_DOCUMENTS
from millrace.settings import Settings
from millrace.sources import ingest
from millrace.sources.ingest import land_documents, refine_documents


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "one.txt").write_text("The first note.")
    (folder / "two.txt").write_text("The second note.")
    return folder


@pytest.fixture
def application(qa: Application, notes: Path) -> Application:
    return with_sources(qa, {"kind": "text_folder", "path": str(notes)})


def with_sources(qa: Application, *sources: dict[str, Any]) -> Application:
    return Application.model_validate(qa.model_dump(mode="json") | {"sources": sources})


def ingest_all(settings: Settings, application: Application) -> tuple[dict[str, Any], dict[str, Any]]:
    landed = land_documents(settings, application, run="test")
    return landed, refine_documents(settings, application, run="test")


def texts(lake: Lake) -> dict[str, str]:
    rows = lake.read(SILVER_DOCUMENTS, ["title", "text"]).to_pylist()
    return {row["title"]: row["text"] for row in rows}


def history(lake: Lake) -> list[tuple[Any, ...]]:
    """Bronze without times and provenance, oldest first."""
    rows = lake.read(BRONZE_DOCUMENTS).sort_by([("observed_at", "ascending"), ("document_id", "ascending")])
    return [(row["title"], row["content"], row["deleted"]) for row in rows.to_pylist()]


def test_silver_holds_the_text_of_every_source(settings: Settings, qa: Application, lake: Lake) -> None:
    landed, refined = ingest_all(settings, qa)
    assert landed["new"] == refined["documents"] == len(texts(lake)) > 60
    assert "Default: 32" in texts(lake)["[core] parallelism"]
    assert {"Python: if", "Python: for"} < texts(lake).keys()


def test_a_second_run_writes_nothing(settings: Settings, application: Application, lake: Lake) -> None:
    ingest_all(settings, application)
    versions = lake.version(BRONZE_DOCUMENTS), lake.version(SILVER_DOCUMENTS)
    landed, refined = ingest_all(settings, application)
    assert not landed["changed"]
    assert not refined["changed"]
    assert (lake.version(BRONZE_DOCUMENTS), lake.version(SILVER_DOCUMENTS)) == versions


def test_updates_additions_and_deletions_reach_silver_and_bronze_keeps_what_was(
    settings: Settings, application: Application, lake: Lake, notes: Path
) -> None:
    ingest_all(settings, application)
    (notes / "one.txt").write_text("The first note, corrected.")
    (notes / "two.txt").unlink()
    (notes / "three.txt").write_text("A third note.")
    landed, refined = ingest_all(settings, application)
    assert (landed["new"], landed["deleted"]) == (2, 1)
    assert (refined["inserted"], refined["updated"], refined["deleted"]) == (1, 1, 1)
    assert texts(lake) == {"one.txt": "The first note, corrected.", "three.txt": "A third note."}
    assert ("two.txt", b"The second note.", False) in history(lake)


@pytest.mark.slow
def test_a_document_that_comes_back_is_there_again(
    settings: Settings, application: Application, lake: Lake, notes: Path
) -> None:
    ingest_all(settings, application)
    (notes / "two.txt").rename(notes / "away")
    ingest_all(settings, application)
    assert "two.txt" not in texts(lake)
    (notes / "away").rename(notes / "two.txt")
    ingest_all(settings, application)
    assert texts(lake)["two.txt"] == "The second note."


@pytest.mark.parametrize("content", [b"\xff\xfe\x00binary", b"text with \x00 in it", b"caf\xe9 in latin-1"])
def test_a_document_that_is_not_text_is_left_out_and_said_and_the_rest_goes_on(
    settings: Settings,
    application: Application,
    lake: Lake,
    notes: Path,
    caplog: pytest.LogCaptureFixture,
    content: bytes,
) -> None:
    (notes / "bad.txt").write_bytes(content)
    with caplog.at_level(logging.WARNING, "millrace.sources"):
        _, refined = ingest_all(settings, application)
    assert refined["refused"] == 1
    assert texts(lake).keys() == {"one.txt", "two.txt"}
    assert any("bad.txt is not UTF-8 text" in message for message in caplog.messages)


def test_an_empty_source_is_refused_and_deletes_nothing(
    settings: Settings, application: Application, lake: Lake, notes: Path
) -> None:
    ingest_all(settings, application)
    for path in notes.iterdir():
        path.unlink()
    before = lake.version(BRONZE_DOCUMENTS)
    with pytest.raises(SourceError, match="holds no document; nothing was removed"):
        land_documents(settings, application, run="test")
    assert lake.version(BRONZE_DOCUMENTS) == before
    assert len(texts(lake)) == 2


def test_a_corpus_without_any_text_is_refused_and_deletes_nothing(
    settings: Settings, application: Application, lake: Lake, notes: Path
) -> None:
    ingest_all(settings, application)
    for path in notes.iterdir():
        path.write_bytes(b"\0")
    land_documents(settings, application, run="test")
    with pytest.raises(SourceError, match="no document is text \\(2 refused\\)"):
        refine_documents(settings, application, run="test")
    assert len(texts(lake)) == 2


@pytest.mark.slow
def test_a_source_that_breaks_off_deletes_nothing_and_the_next_run_is_as_if_nothing_had_happened(
    settings: Settings, qa: Application, lake: Lake, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "COMMIT_BYTES", 1)  # a commit for every document
    other = tmp_path / "other"
    other.mkdir()
    (other / "far.txt").write_text("A note that is far away.")
    both = with_sources(qa, {"kind": "text_folder", "path": str(notes)}, {"kind": "text_folder", "path": str(other)})
    ingest_all(settings, both)
    (notes / "one.txt").unlink()
    (notes / "three.txt").write_text("A third note.")
    other.rename(tmp_path / "unmounted")
    with pytest.raises(SourceError, match="is not a folder"):
        land_documents(settings, both, run="test")
    assert not any(deleted for _, _, deleted in history(lake))
    (tmp_path / "unmounted").rename(other)
    landed, _ = ingest_all(settings, both)
    assert (landed["new"], landed["deleted"]) == (0, 1)  # the third note had landed already
    assert texts(lake).keys() == {"two.txt", "three.txt", "far.txt"}


def test_overlapping_sources_land_a_document_once(settings: Settings, qa: Application, lake: Lake, notes: Path) -> None:
    twice = with_sources(
        qa,
        {"kind": "text_folder", "path": str(notes)},
        {"kind": "text_folder", "path": str(notes), "pattern": "one*"},
    )
    landed, _ = ingest_all(settings, twice)
    assert landed["new"] == 2
    assert not land_documents(settings, twice, run="test")["changed"]


@pytest.mark.slow
def test_a_clock_that_was_set_back_does_not_bring_old_content_back(
    settings: Settings, application: Application, lake: Lake, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest_all(settings, application)
    future = lake.read(BRONZE_DOCUMENTS)["observed_at"][0].as_py().replace(year=2099)
    monkeypatch.setattr(ingest, "datetime", type("Clock", (), {"now": staticmethod(lambda zone: future)}))
    (notes / "one.txt").write_text("Written in the future.")
    ingest_all(settings, application)
    monkeypatch.undo()
    (notes / "one.txt").write_text("Written after the clock was corrected.")
    ingest_all(settings, application)
    assert texts(lake)["one.txt"] == "Written after the clock was corrected."
