"""A lake on each engine, and processes that write to it at the same moment."""

import multiprocessing
import os
import subprocess
from collections.abc import Iterator
from multiprocessing.pool import Pool
from pathlib import Path

import pytest

from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import TABLES
from millrace.settings import Settings
from tests.lakehouse.things import COUNTED, EVERYTHING, OTHER_THINGS, THINGS

SPARK_TABLES = frozenset(
    {path for path in TABLES if not path.startswith("ops/")}
    | {THINGS.path, OTHER_THINGS.path, EVERYTHING.path, COUNTED.path}
)


@pytest.fixture(params=["local", pytest.param("spark", marks=pytest.mark.spark)])
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def lake(engine: str, settings: Settings, request: pytest.FixtureRequest) -> Lake:
    """A lake whose tables are all committed by `engine`."""
    if engine == "local":
        return Lake.of(settings, "qa")
    return Lake(
        str(settings.lake), "dev", "qa", spark_url=request.getfixturevalue("spark_url"), spark_tables=SPARK_TABLES
    )


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
