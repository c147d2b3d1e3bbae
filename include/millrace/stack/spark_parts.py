"""The parts that are Spark: the Connect server and, where `spark_workers` says so, a standalone cluster under it."""

import sys
from functools import partial

from pydantic import SecretStr

from millrace.lakehouse import spark_cluster, spark_server
from millrace.settings import Settings
from millrace.stack.environment import lake_credential, part_environment
from millrace.stack.home import Secrets
from millrace.stack.part import Part, get

_MASTER = "spark-master"


def spark_parts(settings: Settings, secrets: Secrets) -> list[Part]:
    """In an order in which they can start."""
    if settings.spark_workers and not settings.spark_secret.get_secret_value():
        settings = settings.model_copy(update={"spark_secret": SecretStr(secrets.spark_secret)})
    workers = range(1, settings.spark_workers + 1)
    cluster = [_master(settings), *(_worker(settings, number) for number in workers)] if workers else []
    return [*cluster, _connect(settings, after=tuple(part.name for part in cluster))]


def _connect(settings: Settings, after: tuple[str, ...]) -> Part:
    command, variables = spark_server.command(settings)
    if settings.lake_uri:  # behind a keeper, which holds the lease and reads the settings again
        command = [sys.executable, "-m", "millrace.lakehouse.spark_server"]
        secret = settings.spark_secret.get_secret_value()
        variables |= lake_credential(settings) | {"MILLRACE_SPARK_SECRET": secret}
    return Part(
        name="spark",
        command=tuple(command),
        environment=part_environment(settings, threads=settings.threads, keys=False) | variables,
        ready=lambda started: spark_server.ready(settings),
        after=after,
        deadline=300,
        url=settings.spark_url,
    )


def _master(settings: Settings) -> Part:
    command, variables = spark_cluster.master_command(settings)
    return Part(
        name=_MASTER,
        command=tuple(command),
        environment=part_environment(settings, threads=1, keys=False) | variables,
        ready=lambda started: get(settings, settings.spark_ui_port, "/json/") is not None,
        url=f"http://{settings.host}:{settings.spark_ui_port}",
    )


def _worker(settings: Settings, number: int) -> Part:
    command, variables = spark_cluster.worker_command(settings, number)
    return Part(
        name=f"spark-worker-{number}",
        command=tuple(command),
        # Its executors' Python processes compute with one thread for each task.
        environment=part_environment(settings, threads=1, keys=False) | variables,
        ready=partial(_joined, settings, number),
        after=(_MASTER,),
        url=f"http://{settings.host}:{settings.spark_ui_port + number}",
    )


def _joined(settings: Settings, number: int, started: float) -> bool:
    return spark_cluster.worker_joined(settings, number)
