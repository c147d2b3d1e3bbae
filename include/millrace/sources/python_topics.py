"""The Python language reference as pydoc carries it (`help("if")`): one document a topic."""

import sys
from collections.abc import Iterator

from millrace.applications import PythonTopicsSource
from millrace.errors import SourceError
from millrace.lakehouse.content import content_hash
from millrace.sources.document import Document


def read_python_topics(source: PythonTopicsSource) -> Iterator[Document]:
    """The declared topics, or all of them, by name.

    Raises:
        SourceError: a declared topic isn't one of this Python's.
    """
    # Half a megabyte of text: read only where a source is read.
    from pydoc_data.topics import topics

    if unknown := sorted(set(source.topics) - set(topics)):
        raise SourceError(f"python_topics: this Python has no topic {', '.join(unknown)}; correct the declaration")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for topic in sorted(source.topics or topics):
        yield Document(
            document_id=content_hash("python_topics", topic),
            source=source.kind,
            uri=f"https://docs.python.org/{version}/reference/#{topic}",
            section=None,
            title=f"Python: {topic}",
            content=topics[topic].strip().encode(),
        )
