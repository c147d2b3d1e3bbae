"""A lake in a real S3 server: what a folder promises holds there too, and who may not is told so. What both engines
promise is tested there by test_engines.py."""

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.pool import Pool
from threading import Thread

import pytest
from pydantic import SecretStr, ValidationError

from millrace.environments.audit import search, verify
from millrace.errors import AccessRefused, LakehouseError
from millrace.lakehouse.audit.chain import record
from millrace.lakehouse.commits import open_table
from millrace.lakehouse.cursors import move_cursor, read_cursor
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.storage import REGION, Key, ObjectStore, bucket_and_prefix, store_of
from millrace.lakehouse.store_check import check_store
from millrace.lakehouse.tables import OPS_DECISIONS, Table
from millrace.lakehouse.upkeep import keep_up
from millrace.settings import Settings
from millrace.stack.versitygw import Versitygw
from tests.lakehouse.things import (
    OTHER_THINGS,
    THINGS,
    append_decision,
    count_things,
    doubled,
    happened,
    hashes,
    merge_often,
    things,
)

pytestmark = pytest.mark.long


@pytest.fixture
def lake(in_object_store: Settings) -> Lake:
    return Lake.of(in_object_store, "qa")


def keys(lake: Lake, table: Table, store: ObjectStore) -> set[str]:
    bucket, prefix = bucket_and_prefix(lake.uri(table))
    found = store.client().list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")
    return {one["Key"].removeprefix(f"{prefix}/") for one in found.get("Contents", [])}


def soon() -> float:
    return time.time() + 1


@pytest.mark.timeout(100)
def test_four_writers_on_overlapping_keys_lose_nothing(lake: Lake, in_object_store: Settings, processes: Pool) -> None:
    start, store = soon(), store_of(in_object_store)
    done = processes.starmap(merge_often, [(lake.root, writer, 5, start, "", store) for writer in range(4)])
    found = hashes(lake.read(THINGS))
    assert found.keys() - {"shared"} == {key for one in done for key in one}
    assert len(found) == 21
    assert found["shared"] in {one[-1] for one in done}
    # Arrow's client for S3 works in a process that was forked from one that has it loaded.
    assert processes.starmap(count_things, [(lake.root, store)] * 4) == [21] * 4
    # Every merge is a commit of its own: what was lost to another writer was done again.
    assert lake.version(THINGS) == 20 + 1


def test_of_concurrent_appends_with_the_same_expected_number_exactly_one_wins(lake: Lake, processes: Pool) -> None:
    uri = lake.uri(OPS_DECISIONS)
    for expected in (None, 0, 1):
        start = soon()
        won = processes.starmap(append_decision, [(uri, expected, writer, start) for writer in range(4)])
        assert won.count(True) == 1, (expected, won)
    assert sorted(lake.read(OPS_DECISIONS)["sequence"].to_pylist()) == [0, 1, 2]


def test_cursors_and_the_audit_trail_are_kept_there(lake: Lake, in_object_store: Settings) -> None:
    for version in (3, 7, 5):
        move_cursor(lake, "reader", THINGS, version, run="r")
    assert read_cursor(lake, "reader", THINGS) == 7
    assert record(in_object_store, [happened("a"), happened("b")], run="r") == 2
    assert record(in_object_store, [happened("b"), happened("c")], run="r") == 1
    assert verify(in_object_store).entries == 3
    assert [entry["event_id"] for entry in search(in_object_store)] == ["a", "b", "c"]


def test_upkeep_removes_what_only_old_versions_need_and_no_more(lake: Lake, in_object_store: Settings) -> None:
    store = store_of(in_object_store)
    assert store is not None
    for number in range(6):
        lake.merge(THINGS, things({"a": str(number), f"b{number}": "1"}), run="r")
    lake.merge(THINGS, things({"c": "1"}), run="r")
    before, many = hashes(lake.read(THINGS)), keys(lake, THINGS, store)
    kept = keep_up(lake, THINGS)
    assert kept.files < kept.files_before
    assert kept.removed == 0, "nothing is older than its retention"
    removed = lake.engine(THINGS).tidy(lake.uri(THINGS), THINGS, timedelta())
    assert any(key.startswith("_change_data/") for key in many)
    assert not any(key.startswith("_change_data/") for key in keys(lake, THINGS, store))
    assert removed == len({key for key in many if key.endswith(".parquet")} - keys(lake, THINGS, store)) > 5
    assert hashes(lake.read(THINGS)) == before
    version = lake.version(THINGS)
    assert lake.engine(THINGS).tidy(lake.uri(THINGS), THINGS, timedelta()) == 0
    assert lake.version(THINGS) == version, "what went long ago is not committed again"


def test_who_may_do_nothing_is_told_who_and_what(
    lake: Lake, in_object_store: Settings, object_store: Versitygw
) -> None:
    lake.merge(THINGS, things({"a": "1"}), run="r")
    object_store.create_user(Key("eve", "a secret"))
    credential = {"lake_access_key": SecretStr("eve"), "lake_secret_key": SecretStr("a secret")}
    theirs = Lake.of(in_object_store.model_copy(update=credential), "qa")
    tries: list[Callable[[], object]] = [
        lambda: theirs.read(THINGS),
        lambda: theirs.version(THINGS),
        lambda: open_table(theirs.uri(THINGS), THINGS),
        lambda: theirs.changes(THINGS, None),
        lambda: theirs.merge(THINGS, things({"a": "2"}), run="r"),
        lambda: theirs.transform(THINGS, doubled, OTHER_THINGS, run="r"),
        lambda: keep_up(theirs, THINGS),
    ]
    for attempt in tries:
        with pytest.raises(AccessRefused, match=r"^\w+/\w+: the object store does not let eve (read|write|tidy) s3://"):
            attempt()
    assert hashes(lake.read(THINGS)) == {"a": "1"}
    wrong = in_object_store.model_copy(update=credential | {"lake_secret_key": SecretStr("no secret of hers")})
    with pytest.raises(LakehouseError, match=r"does not know eve by this secret key .*; correct MILLRACE_LAKE_ACCESS"):
        Lake.of(wrong, "qa").read(THINGS)


def test_a_store_that_is_away_is_one_sentence(in_object_store: Settings) -> None:
    away = in_object_store.model_copy(update={"lake_endpoint": "http://127.0.0.1:9"})
    with pytest.raises(LakehouseError, match="silver/things: ") as raised:
        Lake.of(away, "qa").read(THINGS)
    assert "\n" not in str(raised.value)


def test_a_store_is_tried_before_anything_starts(in_object_store: Settings, object_store: Versitygw) -> None:
    store = store_of(in_object_store)
    assert store is not None
    folder = f"{in_object_store.lake}/dev/_platform/leases"
    for _ in range(2):
        check_store(store, folder)
    object_store.create_user(Key("eve", "a secret"))
    for secret, said in (("a secret", "AccessDenied"), ("another", "SignatureDoesNotMatch")):
        hers = replace(store, key=Key("eve", secret))
        with pytest.raises(
            AccessRefused, match=rf"does not let eve write s3://.* \({said}\); correct MILLRACE_LAKE_ACC"
        ):
            check_store(hers, folder)
    with pytest.raises(LakehouseError, match=r"can't hold the lake in s3://no-such-bucket/lake: .*NoSuchBucket"):
        check_store(store, "s3://no-such-bucket/lake")
    with pytest.raises(LakehouseError, match="does not answer"):
        check_store(replace(store, endpoint="http://127.0.0.1:9"), folder)


@pytest.mark.parametrize(
    ("ignored", "said"),
    [
        (("If-None-Match", "If-Match"), "ignores conditional writes, so it would lose commits"),
        (("If-Match",), "ignores If-Match, so two Spark servers could hold one lease"),
    ],
)
def test_a_store_that_ignores_conditions_is_refused(ignored: tuple[str, ...], said: str) -> None:
    """No such store is at hand; this answers as one would."""

    class Ignorant(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            kept = {"If-None-Match", "If-Match"} - set(ignored)
            refused = any(self.headers[name] for name in kept)
            body = b"<Error><Code>PreconditionFailed</Code></Error>" if refused else b""
            self.send_response(412 if refused else 200)
            self.send_header("ETag", '"x"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Ignorant) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        store = ObjectStore(f"http://127.0.0.1:{server.server_port}", REGION, Key("a", "b"))
        with pytest.raises(LakehouseError, match=said):
            check_store(store, "s3://lakehouse/x")
        server.shutdown()


def test_half_a_credential_and_an_endpoint_without_a_lake_are_refused() -> None:
    for given, said in (
        ({"lake_uri": "s3://lake", "lake_access_key": "a"}, "are one credential"),
        ({"lake_endpoint": "http://127.0.0.1:9000"}, "needs MILLRACE_LAKE_URI"),
        ({"lake_uri": "/srv/lake"}, "String should match pattern"),
        ({"lake_uri": "s3://lake/100%"}, "String should match pattern"),
    ):
        with pytest.raises(ValidationError, match=said):
            Settings(**given)


@pytest.mark.spark
def test_spark_commits_what_delta_rs_reads_and_only_while_it_may(
    lake: Lake, in_object_store: Settings, spark_on_store: str, object_store: Versitygw
) -> None:
    tables = frozenset({THINGS.path})
    committed = Lake.of(
        in_object_store.model_copy(update={"spark_remote": spark_on_store, "spark_tables": tables}), "qa"
    )
    for number in range(3):
        committed.merge(THINGS, things({"a": str(number), f"b{number}": "1"}), run="r")
    assert hashes(lake.read(THINGS)) == {"a": "2", "b0": "1", "b1": "1", "b2": "1"}
    assert hashes(lake.changes(THINGS, 2))["a"] == "2"
    kept = keep_up(committed, THINGS)
    assert kept.files == 1
    assert hashes(lake.read(THINGS)) == {"a": "2", "b0": "1", "b1": "1", "b2": "1"}
