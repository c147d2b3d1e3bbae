import os
from pathlib import Path
from typing import Any

import pytest

from millrace.applications import PythonTopicsSource, TextFolderSource
from millrace.errors import SourceError
from millrace.sources.reading import read_source


def folder(path: Path, pattern: str = "**/*.txt") -> TextFolderSource:
    return TextFolderSource(kind="text_folder", path=path, pattern=pattern)


def test_a_topic_of_the_python_reference_is_a_document() -> None:
    (document,) = read_source(PythonTopicsSource(kind="python_topics", topics=("while",)))
    assert document.title == "Python: while"
    assert b'The "while" statement' in document.content


def test_a_topic_that_is_not_there_is_said_by_name() -> None:
    with pytest.raises(SourceError, match="no topic untwist"):
        list(read_source(PythonTopicsSource(kind="python_topics", topics=("if", "untwist"))))


def test_files_are_documents_with_their_folder_as_section(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.txt").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.md").write_text("not matched")
    found = list(read_source(folder(tmp_path)))
    assert [(document.title, document.section, document.content) for document in found] == [
        ("a.txt", None, b"a"),
        ("deep/b.txt", "deep", b"b"),
    ]


def test_a_document_keeps_its_id_when_its_content_changes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("before")
    (before,) = read_source(folder(tmp_path))
    (tmp_path / "a.txt").write_text("after")
    (after,) = read_source(folder(tmp_path))
    assert before.document_id == after.document_id
    assert before.version_hash != after.version_hash


def test_a_file_name_that_is_not_text_is_still_read(tmp_path: Path) -> None:
    (tmp_path / "na\udcffme.txt").write_text("content")
    (found,) = read_source(folder(tmp_path))
    assert found.title == "na\ufffdme.txt"
    assert found.content == b"content"


def test_what_is_no_regular_file_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / ".#edited.txt").symlink_to("ann@laptop.4711")  # an editor's lock
    assert list(read_source(folder(tmp_path))) == []


def test_what_is_only_out_of_sight_is_not_taken_for_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").write_text("still there")
    link = tmp_path / "c.txt"
    link.symlink_to(tmp_path / "a volume that is not mounted")
    with pytest.raises(SourceError, match=r"c\.txt links to .*, which isn't there; mount it, or remove the link"):
        list(read_source(folder(tmp_path, pattern="**/*.txt")))
    link.unlink()
    listed = os.scandir

    def refuses(path: Any = ".") -> Any:
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuses)  # root may list what has mode 0
    with pytest.raises(SourceError, match=r"can't be read .* Permission denied"):
        list(read_source(folder(tmp_path, pattern="**/*.txt")))


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"missing is not a folder"):
        list(read_source(folder(tmp_path / "missing")))


def test_a_pattern_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="pattern"):
        list(read_source(folder(tmp_path, pattern="/etc/*")))
