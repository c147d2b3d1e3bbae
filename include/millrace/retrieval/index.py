"""From Delta to an index build: every chunk that was embedded, with its vector, as one immutable, searchable state.

A build is named by its content, so that an unchanged state is never built twice, and any build can be made again:
Delta remains the source of truth. Where builds are kept is one setting: folders of this machine (`library.py`), or,
with `MILLRACE_QDRANT_URL`, a Qdrant server (`service.py`).
"""

from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from millrace.applications import Application
from millrace.errors import RetrievalError
from millrace.lakehouse.audit.chain import record_act
from millrace.lakehouse.content import content_hash
from millrace.lakehouse.cursors import read_cursor
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_CHUNKS, SILVER_EMBEDDINGS
from millrace.retrieval.builds import FORMAT, BuildManifest, Builds, Published, current
from millrace.retrieval.embed import cursor_name, lineage_id
from millrace.retrieval.library import LibraryBuilds
from millrace.retrieval.server import connect
from millrace.retrieval.service import ServiceBuilds, collected_lineages, collection_name
from millrace.settings import Settings


def builds_of(settings: Settings, application: str, lineage: str) -> Builds:
    """Where this deployment keeps the builds of a lineage of `application`."""
    if settings.qdrant_url:
        server = connect(settings.qdrant_url, settings.qdrant_api_key)
        return ServiceBuilds(server, collection_name(settings.environment, application, lineage))
    return LibraryBuilds(settings.index_builds(application) / lineage)


def kept_lineages(settings: Settings, application: str) -> list[str]:
    """Lineages of `application` that this deployment keeps builds of. Raises as the place of the builds does."""
    if settings.qdrant_url:
        server = connect(settings.qdrant_url, settings.qdrant_api_key)
        return collected_lineages(server, settings.environment, application)
    return sorted(path.name for path in settings.index_builds(application).glob("*") if path.is_dir())


def declared_builds(settings: Settings, application: Application) -> Builds:
    """The builds of the lineage that the application declares now: what `build_index` adds to."""
    return builds_of(settings, application.name, lineage_id(application))


def published_build(settings: Settings, application: Application, lineage: str) -> str:
    """The build that is published of a lineage, which a release may have brought along.

    Raises:
        RetrievalError: there is none.
    """
    builds = builds_of(settings, application.name, lineage)
    build = current(builds)
    if build is None:
        raise RetrievalError(
            f"{application.name}: lineage {lineage} has no index build in {builds.where}; run "
            f"{application.name}.refresh_embeddings"
        )
    return build


def build_index(
    settings: Settings, application: Application, *, run: str, lineage: str | None = None
) -> dict[str, Any]:
    """Make the build of the state that was embedded last, unless it is there. It is not published yet.

    Args:
        lineage: its name; None: the declared one.

    Returns:
        `build`, `lineage`, `chunks`, and `changed`: whether it was made now.

    Raises:
        RetrievalError: nothing was embedded yet, or a chunk has no vector.
    """
    lake = Lake.of(settings, application.name)
    lineage = lineage or lineage_id(application)
    chunks_version = read_cursor(lake, cursor_name(lineage), SILVER_CHUNKS)
    embeddings_version = lake.version(SILVER_EMBEDDINGS)
    if chunks_version is None or embeddings_version is None:
        raise RetrievalError(f"{application.name}: nothing is embedded in {lineage}; refresh embeddings first")
    points = _points(lake, lineage, chunks_version, embeddings_version)
    content_sha = content_hash(*points["chunk_id"].to_pylist(), *points["content_hash"].to_pylist())
    build = content_hash(FORMAT, lineage, content_sha)[:16]
    manifest = BuildManifest(
        format=FORMAT,
        build=build,
        lineage=lineage,
        chunks_version=chunks_version,
        embeddings_version=embeddings_version,
        chunks=points.num_rows,
        documents=len(points["document_id"].unique()),
        content_sha=content_sha,
        built_at=datetime.now(UTC),
        run=run,
    )
    builds = builds_of(settings, application.name, lineage)
    changed = builds.make(manifest, points)
    builds.collect(keep=build)
    return {"build": build, "lineage": lineage, "chunks": points.num_rows, "changed": changed}


def publish_previous(
    settings: Settings, application: Application, lineage: str | None = None, *, actor: str
) -> Published:
    """Publish the build before the published one again: the way back. Returns the pointer as it is now.

    Args:
        lineage: its name; None: the declared one.
        actor: who decided that, for the audit trail.

    The next run of refresh_embeddings publishes again what the documents of then give.

    Raises:
        RetrievalError: there is none, or it was removed.
    """
    lineage = lineage or lineage_id(application)
    builds = builds_of(settings, application.name, lineage)
    pointer = builds.published()
    if pointer is None or pointer.previous is None:
        found = f"only {pointer.build} was ever" if pointer else "nothing is"
        raise RetrievalError(f"{application.name}: {found} published in {builds.where}, so there is no way back")
    builds.publish(pointer.previous)
    moved = builds.published()
    assert moved is not None
    record_act(
        settings, actor, "decision", f"index/{lineage}/{moved.build}", "back",
        at=datetime.now(UTC), application=application.name, details={"previous": moved.previous},
    )  # fmt: skip
    return moved


def _points(lake: Lake, lineage: str, chunks_version: int, embeddings_version: int) -> pa.Table:
    """Every chunk of one version with its vector, by chunk id."""
    chunks = lake.read(SILVER_CHUNKS, SILVER_CHUNKS.rows_schema.names, version=chunks_version)
    vectors = lake.read(
        SILVER_EMBEDDINGS,
        ["chunk_id", "content_hash", "vector"],
        where=pc.field("lineage") == lineage,
        version=embeddings_version,
    )
    rows = dict(
        zip(
            zip(*(vectors[c].to_pylist() for c in ("chunk_id", "content_hash")), strict=True),
            range(vectors.num_rows),
            strict=True,
        )
    )
    found = [
        rows.get(key) for key in zip(chunks["chunk_id"].to_pylist(), chunks["content_hash"].to_pylist(), strict=True)
    ]
    if missing := found.count(None):
        raise RetrievalError(
            f"{missing} of {chunks.num_rows} chunks have no vector in {lineage}; refresh embeddings, then build again"
        )
    joined = chunks.append_column("vector", vectors["vector"].take(pa.array(found, pa.int64())))
    return joined.sort_by("chunk_id")
