"""Index builds on a Qdrant server or cluster: one collection per lineage, whose builds share their points.

The collection of a lineage holds each chunk once per run of builds that contain it, numbered as `membership.py` says;
a build is a filter over it, and a point that keeps its manifest. So a refresh sends, and makes the server index, what
changed. The two other ways were measured in the engine itself (`benchmarks/index_refresh.py`): a collection per build
behind an alias sends and indexes everything again for each build; a list of builds in each point makes every build
rewrite every point, which takes them all out of the vector index. An alias also names whole collections, and only a
key that may manage the whole server may switch one, whereas this takes no more than a token for one collection:
`rw` for who builds, `r` for the gateway.

- **Immutable**: what a build writes is invisible to every other build, by its numbers.
- **Nothing half-made**: the manifest's point is written last, after the points were counted.
- **Publication is one upsert of one point**, which names the build and the one before it.
- **Two builders** of one lineage: the later one takes over by writing its serial into the attempt's point; the
  earlier one looks at it before each write, and gives up.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
from pydantic import ValidationError

from millrace.errors import BuildLost, RetrievalError
from millrace.retrieval.builds import FORMAT, PAYLOAD, BuildManifest, Published, superfluous
from millrace.retrieval.embed import DIMENSIONS
from millrace.retrieval.membership import OPEN, Member, Plan, gaps, next_serial, plan_build
from millrace.retrieval.points import (
    INDEXED,
    VECTOR,
    all_points,
    between_builds,
    chunk_points,
    delete_points,
    in_build,
    kept_point,
    manifest_points,
    point_id,
    set_last,
    since_build,
    slices,
    upsert,
)
from millrace.retrieval.server import SEARCH_TIMEOUT, SEARCH_WAITS, TIMEOUT, Missing, Server

if TYPE_CHECKING:
    from qdrant_client import QdrantClient
    from qdrant_client.models import Filter, Record

log = logging.getLogger("millrace.retrieval")

T = TypeVar("T")

SCROLL_POINTS = 5000
LOOK_SECONDS = 1.0
"""How long a searcher may take to see what another process published."""
EXACT_CHUNKS = 20_000
"""Up to here every vector is compared: milliseconds, and a search repeats to the last hit. Beyond, the vector index
answers, whose graph changes as builds come: nearly always the same hits."""
SEARCH_EFFORT = 256
"""`hnsw_ef` of a search of the vector index."""


def collection_name(environment: str, application: str, lineage: str) -> str:
    """Of an application's lineage in an environment: what a token names."""
    return f"millrace-{environment}-{application}-{lineage}"


def collected_lineages(server: Server, environment: str, application: str) -> list[str]:
    """The application's lineages that have a collection which this key may see.

    Raises:
        RetrievalError: the server doesn't answer.
    """
    begin = collection_name(environment, application, "")
    found = server.ask("list collections", lambda client: client.get_collections()).collections
    return sorted(one.name.removeprefix(begin) for one in found if one.name.startswith(begin))


class ServiceBuilds:
    """`Builds` in `collection`, which is made with the first build. Thread-safe."""

    def __init__(self, server: Server, collection: str) -> None:
        self._server = server
        self.collection = collection

    @property
    def where(self) -> str:
        return f"collection {self.collection} of {self._server.address}"

    def exists(self) -> bool:
        """Whether the server has the collection.

        Raises:
            RetrievalError: it doesn't answer, or refuses the key.
        """
        return self.ask("see", lambda client: client.collection_exists(self.collection))

    def prepare(self) -> None:
        """Have the collection and its indexes; a builder whose key may create none finds them made.

        Raises:
            RetrievalError: it can't be made, or is another kind of collection.
        """
        from qdrant_client import models

        name = self.collection
        if not self.exists():
            vectors = {VECTOR: models.VectorParams(size=DIMENSIONS, distance=models.Distance.COSINE)}
            try:
                self.ask("create", lambda client: client.create_collection(name, vectors))
            except RetrievalError:
                # Another builder was first, or the answer to our first try was lost.
                if not self.exists():
                    raise
        info = self.ask("see", lambda client: client.get_collection(name))
        found = info.config.params.vectors
        params = found.get(VECTOR) if isinstance(found, dict) else None
        if params is None or params.size != DIMENSIONS or params.distance != models.Distance.COSINE:
            raise RetrievalError(
                f"{self.where} has no vector {VECTOR!r} of {DIMENSIONS} dimensions compared by cosine; delete it"
            )
        for field in INDEXED.keys() - info.payload_schema.keys():
            self.ask("index", partial(self._index, field))

    def make(self, manifest: BuildManifest, points: pa.Table) -> bool:
        self.prepare()
        serials = self._serials()
        if manifest.build in serials:
            if self._count(serials[manifest.build]) == manifest.chunks:
                return False
            log.warning("%s: build %s is not whole any more and is made again", self.where, manifest.build)
            self._delete([_build_id(manifest.build)])
            del serials[manifest.build]
        head = max(serials.values(), default=0)
        found = list(self._members(head))
        serial = self._claim(manifest, head, found)
        keys = zip(points["chunk_id"].to_pylist(), points["content_hash"].to_pylist(), strict=True)
        rows = {key: row for row, key in enumerate(keys)}
        plan = plan_build(rows.keys(), found, head, serial)
        self._upload(points.take(pa.array(sorted(rows[key] for key in plan.upload), pa.int64())), serial)
        self._renumber(plan, head, serial)
        counted = self._count(serial)
        if counted != manifest.chunks:
            raise RetrievalError(
                f"{self.where} holds {counted} chunks of {manifest.chunks} after the upload of build "
                f"{manifest.build}, which doesn't count; run refresh_embeddings again"
            )
        whole = {"kind": "build", "build": manifest.build, "serial": serial, "manifest": manifest.model_dump_json()}
        self._still_ours(serial)
        self._put(_build_id(manifest.build), whole)
        log.info("%s: build %s; %d points sent", self.where, manifest.build, len(plan.upload))
        return True

    def manifest(self, build: str) -> BuildManifest:
        return self._read_build(build)[1]

    def manifests(self) -> list[BuildManifest]:
        found = []
        for payload in self._build_payloads():
            with suppress(RetrievalError):
                found.append(self._parse(payload["build"], payload)[1])
        return sorted(found, key=lambda manifest: manifest.built_at)

    def publish(self, build: str) -> bool:
        self.manifest(build)
        pointer = self.published()
        if pointer and pointer.build == build:
            return False
        now = datetime.now(UTC)
        moved = Published(format=FORMAT, build=build, previous=pointer.build if pointer else None, published_at=now)
        self._put(_PUBLISHED, {"kind": "published", "pointer": moved.model_dump_json()})
        return True

    def published(self) -> Published | None:
        payload = self._get(_PUBLISHED, SEARCH_WAITS)
        if payload is None:
            return None
        try:
            return Published.model_validate_json(payload["pointer"])
        except (ValidationError, KeyError) as error:
            raise RetrievalError(
                f"what is published in {self.where} can't be understood ({error}); publish a build again"
            ) from None

    def stamp(self) -> object:
        return time.monotonic() // LOOK_SECONDS

    def open(self, build: str) -> "ServiceBuild":
        serial, manifest = self._read_build(build)
        counted = self._count(serial, SEARCH_WAITS)
        if counted != manifest.chunks:
            raise BuildLost(
                f"index build {build} holds {counted} chunks of {manifest.chunks} in {self.where}; "
                "run refresh_embeddings, which makes it again"
            )
        return ServiceBuild(self, serial, manifest)

    def collect(self, keep: str) -> list[str]:
        gone = superfluous(self.manifests(), self.published(), keep)
        if gone:
            # The manifests first: a build that is there is whole.
            self._delete([_build_id(build) for build in gone])
            for earlier, later in gaps(self._serials().values()):
                self._delete(between_builds(earlier, later))
        return gone

    def changed_at(self) -> datetime | None:
        pointer = self.published()
        times = [one.built_at for one in self.manifests()] + ([pointer.published_at] if pointer else [])
        return max(times, default=None)

    def remove(self) -> None:
        """The collection stays, empty: a token for one collection may not delete it."""
        self._delete(manifest_points())
        self._delete(all_points())

    def ask(self, what: str, request: Callable[["QdrantClient"], T], waits: tuple[float, ...] | None = None) -> T:
        """One request about this collection; see `Server.ask`."""
        return self._server.ask(f"{what} collection {self.collection}", request, waits)

    def _count(self, serial: int, waits: tuple[float, ...] | None = None) -> int:
        """How many chunks the build with this serial holds, exactly."""
        chosen, timeout = in_build(serial), SEARCH_TIMEOUT if waits else TIMEOUT
        return self.ask("read", lambda client: client.count(self.collection, chosen, timeout=timeout), waits).count

    def scroll(self, chosen: "Filter", payload: list[str]) -> Iterator["Record"]:
        """Every point that `chosen` matches, with these fields of its payload."""
        offset: Any = None
        while True:
            records, offset = self.ask("read", partial(self._page, chosen, payload, offset))
            yield from records
            if offset is None:
                return

    def _page(
        self, chosen: "Filter", payload: list[str], offset: Any, client: "QdrantClient"
    ) -> tuple[list["Record"], Any]:
        return client.scroll(
            self.collection, chosen, limit=SCROLL_POINTS, offset=offset, with_payload=payload, timeout=TIMEOUT
        )

    def _index(self, field: str, client: "QdrantClient") -> None:
        client.create_payload_index(self.collection, field, INDEXED[field], wait=True)

    def _serials(self) -> dict[str, int]:
        """Serial of every build that is there, also of those that this code can't read."""
        return {payload["build"]: payload["serial"] for payload in self._build_payloads()}

    def _build_payloads(self) -> list[dict[str, Any]]:
        try:
            return [record.payload or {} for record in self.scroll(manifest_points(), ["build", "serial", "manifest"])]
        except Missing:
            return []

    def _read_build(self, build: str) -> tuple[int, BuildManifest]:
        payload = self._get(_build_id(build), SEARCH_WAITS)
        if payload is None:
            raise BuildLost(f"there is no index build {build!r} in {self.where}; build the index again")
        return self._parse(build, payload)

    def _parse(self, build: str, payload: dict[str, Any]) -> tuple[int, BuildManifest]:
        try:
            manifest = BuildManifest.model_validate_json(payload["manifest"])
        except (ValidationError, KeyError) as error:
            raise BuildLost(
                f"index build {build} in {self.where} can't be understood ({error}); use the version of Millrace "
                "that made it, or build the index again"
            ) from None
        if manifest.format != FORMAT:
            raise BuildLost(
                f"index build {build} in {self.where} has format {manifest.format}, this code reads {FORMAT}; "
                "build the index again"
            )
        return payload["serial"], manifest

    def _members(self, head: int) -> Iterator[Member]:
        for record in self.scroll(since_build(head), ["chunk_id", "content_hash", "first", "last"]):
            payload = record.payload or {}
            key = (payload["chunk_id"], payload["content_hash"])
            yield Member(str(record.id), key, payload["first"], payload["last"])

    def _claim(self, manifest: BuildManifest, head: int, found: list[Member]) -> int:
        """The serial to build under: that of an attempt at the same build which was killed, or a new one."""
        known = self._get(_ATTEMPT)
        if known and known["build"] == manifest.build and known["serial"] > head:
            return int(known["serial"])
        serial = next_serial(found, max(head, known["serial"] if known else 0), time.time_ns() // 1000)
        now = datetime.now(UTC).isoformat()
        self._put(
            _ATTEMPT, {"kind": "attempt", "serial": serial, "build": manifest.build, "run": manifest.run, "at": now}
        )
        return serial

    def _still_ours(self, serial: int) -> None:
        known = self._get(_ATTEMPT)
        if not known or known["serial"] != serial:
            raise RetrievalError(
                f"{self.where}: run {known['run'] if known else 'unknown'} began another build meanwhile; "
                "this one gave up, and nothing of it counts"
            )

    def _upload(self, points: pa.Table, serial: int) -> None:
        for batch in chunk_points(points, serial):
            self._write(serial, partial(upsert, self.collection, batch))

    def _renumber(self, plan: Plan, head: int, serial: int) -> None:
        for ids, last in ((plan.close, head), (plan.reopen, OPEN)):
            for some in slices(ids):
                self._write(serial, partial(set_last, self.collection, some, last))
        for some in slices(plan.delete):
            self._write(serial, partial(delete_points, self.collection, some))

    def _write(self, serial: int, request: Callable[["QdrantClient"], Any]) -> None:
        """A write of the attempt `serial`; before each try it looks whether it still is the attempt."""

        def ours(client: "QdrantClient") -> Any:
            self._still_ours(serial)
            return request(client)

        self.ask("write to", ours)

    def _put(self, point: str, payload: dict[str, Any]) -> None:
        self.ask("write to", partial(upsert, self.collection, [kept_point(point, payload)]))

    def _get(self, point: str, waits: tuple[float, ...] | None = None) -> dict[str, Any] | None:
        """Payload of one point; None: it isn't there."""
        try:
            found = self.ask(
                "read", lambda client: client.retrieve(self.collection, [point], timeout=SEARCH_TIMEOUT), waits
            )
        except Missing:
            return None
        return (found[0].payload or {}) if found else None

    def _delete(self, chosen: "list[str] | Filter") -> None:
        self.ask("delete from", partial(delete_points, self.collection, chosen))


class ServiceBuild:
    """A build on the server that was found whole."""

    def __init__(self, builds: ServiceBuilds, serial: int, manifest: BuildManifest) -> None:
        self._builds = builds
        self._serial = serial
        self.manifest = manifest

    def nearest(self, vector: list[float], k: int) -> list[tuple[float, dict[str, Any]]]:
        """
        Raises:
            RetrievalError: the server doesn't answer, or the build was collected meanwhile.
        """
        from qdrant_client import models

        exact = self.manifest.chunks <= EXACT_CHUNKS
        effort = models.SearchParams(exact=True) if exact else models.SearchParams(hnsw_ef=SEARCH_EFFORT)
        found = self._builds.ask(
            "search",
            lambda client: client.query_points(
                self._builds.collection,
                query=vector,
                using=VECTOR,
                query_filter=in_build(self._serial),
                search_params=effort,
                limit=k,
                with_payload=list(PAYLOAD),
                timeout=SEARCH_TIMEOUT,
            ),
            SEARCH_WAITS,
        ).points
        if len(found) < min(k, self.manifest.chunks):
            again = self._builds.open(self.manifest.build)  # says what is wrong, if anything is
            if again._serial != self._serial:  # the collection was lost, and the build made again under its name
                self._serial = again._serial
                return self.nearest(vector, k)
        return [(point.score, point.payload or {}) for point in found]

    def documents(self) -> set[str]:
        records = self._builds.scroll(in_build(self._serial), ["document_id"])
        return {(record.payload or {})["document_id"] for record in records}


def _build_id(build: str) -> str:
    return point_id("build", build)


_PUBLISHED = point_id("published")
_ATTEMPT = point_id("attempt")
