"""The points of a lineage's collection, in Qdrant's words: which are chosen, and how they are written.

What the numbers in them mean is `membership.py`'s business; when to write is `service.py`'s.
"""

import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from millrace.lakehouse.content import content_hash
from millrace.retrieval.builds import PAYLOAD
from millrace.retrieval.membership import OPEN

if TYPE_CHECKING:
    from qdrant_client import QdrantClient
    from qdrant_client.models import Filter, PointStruct

VECTOR = "text"
"""Name of the vector: with a name, points that keep manifests need none."""
INDEXED: dict[str, Any] = {
    "first": {"type": "integer", "lookup": False, "range": True},
    "last": {"type": "integer", "lookup": False, "range": True},
    "kind": "keyword",
}
"""Fields of the payload that are chosen by."""
UPSERT_POINTS = 256
"""Points per request: about 3 MB of JSON."""
CHANGE_POINTS = 5000
"""Points whose numbers change in one request."""


def point_id(*parts: str | int) -> str:
    return str(uuid.UUID(content_hash(*parts)))


def chunk_points(points: pa.Table, serial: int) -> Iterator[list["PointStruct"]]:
    """New points of the build `serial`, in batches for one request each."""
    from qdrant_client.models import PointStruct

    for batch in points.to_batches(UPSERT_POINTS):
        yield [
            PointStruct(
                id=point_id(row["chunk_id"], row["content_hash"], serial),
                vector={VECTOR: row["vector"]},
                payload={name: row[name] for name in (*PAYLOAD, "content_hash")} | {"first": serial, "last": OPEN},
            )
            for row in batch.to_pylist()
        ]


def kept_point(point: str, payload: dict[str, Any]) -> "PointStruct":
    """A point without a vector, which no search finds."""
    from qdrant_client.models import PointStruct

    return PointStruct(id=point, vector={}, payload=payload)


def in_build(serial: int) -> "Filter":
    """The points of the build with this serial."""
    from qdrant_client.models import FieldCondition, Filter, Range

    return Filter(
        must=[
            FieldCondition(key="first", range=Range(lte=serial)),
            FieldCondition(key="last", range=Range(gte=serial)),
        ]
    )


def since_build(head: int) -> "Filter":
    """The points of the build `head`, and of attempts after it."""
    from qdrant_client.models import FieldCondition, Filter, Range

    return Filter(must=[FieldCondition(key="last", range=Range(gte=head))])


def between_builds(earlier: int, later: int) -> "Filter":
    """Points in no build, if these are neighbours."""
    from qdrant_client.models import FieldCondition, Filter, Range

    return Filter(
        must=[
            FieldCondition(key="first", range=Range(gt=earlier)),
            FieldCondition(key="last", range=Range(lt=later)),
        ]
    )


def manifest_points() -> "Filter":
    """The points that keep manifests."""
    from qdrant_client.models import FieldCondition, Filter, MatchValue

    return Filter(must=[FieldCondition(key="kind", match=MatchValue(value="build"))])


def all_points() -> "Filter":
    """Whatever there is."""
    from qdrant_client.models import Filter

    return Filter()


def upsert(collection: str, points: list["PointStruct"], client: "QdrantClient") -> None:
    client.upsert(collection, points, wait=True)


def set_last(collection: str, points: list[str], last: int, client: "QdrantClient") -> None:
    client.set_payload(collection, {"last": last}, points=list(points), wait=True)


def delete_points(collection: str, chosen: "list[str] | Filter", client: "QdrantClient") -> None:
    client.delete(collection, list(chosen) if isinstance(chosen, list) else chosen, wait=True)


def slices(ids: list[str]) -> Iterator[list[str]]:
    return (ids[start : start + CHANGE_POINTS] for start in range(0, len(ids), CHANGE_POINTS))
