"""An index build of one chunk on a Qdrant server, for gateways that search a real one."""

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
from pydantic import SecretStr

from millrace.retrieval.builds import FORMAT, PAYLOAD, BuildManifest
from millrace.retrieval.server import connect
from millrace.retrieval.service import ServiceBuilds
from millrace.secret_sources import NO_SECRET


class AlwaysNorth:
    """An embedder for which all texts are the same."""

    lineages = ""

    def embed(self, texts: list[str]) -> np.ndarray:
        return np.eye(1, 384, dtype=np.float32).repeat(len(texts), axis=0)


def a_build(url: str, api_key: SecretStr = NO_SECRET) -> ServiceBuilds:
    chunk = dict.fromkeys(PAYLOAD, "something") | {"chunk_id": "0" * 32, "content_hash": "1" * 32}
    points = pa.Table.from_pylist([chunk | {"vector": AlwaysNorth().embed(["x"])[0].tolist()}])
    now = datetime.now(UTC)
    manifest = BuildManifest(
        format=FORMAT, build="north", lineage="l", chunks_version=1, embeddings_version=1, chunks=1, documents=1,
        content_sha="none", built_at=now, run="test",
    )  # fmt: skip
    builds = ServiceBuilds(connect(url, api_key), "c")
    builds.make(manifest, points)
    builds.publish("north")
    return builds
