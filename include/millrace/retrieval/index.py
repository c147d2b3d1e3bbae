"""Index builds: one immutable, searchable state of a lineage, made from Delta, published by one atomic rename.

A build is a folder named by its content, so that an unchanged state is never built twice. Beside the builds,
`current.json` names the published one and the one before it. Delta remains the source of truth: any build can be
made again. Qdrant Edge runs in-process; without a write-ahead log any number of processes can open one build.
"""

import fcntl
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, ValidationError

from millrace.applications import Application
from millrace.errors import RetrievalError
from millrace.lakehouse.content import content_hash
from millrace.lakehouse.cursors import read_cursor
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_CHUNKS, SILVER_EMBEDDINGS
from millrace.retrieval.embed import DIMENSIONS, cursor_name, lineage_id
from millrace.settings import Settings

FORMAT = 1
KEPT = 3
"""Newest builds that are kept beside those that are referenced."""
UPSERT_POINTS = 1000

_BUILDING = ".building-"


class BuildManifest(BaseModel):
    """What a build was made from; `manifest.json` in its folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    build: str
    lineage: str
    chunks_version: int
    embeddings_version: int
    chunks: int
    documents: int
    content_sha: str
    """Hash of all chunk ids and content hashes."""
    built_at: datetime
    run: str


class Published(BaseModel):
    """The pointer, `current.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    build: str
    previous: str | None
    published_at: datetime


def builds_folder(settings: Settings, application: Application) -> Path:
    """Folder of the builds of an application's lineage: what `Retriever` and `publish` take."""
    return settings.index_builds(application.name) / lineage_id(application)


def build_index(settings: Settings, application: Application, *, run: str) -> dict[str, Any]:
    """Make the build of the state that was embedded last, unless it is there. It is not published yet.

    Returns:
        `build`, `lineage`, `chunks`, and `changed`: whether a folder was made.

    Raises:
        RetrievalError: nothing was embedded yet, or a chunk has no vector.
    """
    lake = Lake.of(settings, application.name)
    lineage = lineage_id(application)
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
    folder = builds_folder(settings, application)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder, ".build.lock"):
        _clear_unfinished(folder)
        changed = not (folder / build).is_dir()
        if changed:
            _make(folder, manifest, points)
        collect(folder, keep=build)
    return {"build": build, "lineage": lineage, "chunks": points.num_rows, "changed": changed}


def publish(folder: Path, build: str) -> bool:
    """Point `folder` at `build`; the published one becomes the previous one. Publishing that again is the way back.

    Returns:
        Whether the pointer moved.

    Raises:
        RetrievalError: there is no such build.
    """
    read_manifest(folder, build)
    with _alone(folder, ".publish.lock"):
        pointer = read_pointer(folder)
        if pointer and pointer.build == build:
            return False
        now = datetime.now(UTC)
        moved = Published(format=FORMAT, build=build, previous=pointer.build if pointer else None, published_at=now)
        _write(folder / "current.json", moved.model_dump_json(indent=1))
    return True


def current_build(folder: Path) -> str | None:
    """The published build; None: there is none."""
    pointer = read_pointer(folder)
    return pointer.build if pointer else None


def read_pointer(folder: Path) -> Published | None:
    """The pointer of `folder`; None: nothing was published.

    Raises:
        RetrievalError: it can't be understood.
    """
    try:
        return Published.model_validate_json((folder / "current.json").read_text())
    except FileNotFoundError:
        return None
    except (ValidationError, UnicodeDecodeError) as error:
        raise RetrievalError(
            f"{folder / 'current.json'} can't be understood ({error}); publish a build again"
        ) from None


def read_manifest(folder: Path, build: str) -> BuildManifest:
    """What `build` was made from.

    Raises:
        RetrievalError: there is no such build, or another version of Millrace made it.
    """
    path = folder / build / "manifest.json"
    try:
        manifest = BuildManifest.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        raise RetrievalError(
            f"there is no index build {build!r} in {folder} ({error}); build the index again"
        ) from None
    if manifest.format != FORMAT:
        raise RetrievalError(f"{path} has format {manifest.format}, this code reads {FORMAT}; build the index again")
    return manifest


def collect(folder: Path, keep: str) -> list[str]:
    """Delete all but the newest builds; never `keep`, the published one, nor the one before it. Returns what went."""
    pointer = read_pointer(folder)
    referenced = {keep, pointer.build, pointer.previous} if pointer else {keep}
    builds = sorted((path for path in folder.iterdir() if (path / "manifest.json").is_file()), key=_built_at)
    unreferenced = [path for path in builds if path.name not in referenced]
    for path in unreferenced[:-KEPT]:
        # Away from its name first: a build that is there is whole.
        doomed = folder / f"{_BUILDING}{uuid.uuid4().hex}"
        path.rename(doomed)
        shutil.rmtree(doomed)
    return [path.name for path in unreferenced[:-KEPT]]


class OpenBuild:
    """A build that can be searched. Thread-safe.

    Raises:
        RetrievalError: it isn't there, or holds fewer chunks than it was made from.
    """

    def __init__(self, folder: Path, build: str) -> None:
        from qdrant_edge import EdgeShard

        self.manifest = read_manifest(folder, build)
        try:
            # Opening settles files of the build; two processes must not do that at the same moment.
            with _alone(folder, ".open.lock"):
                self._shard = EdgeShard.load(str(folder / build / "shard"))
            points = self._shard.info().points_count
        except Exception as error:  # qdrant_edge raises nothing narrower
            raise RetrievalError(f"index build {build} can't be opened: {error}; build the index again") from error
        if points != self.manifest.chunks:
            raise RetrievalError(
                f"index build {build} holds {points} chunks of {self.manifest.chunks}; "
                f"delete {folder / build} and build the index again"
            )

    def nearest(self, vector: list[float], k: int) -> list[tuple[float, dict[str, Any]]]:
        """The `k` nearest chunks, best first: cosine similarity and payload."""
        from qdrant_edge import Query, QueryRequest

        found = self._shard.query(QueryRequest(limit=k, query=Query.Nearest(vector), with_payload=True))
        return [(point.score, point.payload or {}) for point in found]

    def documents(self) -> set[str]:
        """Ids of all documents with a chunk in the build."""
        from qdrant_edge import ScrollRequest

        records, _ = self._shard.scroll(ScrollRequest(limit=max(self.manifest.chunks, 1), with_payload=["document_id"]))
        return {(record.payload or {})["document_id"] for record in records}


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


def _make(folder: Path, manifest: BuildManifest, points: pa.Table) -> None:
    from qdrant_edge import Distance, EdgeConfig, EdgeShard, EdgeVectorParams, Point, UpdateOperation

    building = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=folder))
    shard_folder = building / "shard"
    shard_folder.mkdir()
    config = EdgeConfig(vectors=EdgeVectorParams(size=DIMENSIONS, distance=Distance.Cosine), wal_enabled=False)
    shard = EdgeShard.create(str(shard_folder), config)
    payload = ["chunk_id", "document_id", "title", "text", "uri", "section"]
    for batch in points.to_batches(UPSERT_POINTS):
        rows = [
            Point(id=uuid.UUID(row["chunk_id"]), vector=row["vector"], payload={name: row[name] for name in payload})
            for row in batch.to_pylist()
        ]
        shard.update(UpdateOperation.upsert_points(rows))
    shard.optimize()
    shard.flush()
    shard.close()
    # The first opening settles a journal and rewrites files: let it be ours, not that of a published build.
    EdgeShard.load(str(shard_folder)).close()
    _write(building / "manifest.json", manifest.model_dump_json(indent=1))
    building.chmod(0o755)
    building.rename(folder / manifest.build)


def _clear_unfinished(folder: Path) -> None:
    for path in folder.glob(f"{_BUILDING}*"):
        shutil.rmtree(path)


def _built_at(path: Path) -> str:
    return json.loads((path / "manifest.json").read_text())["built_at"]


@contextmanager
def _alone(folder: Path, name: str) -> Iterator[None]:
    """One process at a time; the kernel frees the lock of a process that dies."""
    with (folder / name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(path: Path, text: str) -> None:
    """Whole or not at all, also after a crash of the machine."""
    descriptor, name = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
