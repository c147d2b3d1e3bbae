"""Documents into the Lakehouse: what arrived (`bronze/documents`), then the state of now (`silver/documents`).

Bronze keeps every version of every document as bytes, and a row without content when one is gone from its source.
It decides by content, so that a second run writes nothing, and adds deletions last, after everything was read.
Silver is the last state of each document that is text.
"""

import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from millrace.applications import Application, Source
from millrace.errors import SourceError
from millrace.lakehouse.content import content_hash
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.sampled import sampled_documents
from millrace.lakehouse.tables import BRONZE_DOCUMENTS, SILVER_DOCUMENTS
from millrace.settings import Settings
from millrace.sources.document import Document
from millrace.sources.reading import read_source

log = logging.getLogger("millrace.sources")

COMMIT_BYTES = 32 * 2**20
"""Content held in memory before it is committed."""


def land_documents(settings: Settings, application: Application, *, run: str) -> dict[str, Any]:
    """Append to bronze what differs from the last known state of the declared sources. Where the environment's
    documents are a sample of prod's, that is of those only.

    Returns:
        Counts: `seen`, `new` versions, `deleted` documents; `changed`.

    Raises:
        SourceError: a source holds no document or can't be read completely. No deletion is recorded then.
    """
    lake = Lake.of(settings, application.name)
    known = _last_states(lake)
    taken = sampled_documents(lake)
    # Later than everything before, whatever the clock says: the order of versions hangs on it.
    before = [state["observed_at"] for state in known.values()]
    observed_at = max([datetime.now(UTC), *(time + timedelta(microseconds=1) for time in before)])
    seen: set[str] = set()
    pending: list[dict[str, Any]] = []
    pending_bytes = new = 0
    for document in _documents(application):
        if document.document_id in seen:
            continue  # two declared sources overlap
        if taken is not None and document.document_id not in taken:
            continue
        seen.add(document.document_id)
        state = known.get(document.document_id)
        if state and not state["deleted"] and state["version_hash"] == document.version_hash:
            continue
        pending.append(_version(document, observed_at))
        pending_bytes += len(document.content)
        new += 1
        if pending_bytes >= COMMIT_BYTES:
            _append(lake, pending, run)
            pending, pending_bytes = [], 0
    gone = [state for key, state in known.items() if key not in seen and not state["deleted"]]
    _append(lake, [*pending, *(_tombstone(state, observed_at) for state in gone)], run)
    return {"seen": len(seen), "new": new, "deleted": len(gone), "changed": bool(new or gone)}


def refine_documents(settings: Settings, application: Application, *, run: str) -> dict[str, Any]:
    """Make silver equal to the last state of every document; one that isn't text is left out, and said.

    Returns:
        Counts: `documents`, `inserted`, `updated`, `deleted`, `refused`; `version` of silver; `changed`.

    Raises:
        SourceError: nothing would be left. Silver stays as it is.
    """
    lake = Lake.of(settings, application.name)
    rows: list[dict[str, Any]] = []
    refused = 0
    for state in _contents(lake):
        text = _text(state["content"])
        if text is None:
            refused += 1
            log.warning("%s is not UTF-8 text; left out. Convert it, or exclude it in its source", state["uri"])
            continue
        described = {name: state[name] for name in ("source", "uri", "section", "title")} | {"text": text}
        rows.append(
            {
                "document_id": state["document_id"],
                "content_hash": content_hash(*described.values()),
                **described,
            }
        )
    if not rows:
        raise SourceError(
            f"{application.name}: no document is text ({refused} refused); nothing was changed; check its sources"
        )
    written = lake.merge(
        SILVER_DOCUMENTS,
        pa.Table.from_pylist(rows, schema=SILVER_DOCUMENTS.rows_schema),
        run=run,
        delete_unmatched="true",
    )
    return {
        "documents": len(rows),
        **written.counts,
        "refused": refused,
        "version": written.version,
        "changed": written.changed,
    }


def _documents(application: Application) -> Iterator[Document]:
    """All documents of all sources. An empty source is an error: far more often a folder that isn't mounted than
    a collection that was emptied."""
    for source in application.sources:
        document = None
        for document in read_source(source):
            yield document
        if document is None:
            raise SourceError(
                f"{application.name}: the source {_name(source)} holds no document; nothing was removed; "
                "restore it, or take it out of the declaration"
            )


def _name(source: Source) -> str:
    return f"{source.kind} {getattr(source, 'path', '')}".strip()


def _last_states(lake: Lake) -> dict[str, dict[str, Any]]:
    """Document → its last row in bronze, without the content."""
    columns = [name for name in BRONZE_DOCUMENTS.rows_schema.names if name != "content"]
    rows = lake.read(BRONZE_DOCUMENTS, columns=columns).sort_by("observed_at").to_pylist()
    return {row["document_id"]: row for row in rows}


def _contents(lake: Lake) -> Iterator[dict[str, Any]]:
    """The last rows in bronze of documents that are still there, with their content, some at a time."""
    last = [state for state in _last_states(lake).values() if not state["deleted"]]
    by_time: dict[datetime, list[str]] = {}
    for state in last:
        by_time.setdefault(state["observed_at"], []).append(state["document_id"])
    for time, documents in sorted(by_time.items()):
        where = (pc.field("observed_at") == time) & pc.field("document_id").isin(documents)
        yield from lake.read(BRONZE_DOCUMENTS, where=where).to_pylist()


def _text(content: bytes) -> str | None:
    if b"\0" in content:
        return None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _version(document: Document, observed_at: datetime) -> dict[str, Any]:
    return {
        "document_id": document.document_id,
        "version_hash": document.version_hash,
        "source": document.source,
        "uri": document.uri,
        "section": document.section,
        "title": document.title,
        "content": document.content,
        "deleted": False,
        "observed_at": observed_at,
    }


def _tombstone(state: dict[str, Any], observed_at: datetime) -> dict[str, Any]:
    version = content_hash(state["document_id"], "deleted")
    return state | {"version_hash": version, "content": None, "deleted": True, "observed_at": observed_at}


def _append(lake: Lake, rows: list[dict[str, Any]], run: str) -> None:
    if rows:
        lake.merge(BRONZE_DOCUMENTS, pa.Table.from_pylist(rows, schema=BRONZE_DOCUMENTS.rows_schema), run=run)
