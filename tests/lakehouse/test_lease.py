"""One holder at a time, on a real S3 server, and one Spark Connect server a lake and environment."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from uuid import uuid4

import pytest

from millrace.errors import AccessRefused, LakehouseError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.lease import Lease
from millrace.lakehouse.storage import REGION, Key, ObjectStore, bucket_and_prefix
from millrace.settings import Settings
from millrace.stack.environment import settings_variables
from millrace.stack.versitygw import Versitygw
from tests.conftest import free_port
from tests.lakehouse.conftest import KEEPER, kept_spark
from tests.lakehouse.things import THINGS, hashes, things

pytestmark = pytest.mark.long
TERM = 6.0


@pytest.fixture
def store(object_store: Versitygw, lake_in_store: Settings) -> ObjectStore:
    return ObjectStore(object_store.url, REGION, object_store.root)


@pytest.fixture
def uri() -> str:
    return f"s3://lakehouse/leases/{uuid4().hex}"


@pytest.fixture
def first(store: ObjectStore, uri: str) -> Lease:
    lease = Lease(store, uri, "the tests", "the first", TERM)
    lease.acquire()
    return lease


def other(first: Lease, name: str = "the second") -> Lease:
    return Lease(first.store, first.uri, first.what, name, first.term)


@pytest.fixture
def renewed(first: Lease) -> Iterator[Lease]:
    """The first lease, whose holder lives."""
    over = threading.Event()

    def renew() -> None:
        while not over.wait(TERM / 6):
            first.renew()

    thread = threading.Thread(target=renew)
    thread.start()
    yield first
    over.set()
    thread.join()


def test_while_its_holder_lives_nobody_else_gets_it(renewed: Lease) -> None:
    began = time.monotonic()
    with pytest.raises(LakehouseError, match=r"^the first has the lease of the tests \(s3://.*end that one first"):
        other(renewed).acquire()
    assert time.monotonic() - began < TERM, "a holder that renews is known before the term is over"
    renewed.renew()


def test_of_a_holder_that_fell_silent_it_is_taken_after_the_term_and_not_before(first: Lease) -> None:
    began = time.monotonic()
    (second := other(first)).acquire()
    assert time.monotonic() - began > TERM
    with pytest.raises(LakehouseError, match="is lost: the second has it"):
        first.renew()
    second.renew()


def test_what_is_given_back_is_taken_at_once(first: Lease) -> None:
    first.give_back()
    began = time.monotonic()
    other(first).acquire()
    assert time.monotonic() - began < TERM / 2


def test_of_many_that_wait_for_it_one_gets_it(first: Lease) -> None:
    said: list[str] = []

    def ask(number: int) -> None:
        try:
            other(first, f"number {number}").acquire()
            said.append("taken")
        except LakehouseError as error:
            said.append(str(error))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said.count("taken") == 1, said
    assert all("has the lease" in one for one in said if one != "taken")


def test_who_can_not_renew_in_time_has_lost_it_before_anybody_may_take_it(first: Lease) -> None:
    away = ObjectStore("http://127.0.0.1:9", REGION, first.store.key)
    first._client = away.client(seconds=0.2, tries=1)

    def renew_on() -> None:
        while True:
            first.renew()
            time.sleep(TERM / 20)

    began = first._written
    with pytest.raises(LakehouseError, match=r"is lost: the object store did not answer in time"):
        renew_on()
    assert TERM / 2 < time.monotonic() - began < TERM * 5 / 6


def test_an_answer_that_got_lost_loses_no_lease(first: Lease) -> None:
    before, count = first._etag, first._count
    first.renew()
    first._etag, first._count = before, count  # as if the renewal's answer had not arrived
    first.renew()
    kept = first._etag
    assert kept != before
    first.renew()
    assert first._etag != kept


def test_who_may_not_write_there_is_told_so(store: ObjectStore, object_store: Versitygw) -> None:
    object_store.create_user(Key("mallory", "a secret"))
    hers = ObjectStore(object_store.url, REGION, Key("mallory", "a secret"))
    with pytest.raises(AccessRefused, match="does not let mallory take the lease of the tests"):
        Lease(hers, "s3://lakehouse/leases/none", "the tests", "mallory").acquire()


@pytest.mark.spark
def test_a_second_spark_server_is_refused_and_takes_over_when_the_first_was_killed(
    in_object_store: Settings,
) -> None:
    first = in_object_store.model_copy(update={"spark_port": int(free_port())})
    second = first.model_copy(update={"spark_port": int(free_port()), "home": first.home.with_name("second")})
    for one in (first, second):
        one.home.mkdir(parents=True, exist_ok=True)
    tables = frozenset({THINGS.path})
    lakes = [Lake.of(one.model_copy(update={"spark_tables": tables}), "qa") for one in (first, second)]
    environment = os.environ | settings_variables(second, keys=True)
    with kept_spark(first) as keeper:
        lakes[0].merge(THINGS, things({"a": "1"}), run="r")
        refused = subprocess.run(KEEPER, env=environment, capture_output=True, text=True, timeout=60)
        assert refused.returncode == 1
        assert f"process {keeper.pid} on" in refused.stderr
        assert "has the lease of the Spark Connect server of dev" in refused.stderr
        keeper.send_signal(signal.SIGKILL)
        keeper.wait()
        killed = time.monotonic()
        with kept_spark(second):
            assert time.monotonic() - killed > 25, "not before the term was over"
            with pytest.raises(LakehouseError, match="can't be reached"):
                lakes[0].merge(THINGS, things({"a": "late"}), run="r")
            lakes[1].merge(THINGS, things({"b": "2"}), run="r")
        assert hashes(lakes[1].read(THINGS)) == {"a": "1", "b": "2"}
    bucket, _ = bucket_and_prefix(first.lake)
    key = f"{bucket_and_prefix(first.lake)[1]}/dev/_platform/leases/spark.json"
    client = ObjectStore(first.lake_endpoint, REGION, Key("root", first.lake_secret_key.get_secret_value())).client()
    left = client.get_object(Bucket=bucket, Key=key)["Body"].read()
    assert b'"given_back": true' in left, "the second ended in order"
