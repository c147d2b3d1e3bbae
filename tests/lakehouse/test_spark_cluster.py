"""A real standalone cluster under the Connect server: a master, two workers, one core and half a gigabyte each."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
from pydantic import SecretStr

from millrace.applications import Chunking
from millrace.errors import LakehouseError
from millrace.lakehouse import spark_cluster
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.spark_session import on_server
from millrace.lakehouse.tables import SILVER_CHUNKS, SILVER_DOCUMENTS
from millrace.retrieval.chunk import chunk_documents
from millrace.settings import Settings
from tests.conftest import free_ports_in_a_row, running, running_spark
from tests.lakehouse.test_spark_server import java_that_says, listening
from tests.lakehouse.things import sentences, witnessed

FILES = 8
DOCUMENTS = 40
"""In each file of the source, so that the work is cut into tasks."""


@dataclass(frozen=True)
class Cluster:
    settings: Settings
    workers: tuple["subprocess.Popen[bytes]", ...]
    others: tuple["subprocess.Popen[bytes]", ...]
    """Master and Connect server."""

    @property
    def lake(self) -> Lake:
        return Lake.of(self.settings, "qa")


@pytest.fixture(params=["machine", "package"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """On the machine's own Java, and on that of the package, which lacks a module that Spark asks for."""
    if request.param == "package":
        monkeypatch.setenv("PATH", java_that_says(tmp_path / "bin", "25"))
    connect, master, *pages = free_ports_in_a_row(5)
    settings = Settings(
        home=tmp_path / "home",
        threads=2,
        spark_workers=2,
        spark_port=connect,
        spark_master_port=master,
        spark_ui_port=pages[0],
        spark_executor_memory_mb=512,
        spark_secret=SecretStr("it's/a secret=of ours"),
        spark_tables=frozenset({SILVER_CHUNKS.path}),
    )
    settings.home.mkdir()
    with ExitStack() as stack:
        started = stack.enter_context(
            started_as(settings, "master", spark_cluster.master_command(settings), lambda: answers(settings))
        )
        workers = tuple(stack.enter_context(a_worker(settings, number)) for number in (1, 2))
        connected = stack.enter_context(running_spark(settings))
        yield Cluster(settings, workers, (started, connected))
        # Or the client's threads ask a server that is gone for minutes, and this process doesn't end.
        on_server(settings.spark_connection, lambda session: session.stop())


def started_as(settings: Settings, name: str, command: tuple[list[str], dict[str, str]], ready):
    arguments, environment = command
    # What an executor's Python imports of the tests, by name.
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    return running(arguments, os.environ | environment, settings.home / f"{name}.log", ready, seconds=120)


def a_worker(settings: Settings, number: int):
    command = spark_cluster.worker_command(settings, number)
    return started_as(settings, f"worker-{number}", command, lambda: spark_cluster.worker_joined(settings, number))


def answers(settings: Settings) -> bool:
    return spark_cluster.workers_alive(settings) is not None


def documents(lake: Lake) -> None:
    """Several files of documents."""
    for file in range(FILES):
        rows = [
            {"document_id": f"{file}-{n}", "content_hash": f"{file}-{n}", "source": "test", "uri": f"test://{file}/{n}",
             "section": None, "title": f"Document {n}", "text": sentences(file * DOCUMENTS + n)}
            for n in range(DOCUMENTS)
        ]  # fmt: skip
        known = SILVER_DOCUMENTS.rows_schema
        lake.merge(SILVER_DOCUMENTS, pa.Table.from_pylist(rows, schema=known), run="test")


def chunked_here(lake: Lake, chunking: Chunking) -> dict[str, str]:
    """What the chunks must be, by the same function in this process."""
    source = lake.read(SILVER_DOCUMENTS, SILVER_DOCUMENTS.rows_schema.names).cast(SILVER_DOCUMENTS.rows_schema)
    made = pa.Table.from_batches(chunk_documents(iter(source.to_batches()), chunking))
    return dict(zip(made["chunk_id"].to_pylist(), made["text"].to_pylist(), strict=True))


def chunked_there(lake: Lake) -> dict[str, str]:
    rows = lake.read(SILVER_CHUNKS, ["chunk_id", "text"])
    found = dict(zip(rows["chunk_id"].to_pylist(), rows["text"].to_pylist(), strict=True))
    assert len(found) == rows.num_rows, "a chunk occurs twice"
    return found


def tasks(log: Path) -> list[str]:
    """Which worker ran each task that has begun."""
    return log.read_text().split() if log.exists() else []


@pytest.mark.long
@pytest.mark.spark
@pytest.mark.timeout(600)
def test_both_workers_chunk_and_one_that_is_killed_midway_costs_no_chunk(cluster: Cluster, tmp_path: Path) -> None:
    lake, chunking = cluster.lake, Chunking(max_words=20, overlap_words=5)
    documents(lake)
    expected = chunked_here(lake, chunking)

    log = tmp_path / "tasks"
    lake.transform(SILVER_DOCUMENTS, partial(witnessed, chunking=chunking, log=log), SILVER_CHUNKS, run="test")
    assert set(tasks(log)) == {"worker-1", "worker-2"}
    assert chunked_there(lake) == expected

    # Again with other chunks; as soon as both workers are at work, one is gone with all that it started.
    log, chunking = tmp_path / "tasks again", Chunking(max_words=30, overlap_words=5)
    expected = chunked_here(lake, chunking)
    function = partial(witnessed, chunking=chunking, log=log, pause=1.0)
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(lake.transform, SILVER_DOCUMENTS, function, SILVER_CHUNKS, run="test")
        until(lambda: len(set(tasks(log))) == 2 or work.done(), 120)
        assert not work.done()
        os.killpg(cluster.workers[0].pid, signal.SIGKILL)
        began = len(tasks(log))
        written = work.result(timeout=240)
    assert written.inserted == len(expected)
    assert chunked_there(lake) == expected
    assert set(tasks(log)[began:]) == {"worker-2"}, "the other did what the lost one had begun"
    until(lambda: spark_cluster.workers_alive(cluster.settings) == 1, 120)


@pytest.mark.long
@pytest.mark.spark
@pytest.mark.timeout(600)
@pytest.mark.parametrize("cluster", ["machine"], indirect=True)
def test_a_cluster_listens_on_loopback_and_takes_nobody_without_its_secret(cluster: Cluster) -> None:
    settings = cluster.settings
    for process in (*cluster.workers, *cluster.others):
        assert {address for address, _ in listening(process.pid)} == {"127.0.0.1"}
        assert b"secret=of" not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    kept = list(settings.home.glob("spark/**/cluster.conf"))
    assert len(kept) == 4
    assert {path.stat().st_mode & 0o077 for path in kept} == {0}

    stranger = settings.model_copy(update={"spark_secret": SecretStr("a guess"), "home": settings.home / "stranger"})
    stranger.home.mkdir()
    arguments, environment = spark_cluster.worker_command(stranger, 3)
    arguments[arguments.index("--webui-port") + 1] = "0"
    with (stranger.home / "log").open("wb") as log:
        process = subprocess.Popen(arguments, env=os.environ | environment, stdout=log, stderr=log)
    try:
        # It gives up, or is still refused when others would long have been taken.
        until(lambda: process.poll() is not None or "Exception" in (stranger.home / "log").read_text(), 60)
        time.sleep(5)
        assert spark_cluster.workers_alive(settings) == 2
    finally:
        process.kill()
        process.wait()


def test_a_worker_without_a_master_to_join_is_one_sentence(settings: Settings) -> None:
    with pytest.raises(LakehouseError, match="a worker needs a master: set MILLRACE_SPARK_MASTER"):
        spark_cluster.worker_command(settings, 1)


def until(done, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
