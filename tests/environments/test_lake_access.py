"""Who may do what in a lake on an object store, by what a real server lets them do."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from botocore.exceptions import ClientError
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import DeltaError

from millrace.environments.access.lake_check import check
from millrace.environments.access.lake_wall import Bucket, apply, declared, plan
from millrace.environments.access.matrix import PLACES, READS, right
from millrace.errors import AccessRefused, LakehouseError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.places import SAMPLE
from millrace.lakehouse.spark_session import Refused, on_server
from millrace.lakehouse.storage import REGION, Key, ObjectStore, delta_options
from millrace.settings import Settings
from millrace.stack.versitygw import Versitygw
from tests.conftest import free_port
from tests.environments.conftest import LAKE_KEYS, LAKE_PRINCIPALS, As
from tests.lakehouse.conftest import kept_spark
from tests.lakehouse.things import THINGS, hashes, things

pytestmark = pytest.mark.long
APPLICATION = "walls"


@pytest.fixture
def administrator(object_store: Versitygw) -> Key:
    return object_store.root


@pytest.fixture
def root(object_store: Versitygw) -> Any:
    return ObjectStore(object_store.url, REGION, object_store.root).client()


def objects(client: Any, prefix: str) -> dict[str, str]:
    """Key → hash of the bytes."""
    found = client.list_objects_v2(Bucket="walled", Prefix=prefix).get("Contents", [])
    read = {one["Key"]: client.get_object(Bucket="walled", Key=one["Key"])["Body"].read() for one in found}
    return {key: hashlib.sha256(content).hexdigest() for key, content in read.items()}


def test_what_is_declared_is_done_once(walled_lake: Settings, administrator: Key) -> None:
    assert plan(walled_lake, administrator, LAKE_PRINCIPALS) == []
    assert apply(walled_lake, administrator, LAKE_PRINCIPALS) == []


def test_a_new_bucket_is_made_and_walled(walled_lake: Settings, administrator: Key, object_store: Versitygw) -> None:
    fresh = walled_lake.model_copy(update={"lake_uri": "s3://fresh"})
    changes = apply(fresh, administrator, LAKE_PRINCIPALS)
    assert str(changes[0]) == "create bucket fresh"
    assert len(changes) == 1 + len(list(declared(Bucket(fresh, administrator), LAKE_PRINCIPALS)))
    assert plan(fresh, administrator, LAKE_PRINCIPALS) == []
    # A lake whose root is the whole bucket has the same walls.
    assert [str(one) for one in check(fresh, LAKE_KEYS) if one.allowed != one.declared] == []


def test_the_server_lets_each_identity_do_what_is_declared_and_refuses_everything_else(
    walled_lake: Settings, root: Any
) -> None:
    before = objects(root, "lake/")
    observed = check(walled_lake, LAKE_KEYS)
    assert [str(one) for one in observed if one.allowed != one.declared] == []
    tried = Counter((one.identity, one.environment) for one in observed)
    assert tried == {(one, place): 8 if one == place else 7 for one in READS for place in PLACES}
    refused = Counter((one.identity, one.environment) for one in observed if not one.allowed)
    writes = {"reads": 5, None: 7}
    elsewhere = {(one, place): right(one, place) for one in READS for place in PLACES}
    assert refused == dict.fromkeys(zip(READS, READS, strict=True), 1) | {
        pair: writes[given] for pair, given in elsewhere.items() if given != "manages"
    }
    assert refused.total() == 3 + 3 * 5 + 3 * 7 + 5 + 7
    of_staging = {(one.environment, one.action): one.allowed for one in observed if one.identity == "staging"}
    assert not of_staging["prod", "read"]
    assert not of_staging["prod", "list"]
    assert of_staging["sample", "read"]
    assert not of_staging["sample", "append to"]
    assert "lake-" not in str(observed[0])
    assert objects(root, "lake/") == before, "the probes are gone"


def test_dev_reads_prod_and_is_told_that_it_can_write_nothing_there(lake_as: As) -> None:
    prod = Lake.of(lake_as("prod"), APPLICATION)
    prod.merge(THINGS, things({"a": "1"}), run="r")
    seen = Lake.of(lake_as("dev", "prod"), APPLICATION)
    assert hashes(seen.read(THINGS)) == {"a": "1"}
    assert hashes(seen.changes(THINGS, None)) == {"a": "1"}
    where = f"s3://walled/lake/prod/{APPLICATION}/silver/things"
    with pytest.raises(AccessRefused, match=f"silver/things: the object store does not let lake-dev write {where}; "):
        seen.merge(THINGS, things({"a": "2"}), run="r")
    with pytest.raises(AccessRefused, match="does not let lake-prod read s3://walled/lake/dev/"):
        Lake.of(lake_as("prod", "dev"), APPLICATION).read(THINGS)
    assert hashes(prod.read(THINGS)) == {"a": "1"}


def test_with_a_stolen_credential_of_dev_nothing_of_prod_changes_by_a_byte(lake_as: As, root: Any) -> None:
    """Whoever has dev's key, and knows S3 and Delta, tries what they can think of."""
    Lake.of(lake_as("prod"), APPLICATION).merge(THINGS, things({"a": "1", "b": "1"}), run="r")
    Lake.of(lake_as("staging"), APPLICATION).merge(THINGS, things({"a": "1"}), run="r")
    Lake.of(lake_as("prod"), APPLICATION, environment=SAMPLE).merge(THINGS, things({"a": "1"}), run="r")
    before = of_others(root)
    policy = root.get_bucket_policy(Bucket="walled")["Policy"]
    stolen = lake_as("dev")
    store = ObjectStore(stolen.lake_endpoint, REGION, LAKE_KEYS["dev"])
    client: Any = store.client()
    client.put_object(Bucket="walled", Key="lake/dev/forged", Body=b"forged")
    forged = {"Bucket": "walled", "Key": "lake/dev/forged"}
    table = f"lake/prod/{APPLICATION}/silver/things"
    some = next(key for key in before if key.startswith(table) and key.endswith(".parquet"))
    commit = f"{table}/_delta_log/00000000000000000000.json"
    following = f"{table}/_delta_log/00000000000000000009.json"
    of_prod = {"Bucket": "walled", "Key": some}
    part = {"Bucket": "walled", "Key": "lake/dev/in-parts"}
    begun = client.create_multipart_upload(**part)["UploadId"]

    by_s3: dict[str, Callable[[], object]] = {
        "overwrite data": lambda: client.put_object(**of_prod, Body=b"forged"),
        "overwrite a commit": lambda: client.put_object(Bucket="walled", Key=commit, Body=b"{}"),
        "add a commit": lambda: client.put_object(Bucket="walled", Key=following, Body=b"{}", IfNoneMatch="*"),
        "an object beside the tables": lambda: client.put_object(Bucket="walled", Key="lake/prod/x", Body=b""),
        "an object beside the environments": lambda: client.put_object(Bucket="walled", Key="lake/x", Body=b""),
        "an object beside the lake": lambda: client.put_object(Bucket="walled", Key="x", Body=b""),
        "an object in staging": lambda: client.put_object(Bucket="walled", Key="lake/staging/x", Body=b""),
        "an object in the sample": lambda: client.put_object(Bucket="walled", Key="lake/sample/x", Body=b""),
        "list the sample": lambda: client.list_objects_v2(Bucket="walled", Prefix="lake/sample/"),
        "an empty folder": lambda: client.put_object(Bucket="walled", Key="lake/prod/folder/", Body=b""),
        "delete": lambda: client.delete_object(**of_prod),
        "delete a version": lambda: client.delete_object(**of_prod, VersionId="null"),
        "copy over it": lambda: client.copy_object(**of_prod, CopySource=forged),
        "copy staging's": lambda: client.copy_object(
            **forged, CopySource={"Bucket": "walled", "Key": some.replace("/prod/", "/staging/")}
        ),
        "begin an upload in parts": lambda: client.create_multipart_upload(**of_prod),
        "a part of another upload": lambda: client.upload_part(**of_prod, UploadId=begun, PartNumber=1, Body=b"x"),
        "complete another upload": lambda: client.complete_multipart_upload(**of_prod, UploadId=begun),
        "tag": lambda: client.put_object_tagging(**of_prod, Tagging={"TagSet": [{"Key": "a", "Value": "b"}]}),
        "hand out": lambda: client.put_object_acl(**of_prod, ACL="public-read"),
        "list staging": lambda: client.list_objects_v2(Bucket="walled", Prefix="lake/staging/"),
        "list everything": lambda: client.list_objects_v2(Bucket="walled"),
        "list all environments": lambda: client.list_objects_v2(Bucket="walled", Prefix="lake/"),
        "list versions": lambda: client.list_object_versions(Bucket="walled"),
        "list uploads": lambda: client.list_multipart_uploads(Bucket="walled"),
        "read staging": lambda: client.get_object(Bucket="walled", Key=some.replace("/prod/", "/staging/")),
        "read the policy": lambda: client.get_bucket_policy(Bucket="walled"),
        "change the policy": lambda: client.put_bucket_policy(Bucket="walled", Policy=policy.replace("dev", "prod")),
        "delete the policy": lambda: client.delete_bucket_policy(Bucket="walled"),
        "hand out the bucket": lambda: client.put_bucket_acl(Bucket="walled", ACL="public-read-write"),
        "own the bucket": lambda: client.put_bucket_ownership_controls(
            Bucket="walled", OwnershipControls={"Rules": [{"ObjectOwnership": "BucketOwnerPreferred"}]}
        ),
        "delete the bucket": lambda: client.delete_bucket(Bucket="walled"),
        "let things expire": lambda: client.put_bucket_lifecycle_configuration(
            Bucket="walled",
            LifecycleConfiguration={
                "Rules": [{"ID": "x", "Status": "Enabled", "Filter": {}, "Expiration": {"Days": 1}}]
            },
        ),
        "keep versions": lambda: client.put_bucket_versioning(
            Bucket="walled", VersioningConfiguration={"Status": "Suspended"}
        ),
        "another bucket": lambda: client.create_bucket(Bucket="devs-own"),
        # One path for who checks, another for who writes.
        **{
            f"a way around: {key}": lambda key=key: client.put_object(Bucket="walled", Key=key, Body=b"forged")
            for key in (
                f"lake/dev/../prod/{APPLICATION}/x",
                f"lake/dev/%2e%2e/prod/{APPLICATION}/x",
                f"lake/dev/..%2fprod/{APPLICATION}/x",
                f"lake/dev//../prod/{APPLICATION}/x",
                f"lake/dev/./../prod/{APPLICATION}/x",
                f"lake//prod/{APPLICATION}/x",
                f"/lake/prod/{APPLICATION}/x",
            )
        },
    }
    refusals = {name: refusal_of(attempt) for name, attempt in by_s3.items()}
    ways = {name: said for name, said in refusals.items() if name.startswith("a way around")}
    # The server's word: not allowed. Where it has no such thing to begin with, it may say so instead.
    told = {"AccessDenied", "NotImplemented", "MethodNotAllowed", "XAdminMethodNotSupported"}
    assert {name: said for name, said in refusals.items() if name not in ways and said not in told} == {}
    batch = client.delete_objects(Bucket="walled", Delete={"Objects": [{"Key": some}, {"Key": commit}]})
    assert [one["Code"] for one in batch["Errors"]] == ["AccessDenied"] * 2
    assert not batch.get("Deleted")

    uri = Lake.of(lake_as("dev", "prod"), APPLICATION).uri(THINGS)
    opened = DeltaTable(uri, storage_options=delta_options(uri))
    rows = opened.to_pyarrow_table()
    by_delta: dict[str, Callable[[], object]] = {
        "append": lambda: write_deltalake(opened, rows, mode="append"),
        "overwrite": lambda: write_deltalake(opened, rows, mode="overwrite"),
        "delete": lambda: opened.delete(),
        "update": lambda: opened.update({"size": "7"}),
        "restore": lambda: opened.restore(0),
        "compact": lambda: opened.optimize.compact(),
        "vacuum": lambda: opened.vacuum(0, dry_run=False, enforce_retention_duration=False, full=True),
        "checkpoint": lambda: opened.create_checkpoint(),
        "properties": lambda: opened.alter.set_table_properties({"delta.appendOnly": "true"}),
    }
    said = {name: refused_in_delta(attempt) for name, attempt in by_delta.items()}
    assert {name: why for name, why in said.items() if "lacked the necessary privileges" not in why} == {}

    # Whatever was said: nothing of it happened.
    assert of_others(root) == before
    assert root.get_bucket_policy(Bucket="walled")["Policy"] == policy
    everything = {one["Key"] for one in root.list_objects_v2(Bucket="walled")["Contents"]}
    assert not [key for key in everything if not key.startswith(tuple(f"lake/{place}/" for place in PLACES))]


def of_others(root: Any) -> dict[str, str]:
    """What dev may not change."""
    return {key: told for place in PLACES if place != "dev" for key, told in objects(root, f"lake/{place}/").items()}


def test_with_a_stolen_credential_of_staging_nobodys_words_of_prod_are_read(lake_as: As) -> None:
    """Of prod it opens what prod publishes, by whatever way it asks, and changes nothing there."""
    prod = lake_as("prod")
    Lake.of(prod, APPLICATION).merge(THINGS, things({"a": "raw"}), run="r")
    Lake.of(prod, APPLICATION, environment=SAMPLE).merge(THINGS, things({"a": "scrubbed"}), run="r")
    staging = lake_as("staging")
    assert hashes(Lake.of(staging, APPLICATION, environment=SAMPLE).read(THINGS)) == {"a": "scrubbed"}
    where = f"s3://walled/lake/prod/{APPLICATION}/silver/things"
    with pytest.raises(AccessRefused, match=f"does not let lake-staging read {where}"):
        Lake.of(staging, APPLICATION, environment="prod").read(THINGS)
    with pytest.raises(AccessRefused, match="does not let lake-staging write s3://walled/lake/sample/"):
        Lake.of(lake_as("staging", "prod"), APPLICATION, environment=SAMPLE).merge(THINGS, things({"a": "2"}), run="r")
    store = ObjectStore(staging.lake_endpoint, REGION, LAKE_KEYS["staging"])
    client: Any = store.client()
    commit = f"{APPLICATION}/silver/things/_delta_log/00000000000000000000.json"
    shown, raw = f"lake/sample/{commit}", f"lake/prod/{commit}"
    assert client.get_object(Bucket="walled", Key=shown)["Body"].read()
    own = {"Bucket": "walled", "Key": "lake/staging/stolen"}
    ways: dict[str, Callable[[], object]] = {
        "get": lambda: client.get_object(Bucket="walled", Key=raw),
        "get a part": lambda: client.get_object(Bucket="walled", Key=raw, Range="bytes=0-9"),
        "head": lambda: client.head_object(Bucket="walled", Key=raw),
        "attributes": lambda: client.get_object_attributes(
            Bucket="walled", Key=raw, ObjectAttributes=["ObjectSize", "ETag"]
        ),
        "copy": lambda: client.copy_object(**own, CopySource={"Bucket": "walled", "Key": raw}),
        "list": lambda: client.list_objects_v2(Bucket="walled", Prefix="lake/prod/"),
        "list what begins so": lambda: client.list_objects_v2(Bucket="walled", Prefix="lake/prod"),
        "list with the sample": lambda: client.list_objects_v2(Bucket="walled", Prefix="lake/"),
        "by way of the sample": lambda: client.get_object(Bucket="walled", Key=f"lake/sample/../prod/{commit}"),
        "by way of its own": lambda: client.get_object(Bucket="walled", Key=f"lake/staging/../prod/{commit}"),
        "delete of the sample": lambda: client.delete_object(Bucket="walled", Key=shown),
        "write to the sample": lambda: client.put_object(Bucket="walled", Key="lake/sample/x", Body=b""),
    }
    assert [way for way, attempt in ways.items() if not refusal_of(attempt)] == []


def refusal_of(attempt: Callable[[], object]) -> str:
    """The code with which the server refused; empty: it did not."""
    try:
        attempt()
    except ClientError as error:
        return str(error.response["Error"]["Code"])
    return ""


def refused_in_delta(attempt: Callable[[], object]) -> str:
    """What delta-rs said; empty: nothing was refused."""
    try:
        attempt()
    except (DeltaError, OSError) as error:
        return str(error)
    return ""


@pytest.mark.spark
def test_spark_with_devs_credential_reads_prod_and_writes_dev_only(lake_as: As) -> None:
    """All that a Spark Connect server does happens with the credential that it was started with."""
    spark_tables = frozenset({THINGS.path})
    dev = lake_as("dev").model_copy(update={"spark_port": int(free_port()), "spark_tables": spark_tables})
    dev.home.mkdir(parents=True)
    Lake.of(lake_as("prod"), "by_spark").merge(THINGS, things({"a": "1"}), run="r")
    with kept_spark(dev):
        ours = Lake.of(dev, "by_spark")
        ours.merge(THINGS, things({"b": "1"}), run="r")
        ours.merge(THINGS, things({"b": "2"}), run="r")
        assert hashes(ours.read(THINGS)) == {"b": "2"}
        # Whoever asks: prod's own process, through dev's server.
        prod = lake_as("prod").model_copy(update={"spark_port": dev.spark_port, "spark_tables": spark_tables})
        theirs = Lake.of(prod, "by_spark")
        version = theirs.version(THINGS)
        with pytest.raises(
            AccessRefused, match=r"not let the Spark Connect server at sc://\S+ write s3://walled/lake/prod/"
        ):
            theirs.merge(THINGS, things({"a": "2"}), run="r")
        assert theirs.version(THINGS) == version
        read = on_server(dev.spark_url, lambda session: session.read.format("delta").load(theirs.uri(THINGS)).toArrow())
        assert hashes(read) == {"a": "1"}
        staging = Lake.of(lake_as("staging"), "by_spark")
        staging.merge(THINGS, things({"a": "1"}), run="r")
        with pytest.raises(Refused, match="AccessDenied"):
            on_server(dev.spark_url, lambda session: session.read.format("delta").load(staging.uri(THINGS)).toArrow())


def test_what_was_given_by_hand_is_found_and_taken_away(
    walled_lake: Settings, administrator: Key, root: Any, lake_as: As
) -> None:
    policy = json.loads(root.get_bucket_policy(Bucket="walled")["Policy"])
    given = {"Effect": "Allow", "Principal": {"AWS": "lake-dev"}, "Action": "s3:*", "Resource": "arn:aws:s3:::walled/*"}
    root.put_bucket_policy(
        Bucket="walled", Policy=json.dumps(policy | {"Statement": [*policy["Statement"][1:], given]})
    )
    Lake.of(lake_as("dev", "prod"), "given").merge(THINGS, things({"a": "1"}), run="r")
    wrong = [str(one) for one in check(walled_lake, LAKE_KEYS) if one.allowed != one.declared]
    assert "dev: append to table in prod: allowed, which is not as declared" in wrong
    found = [str(change) for change in plan(walled_lake, administrator, LAKE_PRINCIPALS)]
    assert found[0] == "take in the policy of bucket walled: allow lake-dev s3:* on arn:aws:s3:::walled/*"
    assert [change.split(": ")[0] for change in found[1:]] == ["add in the policy of bucket walled"]
    assert [str(change) for change in apply(walled_lake, administrator, LAKE_PRINCIPALS)] == found
    assert plan(walled_lake, administrator, LAKE_PRINCIPALS) == []
    with pytest.raises(AccessRefused, match="does not let lake-dev write"):
        Lake.of(lake_as("dev", "prod"), "given").merge(THINGS, things({"a": "2"}), run="r")


def test_only_the_administrator_sees_and_changes_who_may_do_what(walled_lake: Settings) -> None:
    for key in LAKE_KEYS.values():
        with pytest.raises(AccessRefused, match=f"bucket walled .* does not let {key.access_key} read its policy"):
            plan(walled_lake, key, LAKE_PRINCIPALS)


def test_what_is_missing_is_one_sentence(walled_lake: Settings, administrator: Key, settings: Settings) -> None:
    with pytest.raises(LakehouseError, match=r"the lake is the folder .*only checked in code; set MILLRACE_LAKE_URI"):
        plan(settings, administrator, LAKE_PRINCIPALS)
    with pytest.raises(LakehouseError, match="what the object store calls prod, staging"):
        plan(walled_lake, administrator, {"dev": "lake-dev"})
    with pytest.raises(LakehouseError, match="what prod may do needs its access key and secret key"):
        check(walled_lake, {name: key for name, key in LAKE_KEYS.items() if name != "prod"})
    unknown = walled_lake.model_copy(update={"lake_uri": "s3://unknown"})
    with pytest.raises(LakehouseError, match="root can't change its policy"):
        apply(unknown, administrator, LAKE_PRINCIPALS | {"dev": "nobody-of-this-name"})
    away = walled_lake.model_copy(update={"lake_endpoint": "http://127.0.0.1:9"})
    with pytest.raises(LakehouseError, match=r"does not answer \(.*\); start it, or correct MILLRACE_LAKE_ENDPOINT"):
        plan(away, administrator, LAKE_PRINCIPALS)
