"""The S3 server of tests and of a cluster on one machine: what it keeps, whom it lets in, where it listens."""

import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from botocore.exceptions import ClientError

from millrace.lakehouse.storage import REGION, Key, ObjectStore
from millrace.settings import Settings
from millrace.stack.versitygw import Versitygw
from tests.conftest import free_port, running

pytestmark = pytest.mark.long


@contextmanager
def started(server: Versitygw) -> Iterator["subprocess.Popen[bytes]"]:
    server.prepare()
    environment = os.environ | server.environment()
    with running(server.command(Settings().cache), environment, server.folder / "log", server.answers) as process:
        yield process


def client(server: Versitygw, key: Key) -> Any:
    return ObjectStore(server.url, REGION, key).client()


def test_a_killed_server_has_lost_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    server = Versitygw(tmp_path / "store", int(free_port()))
    with started(server) as process:
        client(server, server.root).create_bucket(Bucket="kept")
        client(server, server.root).put_object(Bucket="kept", Key="a/b", Body=b"content")
        server.create_user(Key("ann", "a secret"))
        process.send_signal(signal.SIGKILL)
        process.wait()
    again = Versitygw(tmp_path / "store", int(free_port()))
    with started(again):
        assert client(again, server.root).get_object(Bucket="kept", Key="a/b")["Body"].read() == b"content"
        assert client(again, Key("ann", "a secret")).list_buckets()["Buckets"] == []


def test_a_new_secret_ends_the_old_one_at_once_and_a_user_may_do_nothing_yet(object_store: Versitygw) -> None:
    client(object_store, object_store.root).create_bucket(Bucket="somebodys")
    for secret in ("first secret", "second secret"):
        object_store.create_user(Key("bob", secret))
        assert client(object_store, Key("bob", secret)).list_buckets()["Buckets"] == []
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        client(object_store, Key("bob", "first secret")).list_buckets()
    with pytest.raises(ClientError, match="InvalidAccessKeyId"):
        client(object_store, Key("nobody", "secret")).list_buckets()
    bob = client(object_store, Key("bob", "second secret"))
    for attempt in (
        lambda: bob.list_objects_v2(Bucket="somebodys"),
        lambda: bob.put_object(Bucket="somebodys", Key="x", Body=b""),
        lambda: bob.create_bucket(Bucket="bobs-own"),
    ):
        with pytest.raises(ClientError, match="AccessDenied"):
            attempt()


def test_it_listens_on_this_machine_only_and_its_secrets_are_its_owners(tmp_path: Path) -> None:
    server = Versitygw(tmp_path / "store", int(free_port()))
    with started(server) as process:
        addresses = {one.laddr.ip for one in psutil.Process(process.pid).net_connections() if one.status == "LISTEN"}
        assert addresses == {"127.0.0.1"}
        server.create_user(Key("ann", "the secret of ann"))
        assert not [part for part in psutil.Process(process.pid).cmdline() if server.root.secret_key in part]
    assert stat.S_IMODE((server.folder / "root.key").stat().st_mode) == 0o600
    assert stat.S_IMODE((server.folder / "users").stat().st_mode) == 0o700
    other = Versitygw(tmp_path / "other", server.port)
    other.prepare()
    assert other.root.secret_key != server.root.secret_key
