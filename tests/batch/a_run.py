"""Runs batch inference in a process of its own.

    python a_run.py GIVEN [N]

With N it is killed (SIGKILL) at its n-th commit of answers: they are there and paid for, and not yet written.
"""

import os
import pickle
import signal
import sys
from pathlib import Path
from typing import Any

from millrace.batch.inference import infer
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import GOLD_ANSWERS

QUESTIONS = [
    f"What does the option {name} do?"
    for name in (
        "dags_folder", "hostname_callable", "executor", "auth_manager", "parallelism", "load_examples",
        "plugins_folder", "fernet_key", "unit_test_mode", "default_pool_task_slot_count", "capacity", "killed_task",
    )
]  # fmt: skip


def die_at_commit(number: int) -> None:
    merge, commits = Lake.merge, 0

    def dying(self: Lake, table: Any, rows: Any, **how: Any) -> Any:
        nonlocal commits
        commits += table is GOLD_ANSWERS
        if commits == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return merge(self, table, rows, **how)

    Lake.merge = dying  # type: ignore[method-assign]


if __name__ == "__main__":
    if len(sys.argv) > 2:
        die_at_commit(int(sys.argv[2]))
    given = pickle.loads(Path(sys.argv[1]).read_bytes())
    infer(given["settings"], given["application"], run="killed", mode=given["mode"])
