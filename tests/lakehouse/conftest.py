"""A lake on each engine, and processes that write to it at the same moment."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.pool import Pool
from pathlib import Path
from uuid import uuid4

import pytest

from millrace.lakehouse import spark_server
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.storage import REGION, ObjectStore
from millrace.lakehouse.tables import TABLES
from millrace.settings import PROJECT, Settings
from millrace.stack.environment import settings_variables
from millrace.stack.versitygw import Versitygw
from tests.conftest import free_port, running
from tests.lakehouse.things import COUNTED, EVERYTHING, OTHER_THINGS, THINGS

KEEPER = (sys.executable, "-m", "millrace.lakehouse.spark_server")
SPARK_TABLES = frozenset(
    {path for path in TABLES if not path.startswith("ops/")}
    | {THINGS.path, OTHER_THINGS.path, EVERYTHING.path, COUNTED.path}
)


@pytest.fixture(
    params=[
        "local",
        pytest.param("spark", marks=pytest.mark.spark),
        pytest.param("local, object store", marks=pytest.mark.long),
        pytest.param("spark, object store", marks=[pytest.mark.spark, pytest.mark.long]),
    ]
)
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def lake(engine: str, settings: Settings, request: pytest.FixtureRequest) -> Lake:
    """A lake whose tables are all committed by `engine`."""
    by, _, where = engine.partition(", ")
    if where:
        settings = request.getfixturevalue("in_object_store")
    if by == "local":
        return Lake.of(settings, "qa")
    url = request.getfixturevalue("spark_on_store" if where else "spark_url")
    return Lake.of(settings.model_copy(update={"spark_remote": url, "spark_tables": SPARK_TABLES}), "qa")


@pytest.fixture(scope="session")
def lake_in_store(object_store: Versitygw) -> Settings:
    """Settings of a lake in a bucket for the whole session, reached as the store's administrator."""
    key, uri = object_store.root, "s3://lakehouse/lake"
    store = ObjectStore(object_store.url, REGION, key)
    store.client().create_bucket(Bucket="lakehouse")
    return Settings(
        lake_uri=uri, lake_endpoint=object_store.url, lake_access_key=key.access_key, lake_secret_key=key.secret_key
    )


@pytest.fixture
def in_object_store(settings: Settings, lake_in_store: Settings) -> Settings:
    """`settings`, with a lake of its own in the object store."""
    names = ("lake_endpoint", "lake_access_key", "lake_secret_key")
    changes = {name: getattr(lake_in_store, name) for name in names}
    return settings.model_copy(update=changes | {"lake_uri": f"{lake_in_store.lake_uri}/{uuid4().hex}"})


@pytest.fixture(scope="session")
def spark_on_store(lake_in_store: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Spark Connect server with the object store's credential for the whole session, on a free port."""
    changes = {"home": tmp_path_factory.mktemp("spark"), "spark_port": free_port(), "threads": 2}
    settings = lake_in_store.model_copy(update=changes)
    with kept_spark(settings):
        yield settings.spark_url


@contextmanager
def kept_spark(settings: Settings) -> Iterator["subprocess.Popen[bytes]"]:
    """A Spark Connect server under its keeper, ready inside the `with`, with nothing left of it after."""
    environment = os.environ | settings_variables(settings, keys=True)
    environment["PYTHONPATH"] = str(PROJECT)  # workers import the tests' functions by name
    log = settings.home / "keeper.log"
    with running(KEEPER, environment, log, lambda: spark_server.ready(settings)) as process:
        yield process
        if process.poll() is None:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="session")
def processes() -> Iterator[Pool]:
    """Four processes that have Millrace imported, once: they are forked before delta-rs has started a thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.lakehouse.things"])
    with context.Pool(4) as pool:
        yield pool


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Two megabytes of memory as a disk."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount the small tmpfs that stands for a full disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    assert mounted.returncode == 0, f"root can't mount a tmpfs here: {mounted.stderr}"
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
