"""Index builds as folders, searched in this process: Qdrant Edge, nothing to install.

A build is a folder named by its content. Beside the builds, `current.json` names the published one and the one before
it, replaced by one atomic rename. Built without a write-ahead log, any number of processes can open one build.
"""

import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from millrace.errors import BuildLost, RetrievalError
from millrace.retrieval.builds import FORMAT, PAYLOAD, BuildManifest, Published, superfluous
from millrace.retrieval.embed import DIMENSIONS

UPSERT_POINTS = 1000

_BUILDING = ".building-"


class LibraryBuilds:
    """`Builds` in `folder`, which need not be there yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def where(self) -> str:
        return str(self.folder)

    def make(self, manifest: BuildManifest, points: pa.Table) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        with _alone(self.folder, ".build.lock"):
            _clear_unfinished(self.folder)
            if (self.folder / manifest.build).is_dir():
                return False
            _make(self.folder, manifest, points)
        return True

    def manifest(self, build: str) -> BuildManifest:
        path = self.folder / build / "manifest.json"
        try:
            manifest = BuildManifest.model_validate_json(path.read_text())
        except (OSError, ValidationError) as error:
            raise BuildLost(
                f"there is no index build {build!r} in {self.folder} ({error}); build the index again"
            ) from None
        if manifest.format != FORMAT:
            raise BuildLost(f"{path} has format {manifest.format}, this code reads {FORMAT}; build the index again")
        return manifest

    def manifests(self) -> list[BuildManifest]:
        found = []
        for path in self.folder.glob("[!.]*/manifest.json"):
            with suppress(RetrievalError):
                found.append(self.manifest(path.parent.name))
        return sorted(found, key=lambda manifest: manifest.built_at)

    def publish(self, build: str) -> bool:
        self.manifest(build)
        with _alone(self.folder, ".publish.lock"):
            pointer = self.published()
            if pointer and pointer.build == build:
                return False
            now = datetime.now(UTC)
            moved = Published(format=FORMAT, build=build, previous=pointer.build if pointer else None, published_at=now)
            _write(self.folder / "current.json", moved.model_dump_json(indent=1))
        return True

    def published(self) -> Published | None:
        path = self.folder / "current.json"
        try:
            return Published.model_validate_json(path.read_text())
        except FileNotFoundError:
            return None
        except (ValidationError, UnicodeDecodeError) as error:
            raise RetrievalError(f"{path} can't be understood ({error}); publish a build again") from None

    def stamp(self) -> object:
        try:
            status = os.stat(self.folder / "current.json")
        except FileNotFoundError:
            return None
        # Every publication renames a new file into place: another inode, another time.
        return status.st_ino, status.st_mtime_ns

    def open(self, build: str) -> "LibraryBuild":
        return LibraryBuild(self.folder, self.manifest(build))

    def copy(self, build: str, folder: Path) -> None:
        """A build for another place: `LibraryBuilds(folder)` has it then, not yet published.

        Raises:
            RetrievalError: there is no such build.
        """
        self.manifest(build)
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(self.folder, ".open.lock"):
            shutil.copytree(self.folder / build, folder / build)

    @contextmanager
    def still(self) -> Iterator[None]:
        """Nothing is built, collected or opened meanwhile, so the folder can be copied as it is."""
        with _alone(self.folder, ".build.lock"), _alone(self.folder, ".open.lock"):
            yield

    def collect(self, keep: str) -> list[str]:
        with _alone(self.folder, ".build.lock"):
            gone = superfluous(self.manifests(), self.published(), keep)
            for build in gone:
                # Away from its name first: a build that is there is whole.
                doomed = self.folder / f"{_BUILDING}{uuid.uuid4().hex}"
                (self.folder / build).rename(doomed)
                shutil.rmtree(doomed)
        return gone

    def changed_at(self) -> datetime | None:
        try:
            return datetime.fromtimestamp(self.folder.stat().st_mtime, UTC)
        except FileNotFoundError:
            return None

    def remove(self) -> None:
        shutil.rmtree(self.folder)


class LibraryBuild:
    """A folder that is open."""

    def __init__(self, folder: Path, manifest: BuildManifest) -> None:
        from qdrant_edge import EdgeShard

        self.manifest = manifest
        build = manifest.build
        try:
            # Opening settles files of the build; two processes must not do that at the same moment.
            with _alone(folder, ".open.lock"):
                self._shard = EdgeShard.load(str(folder / build / "shard"))
            points = self._shard.info().points_count
        except Exception as error:  # qdrant_edge raises nothing narrower
            raise BuildLost(f"index build {build} can't be opened: {error}; build the index again") from error
        if points != manifest.chunks:
            raise BuildLost(
                f"index build {build} holds {points} chunks of {manifest.chunks}; "
                f"delete {folder / build} and build the index again"
            )

    def nearest(self, vector: list[float], k: int) -> list[tuple[float, dict[str, Any]]]:
        from qdrant_edge import Query, QueryRequest

        found = self._shard.query(QueryRequest(limit=k, query=Query.Nearest(vector), with_payload=True))
        return [(point.score, point.payload or {}) for point in found]

    def documents(self) -> set[str]:
        from qdrant_edge import ScrollRequest

        records, _ = self._shard.scroll(ScrollRequest(limit=max(self.manifest.chunks, 1), with_payload=["document_id"]))
        return {(record.payload or {})["document_id"] for record in records}


def _make(folder: Path, manifest: BuildManifest, points: pa.Table) -> None:
    from qdrant_edge import Distance, EdgeConfig, EdgeShard, EdgeVectorParams, Point, UpdateOperation

    building = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=folder))
    shard_folder = building / "shard"
    shard_folder.mkdir()
    config = EdgeConfig(vectors=EdgeVectorParams(size=DIMENSIONS, distance=Distance.Cosine), wal_enabled=False)
    shard = EdgeShard.create(str(shard_folder), config)
    for batch in points.to_batches(UPSERT_POINTS):
        rows = [
            Point(id=uuid.UUID(row["chunk_id"]), vector=row["vector"], payload={name: row[name] for name in PAYLOAD})
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
