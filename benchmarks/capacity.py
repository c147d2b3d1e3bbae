"""What one unit of Millrace holds and does on this machine, and what docs/scaling.md makes of it for large numbers.

    python benchmarks/capacity.py [--vectors 20000]

Measured here: bytes on disk and in memory for a vector with its graph (Qdrant's own engine, 384 dimensions), bytes of a
chunk and of an embedding in Delta, appends a second to a gateway's event log (16 threads, every one on disk), and what
PostgreSQL counts for keys in a second (one request is one `take` and one `charge`), for one key and for many. There is
no peer: these are inputs of arithmetic, on this disk and these cores; generators are in docs/scaling.md.
"""

import argparse
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
from pydantic import SecretStr
from qdrant_edge import Distance, EdgeConfig, EdgeShard, EdgeVectorParams, Point, Query, QueryRequest, UpdateOperation

from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_CHUNKS
from millrace.serving.key_store import KeyStore
from millrace.settings import Settings
from millrace.sources.event_log import EventLog, Feedback
from millrace.stack.postgres import Postgres

DIMENSIONS = 384
CALLERS = 16
SECONDS = 3.0
rng = np.random.default_rng(0)


def vectors(folder: Path, count: int) -> dict[str, float]:
    """What the second half of `count` vectors adds to a shard, in bytes of each: its empty files are large already."""
    half, whole = (_shard(folder / str(size), size) for size in (count // 2, count))
    on_disk, in_memory = ((after - before) / (count - count // 2) for before, after in zip(half, whole, strict=True))
    return {"vector and links on disk, bytes": on_disk, "vector and links in memory, bytes": in_memory}


def _shard(folder: Path, count: int) -> tuple[int, int]:
    """Bytes on disk and in memory of an optimised shard that was opened and searched."""
    config = EdgeConfig(vectors=EdgeVectorParams(size=DIMENSIONS, distance=Distance.Cosine), wal_enabled=False)
    folder.mkdir(parents=True)
    made = EdgeShard.create(str(folder), config)
    for start in range(0, count, 1000):
        found = rng.normal(size=(min(1000, count - start), DIMENSIONS)).astype(np.float32)
        points = [Point(id=start + n, vector=one.tolist(), payload={}) for n, one in enumerate(found)]
        made.update(UpdateOperation.upsert_points(points))
    made.optimize()
    made.close()
    on_disk = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
    before = psutil.Process().memory_info().rss
    opened = EdgeShard.load(str(folder))
    for _ in range(200):
        opened.query(QueryRequest(query=Query.Nearest(rng.normal(size=DIMENSIONS).tolist()), limit=10))
    held = psutil.Process().memory_info().rss - before
    opened.close()
    return on_disk, held


def tables(settings: Settings, count: int) -> dict[str, float]:
    """Bytes that a chunk of 120 words, each from a vocabulary of 20,000, takes in Delta."""
    words = np.array([f"word{n}" for n in range(20_000)])
    rows = [
        {"chunk_id": f"{n:032x}", "content_hash": f"{n:032x}", "document_id": f"{n // 4:032x}", "position": n % 4,
         "source": "benchmark", "uri": f"file:///{n // 4}", "section": None, "title": f"Document {n // 4}",
         "text": " ".join(rng.choice(words, 120))}
        for n in range(count)
    ]  # fmt: skip
    lake = Lake.of(settings, "benchmark")
    began = time.perf_counter()
    lake.merge(SILVER_CHUNKS, pa.Table.from_pylist(rows, schema=SILVER_CHUNKS.rows_schema), run="benchmark")
    took = time.perf_counter() - began
    files = Path(lake.uri(SILVER_CHUNKS)).rglob("*.parquet")
    size = sum(path.stat().st_size for path in files if "_change_data" not in path.parts)
    return {"chunk in Delta, bytes": size / count, "chunks merged a second, delta-rs": count / took}


def a_second(act: Callable[[int], object]) -> float:
    """How often `act` is done in a second by 16 callers at once; it is given the caller's number."""
    done, end = [0] * CALLERS, time.perf_counter() + SECONDS

    def call(caller: int) -> None:
        while time.perf_counter() < end:
            act(caller)
            done[caller] += 1

    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(call, range(CALLERS)))
    return sum(done) / SECONDS


def event_log(folder: Path) -> dict[str, float]:
    log = EventLog(folder)
    rated = Feedback(completion_id="c" * 60, application="benchmark", simulated=True, rating=1.0, comment="x" * 200)
    rate = a_second(lambda _: log.append(rated))
    log.close()
    size = sum(path.stat().st_size for path in folder.glob("*.jsonl"))
    return {"events on disk a second, one log": rate, "bytes of such an event": size / rate / SECONDS}


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """The address of an empty database on a server of its own."""
    folder.chmod(0o711)
    server = Postgres(folder / "postgres")
    server.prepare()
    user = server.system_user
    process = subprocess.Popen(
        server.command(), user=user, group=user, extra_groups=[] if user else None, stderr=subprocess.DEVNULL
    )
    try:
        while not server.answers():
            if process.poll() is not None:
                raise SystemExit(f"PostgreSQL ended with status {process.returncode}")
            time.sleep(0.05)
        server.create_database("keys")
        yield server.url("keys")
    finally:
        process.send_signal(signal.SIGQUIT)
        process.wait(30)


def keys(settings: Settings, url: str) -> dict[str, float]:
    """Requests a second that pass rate and budget; as many connections as a fleet of gateways has."""
    known = settings.model_copy(update={"keys_url": SecretStr(url)})
    stores = [KeyStore(known) for _ in range(CALLERS)]
    made = [
        stores[0].create(
            f"key {n}", owner="benchmark", scopes=("ask",), applications=None, requests_per_minute=10**6,
            monthly_budget_usd=10**6, expires_at=None, actor="benchmark",
        )[0]
        for n in range(CALLERS)
    ]  # fmt: skip

    def admit(caller: int, key: int) -> None:
        stores[caller].take(made[key])
        stores[caller].charge(made[key].id, Decimal("0.000001"))

    told = {
        "requests counted a second, one key": a_second(lambda caller: admit(caller, 0)),
        "requests counted a second, 16 keys": a_second(lambda caller: admit(caller, caller)),
    }
    for store in stores:
        store.close()
    return told


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--vectors", type=int, default=20_000)
    count = parser.parse_args().vectors
    with tempfile.TemporaryDirectory(prefix="millrace-capacity-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        settings = Settings(home=folder / "home", spark_tables=frozenset())
        told = vectors(folder / "shard", count) | tables(settings, count) | event_log(folder / "events")
        with postgres(folder) as url:
            told |= keys(settings, url)
    print(f"on {os.cpu_count()} cores, {count} vectors and chunks")
    for name, value in told.items():
        print(f"{name:<40}{value:>12,.0f}")


if __name__ == "__main__":
    main()
