"""A lake on each engine, and processes that write to it at the same moment."""

import multiprocessing
from collections.abc import Iterator
from multiprocessing.pool import Pool

import pytest
from tests.lakehouse.things import COUNTED, EVERYTHING, OTHER_THINGS, THINGS

from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import TABLES
from millrace.settings import Settings

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
    """Four processes that have Millrace imported."""
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        yield pool
