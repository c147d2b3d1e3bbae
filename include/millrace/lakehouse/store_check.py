"""Whether an object store can hold a lake: is it there, may this identity write, and are its conditional writes kept.

A store that takes `If-None-Match` and ignores it would lose one of two commits made at once, without a word; one that
ignores `If-Match` would let two Spark servers hold one lease.
"""

from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from millrace.errors import AccessRefused, LakehouseError
from millrace.lakehouse.storage import ObjectStore, bucket_and_prefix


def check_store(store: ObjectStore, folder: str) -> None:
    """Write one small object to `folder` (`s3://…`), and try to write it again as if it weren't there, or were another.

    Raises:
        LakehouseError: the store can't hold a lake.
        AccessRefused: this identity may not write there.
    """
    bucket, prefix = bucket_and_prefix(folder)
    client: Any = store.client(seconds=10, tries=2)
    at = f"the object store at {store.endpoint or 'AWS'}"

    def kept(condition: dict[str, str]) -> bool:
        """Whether the store refused to write on it."""
        try:
            client.put_object(Bucket=bucket, Key=f"{prefix}/conditional", Body=b"", **condition)
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if code in ("PreconditionFailed", "ConditionalRequestConflict"):
                return True
            if code in ("AccessDenied", "SignatureDoesNotMatch", "InvalidAccessKeyId"):
                raise AccessRefused(
                    f"{at} does not let {store.identity} write {folder} ({code}); correct MILLRACE_LAKE_ACCESS_KEY and "
                    "MILLRACE_LAKE_SECRET_KEY, or put up the walls (docs/lake.md)"
                ) from error
            raise LakehouseError(f"{at} can't hold the lake in {folder}: {error}; correct MILLRACE_LAKE_URI") from error
        except BotoCoreError as error:
            raise LakehouseError(
                f"{at} does not answer ({error}); start it, or correct MILLRACE_LAKE_ENDPOINT"
            ) from error
        return False

    if not kept({"IfNoneMatch": "*"}) and not kept({"IfNoneMatch": "*"}):
        raise LakehouseError(f"{at} ignores conditional writes, so it would lose commits; use one that keeps them")
    if not kept({"IfMatch": '"0"'}):
        raise LakehouseError(f"{at} ignores If-Match, so two Spark servers could hold one lease; use one that keeps it")
