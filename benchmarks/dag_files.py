"""What each DAG file adds to the cost of importing Airflow, in seconds of a fresh process.

    python benchmarks/dag_files.py

Peer: an empty DAG file, which imports `airflow.sdk` and declares one DAG with one task. Each file and the peer are
parsed in turn, in processes of their own, several rounds; the table shows medians. The goal is below 0.3 s.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).parents[1]
ROUNDS = 5
PEER = """
from airflow.sdk import DAG, task
with DAG("peer"):
    @task
    def nothing(): ...
    nothing()
"""
# The clock starts inside the process: starting Python is the same for all.
PARSE = "import time, runpy, sys; t = time.perf_counter(); runpy.run_path(sys.argv[1]); print(time.perf_counter() - t)"


def seconds(path: Path, environment: dict[str, str]) -> float:
    command = [sys.executable, "-c", PARSE, str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return float(ended.stdout.splitlines()[-1])


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        peer = Path(scratch) / "peer.py"
        peer.write_text(PEER)
        environment = os.environ | {"AIRFLOW_HOME": scratch, "PYTHONPATH": str(PROJECT / "plugins")}
        files = [peer, *sorted((PROJECT / "dags").glob("*.py"))]
        taken: dict[Path, list[float]] = {file: [] for file in files}
        seconds(peer, environment)  # fills the file cache
        for _ in range(ROUNDS):
            for file in files:
                taken[file].append(seconds(file, environment))
    base = statistics.median(taken[peer])
    print(f"{'file':<28}{'median s':>10}{'adds s':>10}{'ratio':>8}")
    for file, times in taken.items():
        median = statistics.median(times)
        print(f"{file.name:<28}{median:>10.2f}{median - base:>10.2f}{median / base:>8.2f}")


if __name__ == "__main__":
    main()
