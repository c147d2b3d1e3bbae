"""How long `make run ONCE=1` takes from nothing but the downloads, and the most memory that it holds.

    python benchmarks/loop.py [--home FOLDER]

Runs the real loop in a new home (default: a temporary one) with the packages that are installed and prints, beside
the goals: seconds until the first question was answered, seconds of the whole loop, peak memory of everything (each
shared page counted once), and each stage's seconds. There is no peer: nothing else runs this loop.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from deltalake import DeltaTable

from millrace.demo.report_model import Report

GOALS = {"first answer": 180.0, "whole loop": 2100.0, "memory": 12.0}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path)
    home = parser.parse_args().home or Path(tempfile.mkdtemp(prefix="millrace-loop-"))
    environment = os.environ | {"MILLRACE_HOME": str(home), "MILLRACE_PACE": "demo"}
    began, clock = datetime.now(UTC), time.monotonic()
    ended = subprocess.run([str(Path(sys.executable).parent / "millrace"), "run", "--once"], env=environment)
    seconds = time.monotonic() - clock
    report = Report.model_validate(json.loads((home / "report.json").read_text()))
    exchanges = DeltaTable(str(home / "lake/dev/qa/silver/exchanges")).to_pyarrow_table(["completed_at"])
    first = (min(moment for moment in exchanges["completed_at"].to_pylist() if moment) - began).total_seconds()

    print(f"\n{report.headline}\n")
    for stage in report.stages:
        print(f"{stage.name:<14}{stage.state:<14}{stage.seconds:>7.0f} s  {stage.detail[:90]}")
    memory = (report.machine.memory_peak_bytes or 0) / 2**30
    print(f"\n{'':<16}{'measured':>10}{'goal':>8}")
    for name, value, unit in (("first answer", first, "s"), ("whole loop", seconds, "s"), ("memory", memory, "GiB")):
        print(f"{name:<16}{value:>10.1f}{GOALS[name]:>8.0f} {unit}")
    print(f"on {report.machine.cores} cores, {report.machine.platform}, Python {report.machine.python}; home {home}")
    return ended.returncode


if __name__ == "__main__":
    sys.exit(main())
