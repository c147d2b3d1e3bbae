import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest
import sqlalchemy

from millrace.stack import processes
from millrace.stack.postgres import Postgres

pytestmark = pytest.mark.slow


@pytest.fixture
def home(open_folder: Path) -> Path:
    """So deep that a socket beside the data would have too long a path, and with characters that an address quotes."""
    home = Path(tempfile.mkdtemp(dir=open_folder)) / ("a deep & narrow folder " * 5).strip() / "home"
    for name in ("run", "logs"):
        (home / name).mkdir(parents=True)
    return home


@pytest.fixture
def server(home: Path) -> Iterator[Postgres]:
    postgres = Postgres(home / "postgres")
    yield postgres
    processes.end(home, ["postgres"], seconds=10)


def _start(home: Path, postgres: Postgres) -> int:
    postgres.prepare()
    made = processes.launch(
        postgres.command(), dict(os.environ), home=home, part="postgres", user=postgres.system_user, cwd=home.parent
    )
    processes.record(home, "postgres", made.pid, signal.SIGINT, True)
    deadline = time.monotonic() + 30
    while not postgres.answers():
        assert made.poll() is None, processes.log_tail(home, "postgres")
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return made.pid


def test_what_was_committed_survives_a_kill_and_the_stale_lock_file_it_leaves(home: Path, server: Postgres) -> None:
    pid = _start(home, server)
    server.create_database("airflow")
    server.create_database("airflow")
    engine = sqlalchemy.create_engine(server.url("airflow"))
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("create table kept as select 42 as answer"))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (server.data / "postmaster.pid").exists()

    _start(home, server)
    engine.dispose()
    with engine.begin() as connection:
        assert connection.execute(sqlalchemy.text("select answer from kept")).scalar() == 42
    engine.dispose()


def test_nobody_else_on_the_machine_can_open_the_socket(home: Path, server: Postgres) -> None:
    _start(home, server)
    sockets = list(server.socket_folder.glob(".s.PGSQL.*[0-9]"))
    assert [oct(path.stat().st_mode & 0o777) for path in sockets] == ["0o700"]
    assert server.socket_folder.stat().st_mode & 0o077 == 0
    with pytest.raises(psycopg2.OperationalError):
        psycopg2.connect(host="127.0.0.1", user="postgres", dbname="postgres")


def test_a_data_directory_left_half_made_is_made_again(home: Path, server: Postgres) -> None:
    (server.folder / "data.unfinished").mkdir(parents=True)
    (server.folder / "data.unfinished" / "PG_VERSION").write_text("18")
    _start(home, server)
    assert (server.data / "PG_VERSION").exists()
    assert not (server.folder / "data.unfinished").exists()
