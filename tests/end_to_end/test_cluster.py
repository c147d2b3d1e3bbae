"""The loop once more on what a cluster has (`make run PROFILE=cluster`): an object store, a Spark standalone cluster of
two workers and two gateways. Nothing but settings is different."""

import io
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import boto3
import httpx
import pytest
from rich.console import Console

from millrace.demo.memory import MemoryPeak
from millrace.demo.run import Told, tell_story
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.storage import own_key, own_store
from millrace.lakehouse.tables import GOLD_ANSWERS, SILVER_CHUNKS, SILVER_EXCHANGES
from millrace.settings import PROJECT, read_settings
from millrace.sources.event_log import read_events
from millrace.stack import Stack, status
from tests.conftest import free_ports_in_a_row, stack_settings
from tests.serving.parrot import EVER

PROFILE = PROJECT / "deploy" / "profiles" / "cluster.env"
MOST_MEMORY = 16 * 2**30


def profile() -> dict[str, str]:
    """Setting → value, as `make run` hands them on."""
    command = f"set -a; . {PROFILE}; env"
    told = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, env={"PATH": os.defpath})
    return dict(line.split("=", 1) for line in told.stdout.splitlines() if line.startswith("MILLRACE_"))


def test_the_profile_is_settings_that_are_understood_and_make_a_cluster() -> None:
    with mock.patch.dict(os.environ, profile(), clear=True):
        settings = read_settings()
    assert settings.lake.startswith("s3://")
    assert (settings.spark_workers, settings.gateways) == (2, 2)
    assert settings.spark_cluster == "spark://127.0.0.1:7077"
    assert settings.home.name == ".millrace-cluster"


@pytest.fixture(scope="module")
def cluster(open_folder: Path) -> Iterator[Stack]:
    with mock.patch.dict(os.environ, profile(), clear=True):
        given = read_settings()
    wanted = {
        name: getattr(given, name) for name in ("lake_uri", "spark_workers", "spark_executor_memory_mb", "gateways")
    }
    first, *ports = free_ports_in_a_row(7)
    about = {"object_store_port": first, "spark_master_port": ports[0], "spark_ui_port": ports[1]}
    settings = stack_settings(open_folder / "cluster", **wanted, **about)
    with MemoryPeak() as others:  # other tests left running
        pass
    with MemoryPeak() as memory, Stack(settings.model_copy(update={"gateway_port": ports[4]})) as stack:
        yield stack
        used = memory.bytes - others.bytes
        assert used < MOST_MEMORY, f"{used / 2**30:.1f} GiB"


@pytest.fixture(scope="module")
def told(cluster: Stack) -> Told:
    said = Console(file=(out := io.StringIO()), width=200)
    with cluster.airflow() as airflow:
        told = tell_story(cluster.settings, "qa", airflow, said)
    print(out.getvalue())
    assert told.failure is None, out.getvalue()
    return told


@pytest.mark.long
@pytest.mark.stack
@pytest.mark.timeout(1800)
def test_the_loop_turns_on_the_object_store_the_spark_cluster_and_both_gateways(cluster: Stack, told: Told) -> None:
    settings = cluster.settings
    assert {part.part for part in status(settings).parts if part.healthy} >= {
        "object-store", "spark-master", "spark-worker-1", "spark-worker-2", "spark", "gateway", "gateway-2"
    }  # fmt: skip

    # Nothing of the lake is in the home, and all of it in the store.
    assert not (settings.home / "lake").exists()
    lake = Lake.of(settings, "qa")
    for table in (SILVER_CHUNKS, SILVER_EXCHANGES, GOLD_ANSWERS):
        assert lake.uri(table).startswith("s3://lakehouse/lake/dev/qa/")
        assert lake.read(table).num_rows, table.path
    key = own_key(settings, "prod")  # which reads staging and no dev
    other = boto3.client(
        "s3", endpoint_url=f"http://127.0.0.1:{settings.object_store_port}", region_name="us-east-1",
        aws_access_key_id=key.access_key, aws_secret_access_key=key.secret_key,
    )  # fmt: skip
    with pytest.raises(other.exceptions.ClientError, match="AccessDenied"):
        other.list_objects_v2(Bucket="lakehouse", Prefix="lake/dev/")
    assert {path.stat().st_mode & 0o077 for path in (own_store(settings) / "keys").iterdir()} == {0}

    # Both gateways answered, each into segments of its own, and both workers had executors.
    segments = Counter(line.segment.split("-")[3] for line in read_events(settings.event_log("qa"), *EVER))
    assert len(segments) == 2
    for worker in (1, 2):
        page = httpx.get(f"http://127.0.0.1:{settings.spark_ui_port + worker}/json/", trust_env=False).json()
        assert page["executors"] or page["finishedexecutors"]
