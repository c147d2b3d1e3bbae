"""Text files under a folder: one document a file. It hands on bytes; whether they are text is seen later."""

import os
from collections.abc import Iterator
from pathlib import Path

from millrace.applications import TextFolderSource
from millrace.errors import SourceError
from millrace.lakehouse.content import content_hash
from millrace.sources.document import Document


def read_text_folder(source: TextFolderSource) -> Iterator[Document]:
    """The regular files that match the declared pattern, by path; the section is a file's folder.

    Raises:
        SourceError: the folder isn't there, or something in it can't be read: what is only out of sight isn't gone.
    """
    folder = source.path.expanduser().absolute()
    if not folder.is_dir():
        raise SourceError(f"text_folder: {folder} is not a folder; correct the declaration, or mount it")
    try:
        _require_readable(folder)
        for path in sorted(path for path in folder.glob(source.pattern) if _is_document(path)):
            inside = path.relative_to(folder)
            section = inside.parent.as_posix()
            yield Document(
                document_id=content_hash("text_folder", str(source.path), os.fsencode(inside)),
                source=source.kind,
                uri=path.as_uri(),
                section=None if section == "." else _readable(section),
                title=_readable(inside.as_posix()),
                content=path.read_bytes(),
            )
    except (OSError, ValueError, NotImplementedError) as error:
        raise SourceError(f"text_folder: {folder} can't be read with pattern {source.pattern!r}: {error}") from error


def _require_readable(folder: Path) -> None:
    """`glob` leaves out what it may not list, without a word.

    Raises:
        OSError: a folder in it can't be listed.
    """

    def refuse(error: OSError) -> None:
        raise error

    for _ in os.walk(folder, onerror=refuse):
        pass


def _is_document(path: Path) -> bool:
    """
    Raises:
        OSError: it is a link to what isn't there: a volume that isn't mounted, perhaps.
    """
    if path.is_symlink() and not path.exists() and not path.name.startswith(".#"):  # an editor's lock
        raise FileNotFoundError(f"{path} links to {path.readlink()}, which isn't there; mount it, or remove the link")
    return path.is_file()


def _readable(name: str) -> str:
    """A file's name may be any bytes; a title is text."""
    return os.fsencode(name).decode("utf-8", "replace")
