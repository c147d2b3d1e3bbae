"""Where a lake is, and with which credential it is reached: a folder, or an S3-compatible object store.

It says the same thing to each who reads and writes there (delta-rs, Arrow, Spark, boto3), and knows no table. Commits
rest on conditional writes, `If-None-Match` and `If-Match`: a store without them can't hold a lake.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pyarrow.fs as pafs
from deltalake.fs import DeltaStorageHandler

from millrace.errors import LakehouseError
from millrace.settings import Settings

if TYPE_CHECKING:
    from botocore.client import BaseClient

REGION = "us-east-1"
"""What S3-compatible stores call the place where they are, unless they are told otherwise."""


@dataclass(frozen=True)
class Key:
    """A credential of an object store; there the access key's name is who somebody is."""

    access_key: str
    secret_key: str = field(repr=False)


@dataclass(frozen=True)
class ObjectStore:
    """An S3-compatible store, as one identity sees it."""

    endpoint: str
    """`http://host:port` or `https://…`; empty: AWS's own."""
    region: str
    key: Key | None
    """None: the credential that this machine has of AWS, by its own chain."""

    @property
    def identity(self) -> str:
        return self.key.access_key if self.key else "this machine"

    def delta_options(self) -> dict[str, str]:
        """For delta-rs."""
        options = {
            "aws_region": self.region,
            "aws_conditional_put": "etag",
            "aws_virtual_hosted_style_request": "false" if self.endpoint else "true",
        }
        if self.endpoint:
            options |= {"aws_endpoint": self.endpoint, "aws_allow_http": str(not self._tls).lower()}
        if self.key:
            options |= {"aws_access_key_id": self.key.access_key, "aws_secret_access_key": self.key.secret_key}
        return options

    def arrow(self) -> pafs.FileSystem:
        """For Arrow; paths begin with the bucket."""
        known: dict[str, Any] = {"region": self.region}
        if self.endpoint:
            known |= {"endpoint_override": self.endpoint, "scheme": "https" if self._tls else "http"}
        if self.key:
            known |= {"access_key": self.key.access_key, "secret_key": self.key.secret_key}
        return pafs.S3FileSystem(**known)

    def client(self, *, seconds: float = 60, tries: int = 3) -> "BaseClient":
        """For single objects, and for the store's own settings.

        Args:
            seconds: how long an answer may take.
            tries: how often it is asked for.
        """
        import boto3
        from botocore.config import Config

        config = Config(
            s3={"addressing_style": "path" if self.endpoint else "auto"},
            connect_timeout=min(5, seconds),
            read_timeout=seconds,
            retries={"mode": "standard", "total_max_attempts": tries},
        )
        known = {}
        if self.key:
            known = {"aws_access_key_id": self.key.access_key, "aws_secret_access_key": self.key.secret_key}
        return boto3.client("s3", endpoint_url=self.endpoint or None, region_name=self.region, config=config, **known)

    def hadoop(self) -> dict[str, str]:
        """For Hadoop's S3A, the credential aside: Spark finds that in its process's environment (`variables`)."""
        options = {
            "fs.s3.impl": "org.apache.hadoop.fs.s3a.S3AFileSystem",
            "fs.s3a.endpoint.region": self.region,
        }
        if self.endpoint:
            options |= {
                "fs.s3a.endpoint": self.endpoint,
                "fs.s3a.path.style.access": "true",
                "fs.s3a.connection.ssl.enabled": str(self._tls).lower(),
            }
        if self.key:
            options["fs.s3a.aws.credentials.provider"] = "org.apache.hadoop.fs.s3a.SimpleAWSCredentialsProvider"
        return options

    def variables(self) -> dict[str, str]:
        """The credential as environment variables, as AWS's clients read it."""
        if not self.key:
            return {}
        return {"AWS_ACCESS_KEY_ID": self.key.access_key, "AWS_SECRET_ACCESS_KEY": self.key.secret_key}

    @property
    def _tls(self) -> bool:
        return self.endpoint.startswith("https://")


class Location(str):
    """The address of a table, with the store that it is in. Most of the code only names a table: to it this is text."""

    store: ObjectStore | None

    def __new__(cls, uri: str, store: ObjectStore | None = None) -> "Location":
        made = super().__new__(cls, uri)
        made.store = store
        return made


def own_store(settings: Settings) -> Path:
    """Folder of the object store that the stack keeps itself."""
    return settings.home / "object-store"


def own_key(settings: Settings, identity: str) -> Key:
    """The credential of an environment in the store that the stack keeps itself.

    Raises:
        LakehouseError: that store was never started.
    """
    path = own_store(settings) / "keys" / identity
    try:
        return Key(identity, path.read_text())
    except OSError as error:
        raise LakehouseError(
            f"{path}, {identity}'s credential for the lake, can't be read ({error.strerror}); `millrace up` makes it"
        ) from None


def store_of(settings: Settings) -> ObjectStore | None:
    """The object store of the deployment's lake; None: the lake is a folder.

    Raises:
        LakehouseError: it is one that the stack keeps itself, and it was never started.
    """
    if not settings.lake_uri:
        return None
    if settings.object_store_port:
        url = f"http://{settings.host}:{settings.object_store_port}"
        return ObjectStore(url, REGION, own_key(settings, settings.environment))
    access_key = settings.lake_access_key.get_secret_value()
    key = Key(access_key, settings.lake_secret_key.get_secret_value()) if access_key else None
    return ObjectStore(settings.lake_endpoint, settings.lake_region, key)


def store_at(uri: str) -> ObjectStore | None:
    return uri.store if isinstance(uri, Location) else None


def delta_options(uri: str) -> dict[str, str] | None:
    """What delta-rs must know beside the address."""
    store = store_at(uri)
    return store.delta_options() if store else None


def files_for_arrow(uri: str) -> pafs.FileSystem:
    """The table's folder for Arrow's readers. Through delta-rs's file system, written in Python, Arrow's reading
    threads abort a process that ends soon after (seen in one of eight)."""
    store = store_at(uri)
    if store is None:
        return pafs.SubTreeFileSystem(uri, pafs.LocalFileSystem())
    bucket, prefix = bucket_and_prefix(uri)
    return pafs.SubTreeFileSystem(f"{bucket}/{prefix}", store.arrow())


def files_for_upkeep(uri: str) -> pafs.FileSystem:
    """The table's folder, for looking and removing one by one: Arrow's own would leave an empty object where it
    removed another from an object store."""
    return pafs.PyFileSystem(DeltaStorageHandler(uri, delta_options(uri)))


def bucket_and_prefix(uri: str) -> tuple[str, str]:
    """Of `s3://bucket/prefix`; the prefix has no slash at either end."""
    address = urlsplit(uri)
    return address.netloc, address.path.strip("/")
