"""What an object store lets each environment's identity do in the lake, found out by trying it.

In every environment, and every place beside them, a probe stands for what is there: a table that the identity which
manages it makes, and removes at the end.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack

import pyarrow as pa

from millrace.environments.access.lake_wall import Bucket
from millrace.environments.access.matrix import PLACES, READS, Observed, right
from millrace.errors import AccessRefused, LakehouseError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.places import owner
from millrace.lakehouse.storage import Key
from millrace.lakehouse.tables import PLATFORM, Table, text
from millrace.settings import Settings

OF_READERS = {("list", "objects"), ("read", "table")}
"""Of what is tried, what an identity may do where it only reads."""
OF_OWNERS = {
    ("append to", "table"),
    ("create", "table"),
    ("overwrite", "commit"),
    ("upload", "parts of an object"),
    ("delete", "object"),
}
OF_NOBODY = {("change", "policy")}
"""What no environment's identity may; tried at home."""


def declared() -> list[Observed]:
    """What `check` would try."""
    return [
        Observed(identity, place, resource, action, _is_declared(identity, place, (action, resource)), None)
        for identity in READS
        for place in PLACES
        for action, resource in sorted(OF_READERS | OF_OWNERS | (OF_NOBODY if identity == place else set()))
    ]


def _is_declared(identity: str, place: str, tried: tuple[str, str]) -> bool:
    may = right(identity, place)
    return tried in OF_READERS | OF_OWNERS if may == "manages" else may == "reads" and tried in OF_READERS


def check(settings: Settings, keys: Mapping[str, Key]) -> list[Observed]:
    """Every identity tries every action in every environment, and every place beside them.

    Args:
        keys: every identity's.

    Raises:
        LakehouseError: the lake is a folder, the store doesn't answer, or whoever manages an environment can't make the
            probe in it.
    """
    if missing := sorted(READS.keys() - keys.keys()):
        raise LakehouseError(f"to try what {', '.join(missing)} may do needs its access key and secret key; give them")
    probe = _table(f"probe_{uuid.uuid4().hex}")
    owners = {place: Bucket(settings, keys[owner(place)]) for place in PLACES}
    with ExitStack() as made:
        for place, its_owner in owners.items():
            made.callback(_remove, its_owner, place, probe)
            _lake(settings, its_owner, place).merge(probe, _row("owner"), run=probe.name)
        return [
            observed
            for identity in READS
            for place, its_owner in owners.items()
            for observed in _tried(settings, Bucket(settings, keys[identity]), identity, its_owner, place, probe)
        ]


def _tried(
    settings: Settings, bucket: Bucket, identity: str, its_owner: Bucket, place: str, probe: Table
) -> Iterator[Observed]:
    for (action, resource), attempt in _tries(settings, bucket, identity, its_owner, place, probe):
        try:
            attempt()
            allowed = True
        except AccessRefused:
            allowed = False
        declared = _is_declared(identity, place, (action, resource))
        yield Observed(identity, place, resource, action, declared, allowed)


def _tries(
    settings: Settings, bucket: Bucket, identity: str, its_owner: Bucket, place: str, probe: Table
) -> Iterator[tuple[tuple[str, str], Callable[[], object]]]:
    """Action and resource, and how it is tried."""
    lake = _lake(settings, bucket, place)
    folder = _folder(bucket, place, probe)
    first = {"Key": f"{folder}/_delta_log/00000000000000000000.json"}
    content = its_owner.ask("read a commit", "get_object", **first)["Body"].read()
    waste = {"Key": f"{folder}/{uuid.uuid4().hex}"}
    its_owner.ask("write an object", "put_object", **waste, Body=b"probe")

    def upload() -> None:
        begun = bucket.ask("upload in parts", "create_multipart_upload", **waste)
        bucket.ask("end an upload", "abort_multipart_upload", **waste, UploadId=begun["UploadId"])

    yield ("list", "objects"), lambda: bucket.ask("list objects", "list_objects_v2", Prefix=f"{folder}/")
    yield ("read", "table"), lambda: lake.read(probe)
    yield ("append to", "table"), lambda: lake.merge(probe, _row(identity), run=probe.name)
    # Below the probe, so that it is removed with it.
    yield ("create", "table"), lambda: lake.merge(_table(f"{probe.name}/{identity}"), _row(identity), run=probe.name)
    yield ("overwrite", "commit"), lambda: bucket.ask("write a commit", "put_object", **first, Body=content)
    yield ("upload", "parts of an object"), upload
    yield ("delete", "object"), lambda: bucket.ask("delete an object", "delete_object", **waste)
    if identity == place:
        yield ("change", "policy"), lambda: _change_policy(bucket)


def _change_policy(bucket: Bucket) -> None:
    """A policy that no store accepts: whoever may not change it is refused before anybody reads it."""
    try:
        bucket.ask("change its policy", "put_bucket_policy", Policy="{}")
    except AccessRefused:
        raise
    except LakehouseError as error:
        if "MalformedPolicy" not in str(error):
            raise


def _lake(settings: Settings, bucket: Bucket, place: str) -> Lake:
    return Lake(settings.lake, place, PLATFORM, store=bucket.store)


def _table(name: str) -> Table:
    return Table("access", name, (text("key"), text("content_hash")), key=("key",))


def _row(identity: str) -> pa.Table:
    return pa.table({"key": [identity], "content_hash": [uuid.uuid4().hex]})


def _folder(bucket: Bucket, place: str, probe: Table) -> str:
    return f"{bucket.within(place)}/{PLATFORM}/{probe.path}"


def _remove(its_owner: Bucket, place: str, probe: Table) -> None:
    folder = _folder(its_owner, place, probe)
    while found := its_owner.ask("list objects", "list_objects_v2", Prefix=f"{folder}/").get("Contents"):
        for one in found:
            its_owner.ask("delete an object", "delete_object", Key=one["Key"])
