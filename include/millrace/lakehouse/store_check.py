"""Whether an object store can hold a lake: is it there, may this identity write, and are its conditional writes kept.

A store that takes `If-None-Match` and ignores it would lose one of two commits made at once, without a word.
"""

from botocore.exceptions import BotoCoreError, ClientError

from millrace.errors import AccessRefused, LakehouseError
from millrace.lakehouse.storage import ObjectStore, bucket_and_prefix


def check_store(store: ObjectStore, folder: str) -> None:
    """Write one small object to `folder` (`s3://…`), and try to write it again as if it weren't there.

    Raises:
        LakehouseError: the store can't hold a lake.
        AccessRefused: this identity may not write there.
    """
    bucket, prefix = bucket_and_prefix(folder)
    client = store.client(seconds=10, tries=2)
    at = f"the object store at {store.endpoint or 'AWS'}"
    for _ in range(2):
        try:
            client.put_object(Bucket=bucket, Key=f"{prefix}/conditional", Body=b"", IfNoneMatch="*")
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if code == "PreconditionFailed":
                return
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
    raise LakehouseError(f"{at} ignores conditional writes, so it would lose commits; use one that keeps them")
