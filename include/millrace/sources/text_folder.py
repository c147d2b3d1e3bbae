"""Text files under a folder: one document a file. It hands on bytes; whether they are text is seen later."""

import os
from collections.abc import Iterator

from millrace.applications import TextFolderSource
from millrace.errors import SourceError
from millrace.lakehouse.content import content_hash
from millrace.sources.document import Document


def read_text_folder(source: TextFolderSource) -> Iterator[Document]:
    """The regular files that match the declared pattern, by path; the section is a file's folder.

    Raises:
        SourceError: the folder isn't there, or a file in it can't be read.
    """
    folder = source.path.expanduser().absolute()
    if not folder.is_dir():
        raise SourceError(f"text_folder: {folder} is not a folder; correct the declaration, or mount it")
    try:
        for path in sorted(path for path in folder.glob(source.pattern) if path.is_file()):
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


def _readable(name: str) -> str:
    """A file's name may be any bytes; a title is text."""
    return os.fsencode(name).decode("utf-8", "replace")
