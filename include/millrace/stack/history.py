"""Airflow's history, bounded: `python -m millrace.stack.history` runs `airflow db clean` once a day.

A process of its own, because only what holds the database's address may clean it, and tasks don't: Airflow keeps that
from them. The latest run of each DAG always stays.
"""

import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

from millrace.settings import read_settings

FIRST_SECONDS = 900.0
"""After a start: whoever has just started Millrace waits for something else."""
DAY_SECONDS = 86_400.0


def main() -> int:
    """Until a signal ends it, or a table can't be cleaned: then its exit status is Airflow's."""
    days = read_settings().airflow_history_days
    time.sleep(FIRST_SECONDS)
    while not (status := clean(datetime.now(UTC) - timedelta(days=days))):
        time.sleep(DAY_SECONDS)
    return status


def clean(before: datetime) -> int:
    """Remove what is older from Airflow's database; Airflow's exit status, 0 if every table was cleaned."""
    moment = before.isoformat(timespec="seconds")
    arguments = ("db", "clean", "--clean-before-timestamp", moment, "--skip-archive", "--yes")
    return subprocess.run((sys.executable, "-m", "airflow", *arguments, "--error-on-cleanup-failure")).returncode


if __name__ == "__main__":
    sys.exit(main())
