"""What a refresh of 1 % of the chunks costs in Qdrant, by three ways of keeping builds: seconds of the processor.

    python benchmarks/index_refresh.py

Ours: two numbers in each point say in which builds it is (`retrieval/membership.py`). Peers: a list of builds in each
point, and a collection per build (what an alias per build needs). Measured in Qdrant's own engine (Edge), in this
process, with the payload indexes that each way needs: what a client sends over the network comes on top, and is all
vectors for a collection per build. Our new points are compared one by one until there are enough of them for the
vector index (thousands); then only they are indexed.
"""

import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from qdrant_edge import (
    Distance,
    EdgeConfig,
    EdgeShard,
    EdgeVectorParams,
    IntegerIndexParams,
    KeywordIndexParams,
    Point,
    UpdateOperation,
)

CHUNKS = 20_000
CHANGED = CHUNKS // 100
DIMENSIONS = 384
OPEN = 2**53 - 1
TEXT = "x" * 500

rng = np.random.default_rng(0)
vectors = rng.normal(size=(CHUNKS + CHANGED, DIMENSIONS)).astype(np.float32)
ids = [uuid.UUID(int=number + 1) for number in range(len(vectors))]
before, gone, fresh = range(CHUNKS), range(CHANGED), range(CHUNKS, CHUNKS + CHANGED)


@contextmanager
def shard() -> Iterator[EdgeShard]:
    config = EdgeConfig(vectors=EdgeVectorParams(size=DIMENSIONS, distance=Distance.Cosine), wal_enabled=False)
    with tempfile.TemporaryDirectory() as folder:
        opened = EdgeShard.create(folder, config)
        yield opened
        opened.close()


def put(opened: EdgeShard, numbers: Iterable[int], payload: dict[str, Any]) -> None:
    points = [Point(id=ids[n], vector=vectors[n].tolist(), payload={"text": TEXT} | payload) for n in numbers]
    for start in range(0, len(points), 1000):
        opened.update(UpdateOperation.upsert_points(points[start : start + 1000]))


def by_numbers() -> tuple[float, float]:
    with shard() as opened:
        for field in ("first", "last"):
            opened.update(UpdateOperation.create_field_index(field, IntegerIndexParams(range=True, lookup=False)))
        put(opened, before, {"first": 1, "last": OPEN})
        opened.optimize()

        def refresh() -> None:
            put(opened, fresh, {"first": 2, "last": OPEN})
            opened.update(UpdateOperation.set_payload([ids[n] for n in gone], {"last": 1}))

        return seconds(refresh), seconds(opened.optimize)


def by_lists() -> tuple[float, float]:
    with shard() as opened:
        opened.update(UpdateOperation.create_field_index("builds", KeywordIndexParams()))
        put(opened, before, {"builds": ["a"]})
        opened.optimize()

        def refresh() -> None:
            put(opened, fresh, {"builds": ["b"]})
            kept: list[int | uuid.UUID | str] = [ids[n] for n in before if n not in gone]
            opened.update(UpdateOperation.set_payload(kept, {"builds": ["a", "b"]}))

        return seconds(refresh), seconds(opened.optimize)


def by_collections() -> tuple[float, float]:
    with shard() as opened:
        written = seconds(lambda: put(opened, [*(n for n in before if n not in gone), *fresh], {}))
        return written, seconds(opened.optimize)


def seconds(work: Callable[[], Any]) -> float:
    """Of the processor: a wall clock would measure the neighbours on a shared machine."""
    start = os.times()
    work()
    end = os.times()
    return end.user - start.user + end.system - start.system


def main() -> None:
    ours = sum(numbers := by_numbers())
    print(f"{'a build is':<28}{'written s':>10}{'indexed s':>11}{'times ours':>12}")
    for name, taken in (
        ("numbers in each point (ours)", numbers),
        ("a list in each point", by_lists()),
        ("a collection", by_collections()),
    ):
        print(f"{name:<28}{taken[0]:>10.2f}{taken[1]:>11.2f}{sum(taken) / max(ours, 0.01):>12.0f}")


if __name__ == "__main__":
    main()
