"""Where each kind of declared source is read."""

from collections.abc import Iterator

from millrace.applications import AirflowConfigSource, PythonTopicsSource, Source, TextFolderSource
from millrace.sources.airflow_config import read_airflow_config
from millrace.sources.document import Document
from millrace.sources.python_topics import read_python_topics
from millrace.sources.text_folder import read_text_folder


def read_source(source: Source) -> Iterator[Document]:
    """Every document that `source` holds now, in a fixed order.

    Raises:
        SourceError: the source can't be read completely. Documents yielded until then are good.
    """
    match source:
        case AirflowConfigSource():
            yield from read_airflow_config(source)
        case PythonTopicsSource():
            yield from read_python_topics(source)
        case TextFolderSource():
            yield from read_text_folder(source)
