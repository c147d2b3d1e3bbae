"""API keys in PostgreSQL: made, found, changed, counted. One table, in a schema of its own that the first use makes.

What several gateways must agree on is decided in the database, each time in one statement: whether a key has requests
left in this minute, and what it has spent. Nothing here knows a request.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import psycopg2

from millrace.errors import ApiKeyError, KeysAway, SettingsError
from millrace.serving.api_keys import SCOPES, ApiKey, digest, new_key, new_secret
from millrace.serving.key_events import KeyEvent, Kind, record_key_event
from millrace.settings import Settings
from millrace.sources.event_log import now

FORMAT = 1
"""Of the table; the schema's comment says it."""
LONGEST_NAME = 100
_SCHEMA_LOCK = 0x6D72_6B65_7973
"""Held while the schema is made: of two gateways that start at once, one makes it."""

_TABLE = """
create schema if not exists api_keys;
create table if not exists api_keys.keys (
    id text primary key,
    environment text not null,
    name text not null,
    owner text not null,
    sha256 bytea not null,
    earlier_sha256 bytea,
    earlier_until timestamptz,
    scopes text[] not null,
    applications text[],
    requests_per_minute integer check (requests_per_minute > 0),
    monthly_budget_usd numeric check (monthly_budget_usd > 0),
    created_at timestamptz not null,
    expires_at timestamptz,
    revoked_at timestamptz,
    last_used_at timestamptz,
    rested_at timestamptz not null default '-infinity',
    month date not null default '-infinity',
    month_usd numeric not null default 0,
    total_usd numeric not null default 0
);
comment on table api_keys.keys is 'API keys of the gateway; sha256: of what holders show, which is stored nowhere';
comment on column api_keys.keys.rested_at is 'when all requests of a minute are left again';
"""
_THIS_MONTH = "date_trunc('month', clock_timestamp() at time zone 'utc')::date"
_SPENT = f"case when month = {_THIS_MONTH} then month_usd else 0 end"
_COLUMNS = ", ".join(f"{_SPENT} as month_usd" if one.name == "month_usd" else one.name for one in fields(ApiKey))
# The generic cell rate algorithm (ITU-T I.371): a bucket in one moment, the one at which it would be full. Who waits
# for another gateway's update sees the row as that one left it.
_TAKE = f"""
update api_keys.keys
set rested_at = greatest(rested_at, clock_timestamp()) + interval '1 minute' / requests_per_minute
where id = %(id)s and greatest(rested_at, clock_timestamp()) + interval '1 minute' / requests_per_minute
    <= clock_timestamp() + interval '1 minute'
returning {_SPENT}
"""
_WAIT = """
select extract(epoch from rested_at + interval '1 minute' / requests_per_minute - interval '1 minute'
    - clock_timestamp()) from api_keys.keys where id = %(id)s
"""
_CHARGE = f"""
update api_keys.keys
set month = {_THIS_MONTH}, month_usd = {_SPENT} + %(usd)s, total_usd = total_usd + %(usd)s,
    last_used_at = clock_timestamp()
where id = %(id)s
returning month_usd
"""

_AWAY = (psycopg2.OperationalError, psycopg2.InterfaceError, psycopg2.InternalError)
"""What passes when a database is back: lost connections, a full disk, a standby that can't be written yet."""
_REFUSALS = ("permission denied for database", "password authentication failed")
"""Of an error before there is a connection, which has no code: the database is there, and lets this role not in."""
_NO_ADDRESS = "MILLRACE_KEYS_URL is no address of PostgreSQL; write postgresql://user:password@host/database"

Rows = list[tuple[Any, ...]]
Show = Callable[[str], object]


class RateExceeded(Exception):
    """A key has no request left in this minute. `wait`: seconds until it has one."""

    def __init__(self, wait: float) -> None:
        super().__init__(f"no request left for {wait:.1f} s")
        self.wait = wait


class KeyStore:
    """The keys of one environment. Thread-safe: one connection, made at first use and again when it was lost.

    Every method raises KeysAway if the database does not answer within some seconds, and ApiKeyError if it refuses.
    """

    def __init__(self, settings: Settings) -> None:
        """Raises:
        SettingsError: the settings name no database, or none that could be.
        """
        self._settings = settings
        self._where = _where(self._url)
        self._connection: psycopg2.extensions.connection | None = None
        self._lost_at = 0.0
        self._lock = threading.Lock()

    @property
    def _url(self) -> str:
        """As it is now: a password may have been rotated since the last connection."""
        # As SQLAlchemy writes addresses too.
        return self._settings.keys_url.get_secret_value().replace("postgresql+psycopg2://", "postgresql://", 1)

    def create(
        self,
        name: str,
        *,
        owner: str,
        scopes: Sequence[str],
        applications: Sequence[str] | None,
        requests_per_minute: int | None,
        monthly_budget_usd: float | None,
        expires_at: datetime | None,
        actor: str,
        show: Show = lambda _: None,
    ) -> tuple[ApiKey, str]:
        """A new key, and what its holder has to show: nobody can tell that again.

        Args:
            show: is given that first, before it is recorded, which may fail.

        Raises:
            ApiKeyError: a key can't be like that.
        """
        at = now()
        _check(name, owner, scopes, applications, requests_per_minute, monthly_budget_usd, expires_at, at)
        key_id, written = new_key(self._settings.environment)
        (made,) = self._keys(
            "insert into api_keys.keys (id, environment, name, owner, sha256, scopes, applications,"
            " requests_per_minute, monthly_budget_usd, created_at, expires_at)"
            " values (%(id)s, %(environment)s, %(name)s, %(owner)s, %(sha256)s, %(scopes)s, %(applications)s,"
            " %(requests)s, %(budget)s, %(at)s, %(expires)s)"
            # Tried again where the answer was lost, it is there.
            " on conflict (id) do update set name = excluded.name where keys.sha256 = excluded.sha256"
            f" returning {_COLUMNS}",
            {
                "id": key_id,
                "environment": self._settings.environment,
                "name": name,
                "owner": owner,
                "sha256": digest(written),
                "scopes": sorted(set(scopes)),
                "applications": None if applications is None else sorted(set(applications)),
                "requests": requests_per_minute,
                "budget": monthly_budget_usd,
                "at": at,
                "expires": expires_at,
            },
        )
        show(written)
        self._record("created", made, actor, f"{name}, of {owner}, for {', '.join(sorted(made.scopes))}")
        return made, written

    def all(self) -> list[ApiKey]:
        """Oldest first, also those that have ended."""
        return self._keys(
            f"select {_COLUMNS} from api_keys.keys where environment = %(environment)s order by created_at, id",
            {"environment": self._settings.environment},
        )

    def find(self, key_id: str) -> ApiKey | None:
        found = self._keys(
            f"select {_COLUMNS} from api_keys.keys where id = %(id)s and environment = %(environment)s",
            {"id": key_id, "environment": self._settings.environment},
        )
        return found[0] if found else None

    def revoke(self, key_id: str, *, actor: str, reason: str) -> ApiKey:
        """End a key. One that was revoked before stays revoked since then.

        Raises:
            ApiKeyError: there is no such key.
        """
        ended = self._changed("revoked_at = coalesce(revoked_at, %(at)s)", key_id, {"at": now()})
        self._record("revoked", ended, actor, reason)
        return ended

    def rotate(self, key_id: str, *, overlap: timedelta, actor: str, show: Show = lambda _: None) -> tuple[ApiKey, str]:
        """The key with a new secret, and what its holder has to show from now on. The secret before it is valid for
        `overlap` more; one before that, not any more.

        Args:
            show: as in `create`.

        Raises:
            ApiKeyError: there is no such key, or it has ended.
        """
        at = now()
        if overlap < timedelta(0):
            raise ApiKeyError(f"the secret before can't be valid for {overlap}; say 0 to end it at once")
        if (ended := self._known(key_id).ended(at)) is not None:
            raise ApiKeyError(f"API key {key_id} {ended}; make a new one with `millrace key create`")
        written = new_secret(self._settings.environment, key_id)
        rotated = self._changed(
            # Tried again where the answer was lost, it is the new one already.
            "earlier_sha256 = case when sha256 = %(sha256)s then earlier_sha256 else sha256 end,"
            " earlier_until = %(until)s, sha256 = %(sha256)s",
            key_id,
            {"until": at + overlap, "sha256": digest(written)},
        )
        show(written)
        self._record("rotated", rotated, actor, f"the secret before is valid until {at + overlap:%Y-%m-%d %H:%M} UTC")
        return rotated, written

    def take(self, key: ApiKey) -> float:
        """One request of this minute's, where the key has so many; returns what it has spent this month, in US dollars.

        Raises:
            RateExceeded: none is left.
        """
        if key.requests_per_minute is None:
            rows = self._run(f"select {_SPENT} from api_keys.keys where id = %(id)s", {"id": key.id})
        else:
            rows = self._run(_TAKE, {"id": key.id})
        if not rows:
            waits = self._run(_WAIT, {"id": key.id})
            raise RateExceeded(max(0.0, float(waits[0][0] or 0)) if waits else 0.0)
        return float(rows[0][0])

    def charge(self, key_id: str, usd: Decimal) -> float:
        """Add to what a key has spent; returns what that is this month, in US dollars. Where a database goes between
        the commit and its answer, it is added twice."""
        rows = self._run(_CHARGE, {"id": key_id, "usd": usd})
        return float(rows[0][0]) if rows else 0.0  # somebody took the row away

    def close(self) -> None:
        with self._lock:
            self._drop()

    def _known(self, key_id: str) -> ApiKey:
        found = self.find(key_id)
        if found is None:
            raise ApiKeyError(
                f"{self._settings.environment} has no API key {key_id!r}; `millrace key list` has the ids of all"
            )
        return found

    def _changed(self, assignments: str, key_id: str, values: Mapping[str, Any]) -> ApiKey:
        self._known(key_id)
        (changed,) = self._keys(
            f"update api_keys.keys set {assignments} where id = %(id)s returning {_COLUMNS}", {"id": key_id, **values}
        )
        return changed

    def _keys(self, sql: str, values: Mapping[str, Any]) -> list[ApiKey]:
        return [_key(row) for row in self._run(sql, values)]

    def _run(self, sql: str, values: Mapping[str, Any]) -> Rows:
        """One statement, committed. A connection that was lost since the statement before is made again, once."""
        asked = time.monotonic()
        with self._lock:
            if asked < self._lost_at:
                # It was found away while this one waited its turn: not everybody in the row has to find that out.
                raise KeysAway(f"the database of API keys, {self._where}, does not answer")
            for fresh in (self._connection is None, True):
                try:
                    return self._execute(sql, values)
                except _AWAY as error:
                    self._drop()
                    if any(refusal in str(error) for refusal in _REFUSALS):
                        raise self._refused(error) from None
                    if fresh:
                        self._lost_at = time.monotonic()
                        raise KeysAway(
                            f"the database of API keys, {self._where}, does not answer ({_first_line(error)}); "
                            "start it (`millrace up`), or correct MILLRACE_KEYS_URL"
                        ) from None
                except psycopg2.Error as error:
                    raise self._refused(error) from None
        raise AssertionError("a second try returns or raises")

    def _refused(self, error: psycopg2.Error) -> ApiKeyError:
        role = _parts(self._url).get("user", "this user")
        return ApiKeyError(
            f"the database of API keys, {self._where}, refuses {role} ({_first_line(error)}); "
            "correct what its role may do, or MILLRACE_KEYS_URL"
        )

    def _execute(self, sql: str, values: Mapping[str, Any]) -> Rows:
        if self._connection is None:
            self._connection = _connect(self._url)
        with self._connection, self._connection.cursor() as cursor:
            cursor.execute(sql, values)
            return cursor.fetchall() if cursor.description else []

    def _drop(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(psycopg2.Error):
                self._connection.close()
            self._connection = None

    def _record(self, kind: Kind, key: ApiKey, actor: str, told: str) -> None:
        applications = None if key.applications is None else tuple(sorted(key.applications))
        event = KeyEvent(kind, key.id, actor, told, tuple(sorted(key.scopes)), applications, key.expires_at)
        record_key_event(self._settings, event)


def _connect(url: str) -> "psycopg2.extensions.connection":
    """Raises:
    ApiKeyError: a newer Millrace wrote the keys there, or the address was rotated to none.
    """
    try:
        connection = psycopg2.connect(
            url,
            connect_timeout=2,
            # A server that is gone without a word is noticed, and one that waits for a lock is not waited for.
            tcp_user_timeout=3000,
            options="-c statement_timeout=3000 -c lock_timeout=2000 -c timezone=UTC",
            application_name="millrace keys",
        )
    except psycopg2.ProgrammingError:  # its text has the address, and with it the password
        raise ApiKeyError(_NO_ADDRESS) from None
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute("select pg_advisory_xact_lock(%s)", (_SCHEMA_LOCK,))
            cursor.execute("select obj_description(to_regnamespace('api_keys'), 'pg_namespace')")
            said = cursor.fetchone()
            if not said or said[0] is None:
                cursor.execute(_TABLE)
                cursor.execute(f"comment on schema api_keys is 'format {FORMAT}'")
            elif said[0] != f"format {FORMAT}":
                raise ApiKeyError(
                    f"the API keys say {said[0]!r} of themselves: a newer Millrace wrote them, and this one knows "
                    f"format {FORMAT}; upgrade Millrace"
                )
    except BaseException:
        connection.close()
        raise
    return connection


def _parts(url: str) -> dict[str, str]:
    """Of an address; nothing: it is none."""
    try:
        return psycopg2.extensions.parse_dsn(url)
    except psycopg2.Error:
        return {}


def _where(url: str) -> str:
    """Host and database of an address, without who logs in and how.

    Raises:
        SettingsError: it is none.
    """
    if not url:
        raise SettingsError(
            "MILLRACE_KEYS_URL is empty, and callers of the gateway need API keys here: `millrace up` keeps them in "
            "its own PostgreSQL; elsewhere set postgresql://user:password@host/database"
        )
    parts = _parts(url)
    if not url.startswith(("postgresql://", "postgres://")) or not parts:
        raise SettingsError(_NO_ADDRESS)
    return f"{parts.get('dbname', '')} at {parts.get('host', 'localhost')}"


def _check(
    name: str,
    owner: str,
    scopes: Sequence[str],
    applications: Sequence[str] | None,
    requests_per_minute: int | None,
    monthly_budget_usd: float | None,
    expires_at: datetime | None,
    at: datetime,
) -> None:
    for what, text in (("name", name), ("owner", owner)):
        if not text.strip() or len(text) > LONGEST_NAME or not text.isprintable():
            raise ApiKeyError(f"the {what} must be a printable text of 1 to {LONGEST_NAME} characters, got {text!r}")
    if not scopes or (unknown := sorted(set(scopes) - set(SCOPES))):
        said = f"{', '.join(unknown)} is none" if scopes else "it has none"
        raise ApiKeyError(f"a key needs a scope, and {said}; there are {', '.join(SCOPES)}")
    if applications is not None and not applications:
        raise ApiKeyError("a key for no application opens nothing; name some, or leave them out for all")
    if requests_per_minute is not None and not 1 <= requests_per_minute <= 1_000_000:
        raise ApiKeyError(f"{requests_per_minute} requests a minute can't be; give 1 to 1,000,000, or none: no limit")
    if monthly_budget_usd is not None and not 0 < monthly_budget_usd < 1e12:
        raise ApiKeyError(f"a budget of ${monthly_budget_usd} can't be; give more than 0, or none: no limit")
    if expires_at is not None and expires_at <= at:
        raise ApiKeyError(f"a key that expires on {expires_at:%Y-%m-%d %H:%M} UTC has expired; choose a later moment")


def _key(row: tuple[Any, ...]) -> ApiKey:
    values = dict(zip((one.name for one in fields(ApiKey)), row, strict=True))
    for name in ("scopes", "applications"):
        values[name] = None if values[name] is None else frozenset(values[name])
    for name in ("monthly_budget_usd", "month_usd", "total_usd"):
        values[name] = None if values[name] is None else float(values[name])
    for name in ("sha256", "earlier_sha256"):
        values[name] = None if values[name] is None else bytes(values[name])
    return ApiKey(**values)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
