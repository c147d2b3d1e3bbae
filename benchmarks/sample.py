"""What the sample costs, to publish in prod and to copy in staging: seconds of the first run, of one that finds nothing
new, and of one after a hundredth more was asked in prod. One process, local disk; the rows are made up, a third of them
rated.

    python benchmarks/sample.py [exchanges]
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from millrace.applications import load_application
from millrace.environments.sample import publish_exchanges
from millrace.environments.sample_copy import copy_exchanges
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_EXCHANGES, SILVER_FEEDBACK
from millrace.settings import Settings

START = datetime(2026, 11, 1, tzinfo=UTC)
BATCH = 20_000
EVERY = {
    "state": "completed", "simulated": True, "events_seen": 2, "release_id": "rel-0123456789abcdef", "epoch": 1,
    "release_version": "1", "index_build": "build-1", "prompt_version": "qa.prompt/1", "rollout_id": "r1",
    "arm": "champion", "assignment_probability": 0.25, "pinned": False, "fell_back": False, "from_cache": False,
    "citations": ["c" * 32, "d" * 32], "prompt_tokens": 600, "completion_tokens": 12, "seconds": 0.5,
    "cost_usd": 0.0001, "error": None, "comment": None, "correction": None,
}  # fmt: skip


def rows(first: int, last: int) -> Iterator[dict[str, Any]]:
    for number in range(first, last):
        at = START + timedelta(seconds=number)
        yield EVERY | {
            "completion_id": f"chatcmpl-{number:040}",
            "content_hash": f"{number:032}",
            "occurred_at": at,
            "completed_at": at,
            "date": at.date(),
            "user": f"{number % 997:032}",
            "question": f"What is option {number} for? Tell me at user{number}@example.org or +1 415 555 2671",
            "answer": f"It says how many of them run at once, {number} by default.",
            "rating": float(number % 2),
        }


def ask(prod: Lake, first: int, last: int) -> None:
    for begin in range(first, last, BATCH):
        made = list(rows(begin, min(begin + BATCH, last)))
        for table, those in ((SILVER_FEEDBACK, made[::3]), (SILVER_EXCHANGES, made)):
            picked = [{name: row[name] for name in table.rows_schema.names} for row in those]
            prod.merge(table, pa.Table.from_pylist(picked, schema=table.rows_schema), run="benchmark")


def main() -> None:
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000
    with tempfile.TemporaryDirectory() as folder:
        prods = Settings(home=Path(folder), environment="prod", pseudonym_key="benchmark")
        stagings = Settings(home=Path(folder), environment="staging")
        application = load_application(prods, "qa")
        prod = Lake.of(prods, "qa")
        ask(prod, 0, size)
        told: dict[str, Any] = {"exchanges": size, "share": application.sample.share}
        for name in ("first", "nothing new", "a hundredth more"):
            if name == "a hundredth more":
                ask(prod, size, size + size // 100)
            for verb, stage, settings in (("publish", publish_exchanges, prods), ("copy", copy_exchanges, stagings)):
                start = time.perf_counter()
                done = stage(settings, application, run="benchmark")
                told[f"seconds to {verb}, {name}"] = round(time.perf_counter() - start, 2)
                told["taken"] = done.get("exchanges", told.get("taken"))
        print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
