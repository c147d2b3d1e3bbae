"""Who may do what in a lake on an object store, kept by the store: one bucket policy, made from the declared matrix.

An environment is the prefix `<lake>/<environment>/`, and a service identity, a user of the store. The identity writes
there and reads what `matrix.py` says of others. Beside them are places that one identity writes for others to read.
Nobody else may do anything, and only the store's administrator changes the policy. The bucket is the lake's alone:
what else its policy says is taken away. On AWS, the identities must have no IAM policy of their own, which would add to
this one.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from botocore.exceptions import BotoCoreError, ClientError

from millrace.environments.access.matrix import PLACES, READS, right
from millrace.errors import AccessRefused, LakehouseError
from millrace.lakehouse.places import owner
from millrace.lakehouse.storage import Key, ObjectStore, bucket_and_prefix
from millrace.settings import Settings

READING = ("s3:GetObject",)
WRITING = (
    "s3:AbortMultipartUpload",
    "s3:DeleteObject",
    "s3:GetObject",
    "s3:ListMultipartUploadParts",
    "s3:PutObject",
)
LISTING = ("s3:ListBucket",)


@dataclass(frozen=True, order=True)
class Statement:
    """One of a bucket policy, in an order of its own: stores give it back in theirs."""

    effect: str
    principals: tuple[str, ...]
    actions: tuple[str, ...]
    resources: tuple[str, ...]
    condition: str = ""
    """JSON; empty: none."""

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> "Statement":
        """From a policy's JSON. What ours never have, `NotAction` or another kind of principal, is kept as it is said,
        so that it is seen and taken away."""
        principal: Any = told.get("Principal")
        by_name = isinstance(principal, dict) and principal.keys() == {"AWS"}
        return cls(
            effect=str(told["Effect"]),
            principals=_sorted(principal["AWS"] if by_name else _canonical(principal)),
            actions=_sorted(told.get("Action") or f"NotAction {told.get('NotAction')}"),
            resources=_sorted(told.get("Resource") or f"NotResource {told.get('NotResource')}"),
            condition=_canonical(told["Condition"]) if told.get("Condition") else "",
        )

    def written(self) -> dict[str, Any]:
        told = {
            "Effect": self.effect,
            "Principal": {"AWS": list(self.principals)},
            "Action": list(self.actions),
            "Resource": list(self.resources),
        }
        return told | ({"Condition": json.loads(self.condition)} if self.condition else {})

    def __str__(self) -> str:
        where = ", ".join(self.resources)
        if self.condition:
            where += f" where {self.condition}"
        return f"{self.effect.lower()} {', '.join(self.principals)} {', '.join(self.actions)} on {where}"


@dataclass(frozen=True)
class Change:
    """One thing to do before the store is as declared."""

    act: Literal["bucket", "add", "take"]
    bucket: str
    statement: Statement | None = None

    def __str__(self) -> str:
        if self.act == "bucket":
            return f"create bucket {self.bucket}"
        return f"{self.act} in the policy of bucket {self.bucket}: {self.statement}"


def plan(settings: Settings, administrator: Key, principals: Mapping[str, str]) -> list[Change]:
    """What is to be done before the store is as declared; nothing: it is.

    Args:
        principals: identity → what the store calls it: an access key for versitygw, an ARN for AWS.

    Raises:
        LakehouseError: the lake is a folder, or the store doesn't answer.
        AccessRefused: `administrator` may not read the policy.
    """
    return list(_changes(Bucket(settings, administrator), principals))


def apply(settings: Settings, administrator: Key, principals: Mapping[str, str]) -> list[Change]:
    """Do it. The policy is replaced whole, in one step. Users are made by the store's own means before.

    Returns: what was done.

    Raises:
        LakehouseError, AccessRefused: as `plan`; or the store doesn't know one of `principals`.
    """
    bucket = Bucket(settings, administrator)
    changes = list(_changes(bucket, principals))
    if any(change.act == "bucket" for change in changes):
        bucket.ask("create it", "create_bucket")
    if changes:
        statements = [one.written() for one in declared(bucket, principals)]
        policy = json.dumps({"Version": "2012-10-17", "Statement": statements})
        bucket.ask("change its policy", "put_bucket_policy", Policy=policy)
    return changes


class Bucket:
    """The lake's bucket, as one identity sees it."""

    def __init__(self, settings: Settings, key: Key) -> None:
        if not settings.lake_uri:
            raise LakehouseError(
                f"the lake is the folder {settings.lake}, whose walls between environments are only checked in code; "
                "set MILLRACE_LAKE_URI to an object store, which enforces them"
            )
        self.store = ObjectStore(settings.lake_endpoint, settings.lake_region, key)
        self.name, self.prefix = bucket_and_prefix(settings.lake_uri)
        self.client: Any = self.store.client()

    def within(self, place: str) -> str:
        """The prefix of an environment's objects, or of a place's beside them, without a slash at its end."""
        return f"{self.prefix}/{place}".lstrip("/")

    def ask(self, doing: str, method: str, **arguments: Any) -> Any:
        """The store's answer.

        Args:
            doing: as the end of "does not let … ".
            method: of boto3's client.

        Raises:
            AccessRefused: the store does not let this identity.
            LakehouseError: it answers something else, or not.
        """
        at = f"bucket {self.name} of the object store at {self.store.endpoint or 'AWS'}"
        try:
            return getattr(self.client, method)(Bucket=self.name, **arguments)
        except ClientError as error:
            if error.response["Error"]["Code"] in ("AccessDenied", "403"):
                raise AccessRefused(
                    f"{at} does not let {self.store.identity} {doing}; use the credential of one who may"
                ) from error
            raise LakehouseError(f"{at}: {self.store.identity} can't {doing}: {error}") from error
        except BotoCoreError as error:
            raise LakehouseError(
                f"{at} does not answer ({error}); start it, or correct MILLRACE_LAKE_ENDPOINT"
            ) from error


def declared(bucket: Bucket, principals: Mapping[str, str]) -> Iterator[Statement]:
    """The bucket's whole policy.

    Raises:
        LakehouseError: nobody said what the store calls an identity.
    """
    if missing := sorted(READS.keys() - principals.keys()):
        raise LakehouseError(f"nobody said what the object store calls {', '.join(missing)}; say it")
    everything = f"arn:aws:s3:::{bucket.name}"
    for place in PLACES:
        within = bucket.within(place)
        manager = principals[owner(place)]
        readers = tuple(sorted(principals[identity] for identity in READS if right(identity, place) == "reads"))
        yield Statement("Allow", (manager,), WRITING, (f"{everything}/{within}/*",))
        if readers:
            yield Statement("Allow", readers, READING, (f"{everything}/{within}/*",))
        listed = _canonical({"StringLike": {"s3:prefix": [within, f"{within}/*"]}})
        yield Statement("Allow", tuple(sorted({manager, *readers})), LISTING, (everything,), listed)


def _changes(bucket: Bucket, principals: Mapping[str, str]) -> Iterator[Change]:
    wanted = set(declared(bucket, principals))
    found = policy(bucket)
    if found is None:
        yield Change("bucket", bucket.name)
    there = set(found or ())
    for statement in sorted(there - wanted):
        yield Change("take", bucket.name, statement)
    for statement in sorted(wanted - there):
        yield Change("add", bucket.name, statement)


def policy(bucket: Bucket) -> list[Statement] | None:
    """What the bucket's policy says; None: there is no bucket."""
    try:
        policy = bucket.ask("read its policy", "get_bucket_policy")["Policy"]
    except LakehouseError as error:
        code = error.__cause__.response["Error"]["Code"] if isinstance(error.__cause__, ClientError) else ""
        if code == "NoSuchBucket":
            return None
        if code == "NoSuchBucketPolicy":
            return []
        raise
    statements = json.loads(policy)["Statement"]
    return [Statement.read(one) for one in (statements if isinstance(statements, list) else [statements])]


def _sorted(told: str | list[str]) -> tuple[str, ...]:
    return (told,) if isinstance(told, str) else tuple(sorted(told))


def _canonical(told: Any) -> str:
    return json.dumps(told, sort_keys=True)
