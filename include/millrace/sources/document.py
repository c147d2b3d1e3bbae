"""What a document is, and where each kind of declared source is read. It knows no table.

A reader yields documents one by one and raises when it can't read its source completely: whoever takes an
incomplete reading for the whole source would delete what is still there.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from millrace.applications import AirflowConfigSource, PythonTopicsSource, Source, TextFolderSource
from millrace.lakehouse.content import content_hash


@dataclass(frozen=True)
class Document:
    """One document as it arrived."""

    document_id: str
    """The same as long as the document keeps its place in its source, whatever its content."""
    source: str
    """Kind of the source."""
    uri: str
    section: str | None
    title: str
    content: bytes
    """UTF-8 text, if the source kept its word; nobody has checked yet."""

    @property
    def version_hash(self) -> str:
        return content_hash(self.document_id, self.source, self.uri, self.section, self.title, self.content)


def read_source(source: Source) -> Iterator[Document]:
    """Every document that `source` holds now, in a fixed order.

    Raises:
        SourceError: the source can't be read completely. Documents yielded until then are good.
    """
    match source:
        case AirflowConfigSource():
            from millrace.sources.airflow_config import read_airflow_config

            yield from read_airflow_config(source)
        case PythonTopicsSource():
            from millrace.sources.python_topics import read_python_topics

            yield from read_python_topics(source)
        case TextFolderSource():
            from millrace.sources.text_folder import read_text_folder

            yield from read_text_folder(source)
