"""What must be true of the machine and the home before anything starts: free ports, disk, memory, a Java, an MLflow of
this environment, an object store that keeps conditional writes. It changes nothing, an empty object there aside."""

import json
import shutil
import socket
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import psutil

from millrace.alerts import check_addresses
from millrace.errors import LakehouseError, SettingsError, StackError
from millrace.lakehouse.spark_process import find_java
from millrace.lakehouse.storage import store_of
from millrace.lakehouse.tables import PLATFORM
from millrace.settings import Settings
from millrace.stack.home import registry_mark

DISK_BYTES = 3 * 2**30
MEMORY_BYTES = 5 * 2**30
"""What the stack and one training run take on a machine with two cores."""


def check_machine(settings: Settings) -> None:
    """Raises:
    StackError: everything that is missing, a sentence each.
    """
    problems = [
        *_ports(settings),
        *_disk(settings.home),
        *_memory(),
        *_java(settings),
        *_alerts(settings),
        *_registry(settings),
        *_lake(settings),
    ]
    if problems:
        raise StackError(". ".join(problems))


def needed_ports(settings: Settings) -> dict[str, tuple[str, int]]:
    """Setting → who needs the port, and the port."""
    ports = {
        "MILLRACE_AIRFLOW_PORT": ("Airflow", settings.airflow_port),
        "MILLRACE_MLFLOW_PORT": ("MLflow", settings.mlflow_port),
        "MILLRACE_GATEWAY_PORT": ("the gateway", settings.gateway_port),
        "MILLRACE_SPARK_PORT": ("Spark Connect", settings.spark_port),
    }
    if settings.mlflow_uri:
        del ports["MILLRACE_MLFLOW_PORT"]
    if settings.spark_remote:
        del ports["MILLRACE_SPARK_PORT"]
    if settings.object_store_port:
        ports["MILLRACE_OBJECT_STORE_PORT"] = ("the object store", settings.object_store_port)
    if settings.spark_workers:
        ports["MILLRACE_SPARK_MASTER_PORT"] = ("Spark's master", settings.spark_master_port)
        ports["MILLRACE_SPARK_UI_PORT"] = ("the page of Spark's master", settings.spark_ui_port)
    return ports


def _further_ports(settings: Settings) -> Iterator[tuple[str, str, int]]:
    """Setting, who needs a port after the setting's own, and the port."""
    for number, port in enumerate(settings.gateway_ports[1:], 2):
        yield "MILLRACE_GATEWAY_PORT", f"gateway {number}", port
    for number in range(1, settings.spark_workers + 1):
        yield "MILLRACE_SPARK_UI_PORT", f"the page of Spark's worker {number}", settings.spark_ui_port + number


def _ports(settings: Settings) -> Iterator[str]:
    wanted = defaultdict(list)
    own = [(variable, who, port) for variable, (who, port) in needed_ports(settings).items()]
    for variable, who, port in (*own, *_further_ports(settings)):
        wanted[port].append(variable)
        if not _is_free(settings.host, port):
            yield f"port {port} on {settings.host} is in use and {who} needs it: free it, or set {variable} to another"
    for port, variables in wanted.items():
        if len(variables) > 1:
            yield f"{' and '.join(variables)} are both {port}: set one of them to another port"


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As the servers do: a connection that closed a moment ago doesn't hold the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _disk(home: Path) -> Iterator[str]:
    there = next(folder for folder in (home, *home.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if free < DISK_BYTES:
        yield (
            f"{home} has {free / 2**30:.1f} GiB of free disk and {DISK_BYTES / 2**30:.0f} GiB are needed: "
            "free some, or set MILLRACE_HOME to a folder on another disk"
        )


def _memory() -> Iterator[str]:
    available = psutil.virtual_memory().available
    if available < MEMORY_BYTES:
        yield (
            f"{available / 2**30:.1f} GiB of memory are available and {MEMORY_BYTES / 2**30:.0f} GiB are needed: "
            "end other programs"
        )


def _java(settings: Settings) -> Iterator[str]:
    if settings.spark_remote:
        return
    try:
        find_java()
    except LakehouseError as error:
        yield str(error)


def _lake(settings: Settings) -> Iterator[str]:
    if settings.object_store_port:  # it starts with the stack
        return
    store = store_of(settings)
    if store is None:
        return
    from millrace.lakehouse.store_check import check_store

    try:
        check_store(store, f"{settings.lake}/{settings.environment}/{PLATFORM}/leases")
    except LakehouseError as error:
        yield str(error)


def _alerts(settings: Settings) -> Iterator[str]:
    try:
        check_addresses(settings)
    except SettingsError as error:
        yield str(error)


def _registry(settings: Settings) -> Iterator[str]:
    mark = registry_mark(settings.home)
    if settings.mlflow_uri or not mark.exists():
        return
    held = json.loads(mark.read_text())["environment"]
    if held != settings.environment:
        yield (
            f"the embedded MLflow of {settings.home} has the releases of {held}, not of {settings.environment}: "
            "use another MILLRACE_HOME, or a server that they share (MILLRACE_MLFLOW_URI, MILLRACE_MLFLOW_WORKSPACES)"
        )
