"""What a document is. It knows no table, nor where documents come from.

A reader yields documents one by one and raises when it can't read its source completely: whoever takes an
incomplete reading for the whole source would delete what is still there.
"""

from dataclasses import dataclass

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
