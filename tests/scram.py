"""A real PostgreSQL that asks every role but its superuser for a password."""

import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from millrace.stack.postgres import Postgres


@contextmanager
def scram_server(folder: Path) -> Iterator[Postgres]:
    """Over its socket, as a server elsewhere does over the network.

    Args:
        folder: which other users may pass through.
    """
    postgres = Postgres(Path(tempfile.mkdtemp(dir=folder)) / "postgres")
    postgres.prepare()
    (postgres.data / "pg_hba.conf").write_text("local all postgres trust\nlocal all all scram-sha-256\n")
    user = postgres.system_user
    process = subprocess.Popen(
        postgres.command(), user=user, group=user, extra_groups=[] if user else None, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while not postgres.answers():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield postgres
    finally:
        process.send_signal(signal.SIGQUIT)  # at once: nothing of it is kept
        process.wait(30)
