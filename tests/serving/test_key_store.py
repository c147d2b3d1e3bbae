"""API keys in a real PostgreSQL: what is stored of them, what may be asked for, and what several gateways agree on."""

import logging
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from pydantic import SecretStr

from millrace.errors import ApiKeyError, KeysAway, LakehouseError, SettingsError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_AUDIT, PLATFORM
from millrace.private_files import write_private
from millrace.secret_sources import SecretFile
from millrace.serving.api_keys import ApiKey, digest, new_key, read_key
from millrace.serving.key_store import KeyStore, RateExceeded
from millrace.settings import Settings
from millrace.sources.event_log import now
from tests.serving.databases import Database, connected

pytestmark = pytest.mark.slow

Make = Callable[..., tuple[ApiKey, str]]


def test_a_key_says_its_environment_and_id_and_what_is_written_otherwise_is_no_key() -> None:
    key_id, written = new_key("staging")
    said = read_key(written)
    assert said is not None
    assert (said.environment, said.id) == ("staging", key_id)
    for other in ("", "mr_", written[:-1], f"{written}0", f"{written}\n", f" {written}", written.upper()):
        assert read_key(other) is None
    assert read_key(written.replace("staging", "test")) is None
    assert read_key(written[:-1] + "٣") is None  # a digit, but not of ASCII


def test_a_keys_secret_has_256_bits_and_only_its_hash_is_stored(make: Make, database: Database) -> None:
    key, written = make("ask")
    secret = written.rsplit("_", 1)[1]
    assert re.fullmatch("[0-9a-f]{64}", secret)
    (row,) = database.run("select k::text, sha256 from api_keys.keys k")
    assert secret not in row[0]
    assert bytes(row[1]) == digest(written)
    assert secret not in repr(key)
    assert digest(written).hex() not in repr(key)


def test_a_key_is_found_as_it_was_made_and_only_in_its_environment(
    make: Make, store: KeyStore, keyed: Settings
) -> None:
    key, written = make(
        "ask", "pin", applications=["qa"], requests_per_minute=60, monthly_budget_usd=2.5, expires_at=now() + DAY
    )
    assert store.find(key.id) == key
    assert store.all() == [key]
    assert (key.scopes, key.applications) == ({"ask", "pin"}, {"qa"})
    assert (key.requests_per_minute, key.monthly_budget_usd, key.month_usd, key.last_used_at) == (60, 2.5, 0, None)
    assert key.opened_by(written, now())
    assert not key.opened_by(new_key("dev")[1], now())
    staging = KeyStore(keyed.model_copy(update={"environment": "staging"}))
    assert staging.find(key.id) is None
    with pytest.raises(ApiKeyError, match=f"staging has no API key '{key.id}'; `millrace key list`"):
        staging.revoke(key.id, actor="bob", reason="none")
    staging.close()


DAY = timedelta(days=1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scopes": ["ask", "root"]}, "a key needs a scope, and root is none; there are ask, feedback, pin, admin"),
        ({"scopes": []}, "a key needs a scope, and it has none"),
        ({"owner": " "}, "the owner must be a printable text of 1 to 100 characters, got ' '"),
        ({"owner": "a\nb"}, "must be a printable text"),
        ({"applications": []}, "a key for no application opens nothing"),
        ({"requests_per_minute": 0}, "0 requests a minute can't be"),
        ({"monthly_budget_usd": -1.0}, r"a budget of \$-1.0 can't be"),
        ({"monthly_budget_usd": float("nan")}, r"a budget of \$nan can't be"),
        ({"expires_at": now() - DAY}, "has expired; choose a later moment"),
    ],
)
def test_what_a_key_cannot_be_is_one_sentence(store: KeyStore, changes: dict, said: str) -> None:
    about = {
        "owner": "ann",
        "scopes": ["ask"],
        "applications": None,
        "requests_per_minute": None,
        "monthly_budget_usd": None,
        "expires_at": None,
    }
    with pytest.raises(ApiKeyError, match=said):
        store.create("a test", actor="bob", **about | changes)
    assert store.all() == []


def test_a_revoked_key_stays_revoked_since_then_and_cannot_be_rotated(make: Make, store: KeyStore) -> None:
    key, _ = make()
    first = store.revoke(key.id, actor="bob", reason="lost")
    assert first.ended(now()) == f"was revoked on {now():%Y-%m-%d}"
    assert store.revoke(key.id, actor="bob", reason="again").revoked_at == first.revoked_at
    with pytest.raises(ApiKeyError, match=r"was revoked on .*; make a new one"):
        store.rotate(key.id, overlap=DAY, actor="bob")


def test_a_rotated_key_has_two_secrets_for_a_while_and_never_three(make: Make, store: KeyStore) -> None:
    key, first = make()
    second_key, second = store.rotate(key.id, overlap=timedelta(hours=1), actor="bob")
    at = now()
    assert [second_key.opened_by(one, at) for one in (first, second)] == [True, True]
    assert [second_key.opened_by(one, at + timedelta(hours=2)) for one in (first, second)] == [False, True]
    third_key, third = store.rotate(key.id, overlap=timedelta(hours=1), actor="bob")
    assert [third_key.opened_by(one, at) for one in (first, second, third)] == [False, True, True]
    last_key, last = store.rotate(key.id, overlap=timedelta(0), actor="bob")
    assert [last_key.opened_by(one, now()) for one in (third, last)] == [False, True]
    with pytest.raises(ApiKeyError, match="say 0 to end it at once"):
        store.rotate(key.id, overlap=-DAY, actor="bob")


def test_a_minutes_requests_may_come_at_once_and_then_one_at_a_time(make: Make, store: KeyStore) -> None:
    key, _ = make(requests_per_minute=300)
    taken = 0
    with pytest.raises(RateExceeded) as refused:  # noqa: PT012
        while True:
            store.take(key)
            taken += 1
    # As many, and those that grew back meanwhile, one in 0.2 s.
    assert 300 <= taken < 400
    assert 0 < refused.value.wait <= 0.2
    time.sleep(0.2)
    store.take(key)


def test_two_gateways_take_from_one_limit_and_add_to_one_sum(make: Make, store: KeyStore, keyed: Settings) -> None:
    key, _ = make(requests_per_minute=7, monthly_budget_usd=1.0)
    other = KeyStore(keyed)

    def take(number: int) -> bool:
        try:
            (store, other)[number % 2].take(key)
        except RateExceeded:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(take, range(30))) == 7
        list(threads.map(lambda number: (store, other)[number % 2].charge(key.id, Decimal("0.0000004")), range(30)))
    other.close()
    found = store.find(key.id)
    assert (found.month_usd, found.total_usd) == (pytest.approx(12e-6), pytest.approx(12e-6))
    assert found.last_used_at is not None


def test_a_new_month_begins_at_zero(make: Make, store: KeyStore, database: Database) -> None:
    key, _ = make(monthly_budget_usd=1.0)
    store.charge(key.id, Decimal(3))
    assert store.take(key) == 3
    database.run("update api_keys.keys set month = month - interval '1 month'")
    assert store.take(key) == 0
    store.charge(key.id, Decimal(2))
    found = store.find(key.id)
    assert (found.month_usd, found.total_usd) == (2, 5)


def test_many_first_uses_at_once_make_one_table(keyed: Settings) -> None:
    stores = [KeyStore(keyed) for _ in range(6)]
    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(KeyStore.all, stores)) == [[]] * 6
    for one in stores:
        one.close()


def test_a_table_of_a_newer_format_is_refused_in_one_sentence(make: Make, keyed: Settings, database: Database) -> None:
    make()
    database.run("comment on schema api_keys is 'format 2'")
    with pytest.raises(ApiKeyError, match="say 'format 2' of themselves: a newer Millrace wrote them"):
        KeyStore(keyed).all()


def test_a_database_that_is_away_is_one_sentence_and_is_found_again(
    make: Make, store: KeyStore, database: Database
) -> None:
    key, _ = make()
    database.go_away()
    with pytest.raises(
        KeysAway, match=rf"the database of API keys, {database.name} at /.*, does not answer \("
    ) as away:
        store.find(key.id)
    assert "\n" not in str(away.value)
    database.come_back()
    assert store.find(key.id) == key


def test_a_database_that_does_not_move_is_not_waited_for(make: Make, store: KeyStore, database: Database) -> None:
    key, _ = make(requests_per_minute=5)
    other = connected(database.url)
    other.cursor().execute("lock table api_keys.keys")
    started = time.monotonic()
    with pytest.raises(KeysAway, match="lock timeout"):
        store.take(key)
    assert time.monotonic() - started < 10
    other.close()
    store.take(key)


def test_a_gateway_whose_role_may_only_look_up_and_count_makes_no_key(
    make: Make, keyed: Settings, database: Database
) -> None:
    """The grants of docs/keys.md."""
    key, _ = make(requests_per_minute=5)
    role = f"g_{database.name}"
    database.run(
        f"create role {role} login; grant usage on schema api_keys to {role}; grant select, "
        f"update (rested_at, month, month_usd, total_usd, last_used_at) on api_keys.keys to {role}"
    )
    url = SecretStr(database.url.replace("postgres@", f"{role}@"))
    store = KeyStore(keyed.model_copy(update={"keys_url": url}))
    assert store.find(key.id) == key
    store.take(key)
    store.charge(key.id, Decimal(1))
    with pytest.raises(ApiKeyError, match=r"refuses \w+ \(permission denied for table keys\); correct what"):
        store.revoke(key.id, actor="bob", reason="none")
    store.close()


def test_the_next_connection_logs_in_as_a_rotated_address_says(
    make: Make, keyed: Settings, database: Database, tmp_path: Path
) -> None:
    key, _ = make()
    role = f"r_{database.name}"
    database.run(f"create role {role} superuser login")
    write_private(tmp_path / "url", database.url)
    store = KeyStore(keyed.model_copy(update={"keys_url": SecretFile(tmp_path / "url", "MILLRACE_KEYS_URL")}))
    assert store.find(key.id) == key
    write_private(tmp_path / "url", database.url.replace("postgres@", f"{role}:another@"))
    assert store.find(key.id) == key
    asked = f"select count(*) from pg_stat_activity where usename = '{role}'"
    assert database.run(asked) == [(0,)], "a connection that stands goes on"
    database.go_away()
    database.come_back()
    assert store.find(key.id) == key
    assert database.run(asked) == [(1,)]
    store.close()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "MILLRACE_KEYS_URL is empty, and callers of the gateway need API keys here"),
        ("mysql://user:hidden@host/db", "MILLRACE_KEYS_URL is no address of PostgreSQL"),
        ("postgresql://user:hidden@[host/db", "MILLRACE_KEYS_URL is no address of PostgreSQL"),
    ],
)
def test_an_address_that_is_none_is_one_sentence_without_its_password(settings: Settings, url: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said) as refused:
        KeyStore(settings.model_copy(update={"keys_url": SecretStr(url)}))
    assert "hidden" not in str(refused.value)


def test_an_address_that_was_rotated_to_none_is_one_sentence_without_its_password(
    settings: Settings, tmp_path: Path
) -> None:
    write_private(tmp_path / "url", "postgresql://user:hidden@host/db")
    url = SecretFile(tmp_path / "url", "MILLRACE_KEYS_URL")
    store = KeyStore(settings.model_copy(update={"keys_url": url}))
    for none in ("postgresql://user:hidden@[host/db", "postgresql://user:hid%zzden@host/db"):
        write_private(tmp_path / "url", none)
        with pytest.raises(ApiKeyError, match="MILLRACE_KEYS_URL is no address of PostgreSQL; write") as refused:
            store.all()
        assert "hid" not in str(refused.value)


def test_a_password_is_in_no_message(settings: Settings) -> None:
    url = SecretStr("postgresql://ann:hidden@127.0.0.1:9/keys")
    with pytest.raises(KeysAway, match=r"keys at 127\.0\.0\.1, does not answer") as refused:
        KeyStore(settings.model_copy(update={"keys_url": url})).all()
    assert "hidden" not in str(refused.value)


def test_whoever_keeps_a_record_is_told_what_happened_to_a_key(
    make: Make, store: KeyStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "millrace.keys")
    key, first = make("ask")
    _, second = store.rotate(key.id, overlap=timedelta(0), actor="carl")
    store.revoke(key.id, actor="dora", reason="it was in a chat")
    told = [record.getMessage() for record in caplog.records]
    assert told[0] == f"dev: API key {key.id} created by bob: a test, of ann, for ask"
    assert told[1].startswith(f"dev: API key {key.id} rotated by carl: the secret before is valid until ")
    assert told[2] == f"dev: API key {key.id} revoked by dora: it was in a chat"
    assert not [line for line in told for written in (first, second) if written.rsplit("_", 1)[1] in line]


def test_a_secret_that_cannot_be_recorded_is_shown_all_the_same(make: Make, store: KeyStore, keyed: Settings) -> None:
    key, _ = make("ask")
    shown: list[str] = []
    trail = Path(Lake.of(keyed, PLATFORM).uri(OPS_AUDIT))
    shutil.rmtree(trail)
    trail.write_text("no table")
    with pytest.raises(LakehouseError):
        store.rotate(key.id, overlap=DAY, actor="bob", show=shown.append)
    found = store.find(key.id)
    assert found is not None
    assert found.opened_by(shown[0], now())


def test_an_answer_that_is_lost_on_its_way_changes_nothing_twice(
    make: Make, store: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, lost = make("ask")  # so that there is a connection, which is what is tried again
    execute, answered = KeyStore._execute, []

    def once_without_answer(self: KeyStore, sql: str, values: Mapping[str, Any]) -> Any:
        found = execute(self, sql, values)
        if not sql.startswith("select") and not answered:
            answered.append(sql)
            raise psycopg2.OperationalError("server closed the connection unexpectedly")
        return found

    monkeypatch.setattr(KeyStore, "_execute", once_without_answer)
    key, first = make("ask")
    assert len(answered) == 1
    assert len(store.all()) == 2
    answered.clear()
    rotated, second = store.rotate(key.id, overlap=DAY, actor="bob")
    assert len(answered) == 1
    assert [rotated.opened_by(written, now()) for written in (first, second, lost)] == [True, True, False]
