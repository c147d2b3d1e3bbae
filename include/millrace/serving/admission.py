"""Who may come in: a request's API key against the stored ones, its scope, its rate and its budget.

Keys are remembered for some seconds, so that most requests ask no database, and longer while the database is away, so
that a restart of it stops nobody who was here. What is not known for certain is refused. It does not know HTTP beyond
the one header, nor how keys are kept (`key_store.py`).
"""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from millrace.errors import ApiKeyError, KeysAway, MillraceError
from millrace.lakehouse.audit.key_uses import KeyUses
from millrace.lakehouse.tables import PLATFORM
from millrace.serving.api_keys import ApiKey, Scope, read_key
from millrace.serving.key_events import KeyEvent, record_key_event
from millrace.serving.key_store import KeyStore, RateExceeded
from millrace.serving.refusal import QUOTA, Refusal, unavailable
from millrace.settings import Settings
from millrace.sources.event_log import now

CACHE_SECONDS = 5.0
"""A key that was looked up is not looked up again for so long: within it a revocation is not noticed."""
GRACE_SECONDS = 300.0
"""While the database is away, a key that it confirmed so recently is let in: at the budget that was known, and with no
limit of requests but what a gateway can work on."""
RETRY_SECONDS = 2.0
"""Between two tries to reach a database that is away."""
TOLD_AGAIN_SECONDS = 60.0
"""Before a refusal of the same key for the same reason is an event again."""

LOOK_SECONDS = 60.0
"""Between two looks whether an hour of uses is over, for the audit trail."""

log = logging.getLogger("millrace.serving")


@dataclass(frozen=True)
class Caller:
    """Whose request this is. Without a key, where none is required, everybody may everything."""

    key: ApiKey | None
    admission: "Admission"

    def require(self, scope: Scope) -> None:
        """Raises:
        Refusal: 403, the key has no such scope.
        """
        if self.key is not None and scope not in self.key.scopes:
            raise self.admission.refuse(
                403,
                f"API key {self.key.id} has the scopes {', '.join(sorted(self.key.scopes))}, and this needs {scope}; "
                "use a key that has it",
                code="insufficient_permissions",
                key_id=self.key.id,
            )

    def require_application(self, application: str) -> None:
        """Raises:
        Refusal: 403, the key is for others.
        """
        if self.key is not None and not self.key.reaches(application):
            raise self.admission.refuse(
                403,
                f"API key {self.key.id} is for {', '.join(sorted(self.key.applications or ()))} only; use a key that "
                "reaches the application",
                code="insufficient_permissions",
                key_id=self.key.id,
                param="model",
            )

    def may_ask(self, model: str) -> bool:
        """Whether a question to `model` (`qa`, `qa@12`) would get past scopes and applications."""
        application, _, pin = model.partition("@")
        return self.key is None or (self.key.reaches(application) and (not pin or "pin" in self.key.scopes))

    def charge(self, usd: float) -> None:
        """What an answer to this caller cost. Never raises."""
        if self.key is not None:
            self.admission.charge(self.key, usd)


@dataclass(frozen=True)
class _Known:
    key: ApiKey
    at: float
    """When the database said so; monotonic."""


class Admission:
    """Thread-safe. Reaches for the database at the first request."""

    def __init__(self, settings: Settings) -> None:
        """Raises:
        SettingsError: keys are required and kept nowhere.
        """
        self.required = settings.keys_required
        self._settings = settings
        self._store = KeyStore(settings) if self.required else None
        self._known: dict[str, _Known] = {}
        self._spent: dict[str, float] = {}
        self._owed: defaultdict[str, Decimal] = defaultdict(Decimal)
        self._away_until: float | None = None
        self._uses = KeyUses()
        self._recorder: threading.Thread | None = None
        self._closing = threading.Event()
        self._told: dict[tuple[str | None, str], float] = {}
        self._lock = threading.Lock()
        self._settling = threading.Lock()

    @property
    def anybody(self) -> Caller:
        """Where no key is required."""
        return Caller(None, self)

    def admit(self, headers: Mapping[str, str], scope: Scope, *, pays: bool = False) -> Caller:
        """Let a request in. May wait for the database, some seconds at most.

        Args:
            scope: what it needs.
            pays: whether it costs something, so that a spent budget keeps it out.

        Raises:
            Refusal: 401 no valid key, 403 not this scope, 429 too many requests or a spent budget, 503 nobody can tell.
        """
        if not self.required:
            return self.anybody
        self._begin_recording()
        key = self._authenticated(headers.get("authorization", ""))
        caller = Caller(key, self)
        caller.require(scope)
        self._uses.count(key.id, PLATFORM, scope)
        spent = self._take(key)
        if pays and key.monthly_budget_usd is not None:
            with self._lock:
                spent += float(self._owed.get(key.id, 0))
            if spent >= key.monthly_budget_usd:
                raise Refusal(
                    429,
                    f"API key {key.id} has spent its ${key.monthly_budget_usd:g} of this month (UTC); "
                    f"{key.owner} can ask for more",
                    code=QUOTA,
                )
        return caller

    def charge(self, key: ApiKey, usd: float) -> None:
        """Add to what `key` has spent; what the database does not take now, it is offered with the next."""
        with self._lock:
            self._owed[key.id] += Decimal(str(usd))
        self._settle()

    def refuse(self, status: int, sentence: str, *, code: str, key_id: str | None, param: str | None = None) -> Refusal:
        """The refusal of a key that is known, or of what is none, once it has been told to whoever keeps a record."""
        self._uses.count(key_id or "unknown", PLATFORM, "refused")
        moment = time.monotonic()
        with self._lock:
            last = self._told.get((key_id, sentence))
            again = last is not None and moment - last < TOLD_AGAIN_SECONDS
            if not again:
                self._told = {about: at for about, at in self._told.items() if moment - at < TOLD_AGAIN_SECONDS}
                self._told[key_id, sentence] = moment
        if not again:
            record_key_event(self._settings, KeyEvent("refused", key_id, "the gateway", sentence))
        return Refusal(status, sentence, code=code, param=param)

    def close(self) -> None:
        """Offer the database once more what it has not taken, and let go of it; the audit trail has all uses then."""
        self._closing.set()
        if self._recorder is not None:
            self._recorder.join()
        self._record_uses(None)
        if self._store is not None:
            self._away_until = None
            self._settle()
            self._store.close()

    def _begin_recording(self) -> None:
        """In a thread of its own, so that no request waits for the lake."""
        if self._recorder is not None:
            return
        with self._lock:
            if self._recorder is None:
                self._recorder = threading.Thread(target=self._record_hours, name="key uses", daemon=True)
                self._recorder.start()

    def _record_hours(self) -> None:
        while not self._closing.wait(LOOK_SECONDS):
            self._record_uses(now())

    def _record_uses(self, moment: datetime | None) -> None:
        """Of the hours that are over at `moment`, into the audit trail; None: of all. What it does not take then, it is
        offered with the next."""
        try:
            self._uses.flush(self._settings, run="gateway", now=moment)
        except MillraceError as error:
            log.error("the uses of API keys wait for the audit trail: %s", error)

    def _authenticated(self, header: str) -> ApiKey:
        scheme, _, shown = header.partition(" ")
        if not header or scheme.lower() != "bearer":
            raise self._unauthorised("there is no API key: send one as `Authorization: Bearer …`")
        shown = shown.strip()
        said = read_key(shown)
        if said is None:
            raise self._unauthorised("what was sent is no API key of Millrace: those begin with mr_")
        if said.environment != self._settings.environment:
            raise self._unauthorised(
                f"this is an API key of {said.environment}, and the gateway is {self._settings.environment}'s"
            )
        key, at = self._find(said.id, CACHE_SECONDS), now()
        if key is not None and not key.opened_by(shown, at):
            # What is remembered may be from before a rotation.
            key = self._find(said.id, 0)
        if key is None or not key.opened_by(shown, at):
            # Of a key that is there, so that whoever keeps a record sees somebody guess.
            raise self._unauthorised("this API key is not valid", key.id if key else None)
        if (ended := key.ended(at)) is not None:
            raise self._unauthorised(f"API key {key.id} {ended}; ask for a new one", key.id)
        return key

    def _find(self, key_id: str, remembered: float) -> ApiKey | None:
        """The key, as it was at most `remembered` seconds ago where the database answers.

        Raises:
            Refusal: 503, the database is away and did not confirm this key lately.
        """
        known, moment = self._known.get(key_id), time.monotonic()
        if known is not None and moment - known.at < remembered:
            return known.key
        try:
            key = self._reached().find(key_id)
        except ApiKeyError as error:
            self._failed(error)
            if isinstance(error, KeysAway) and known is not None and moment - known.at < GRACE_SECONDS:
                return known.key
            raise _uncertain() from None
        self._back()
        with self._lock:
            if key is None:
                self._known.pop(key_id, None)
            else:
                self._known[key_id] = _Known(key, moment)
        return key

    def _take(self, key: ApiKey) -> float:
        """One of the key's requests, if they are limited; what it has spent this month, as well as it is known."""
        if key.requests_per_minute is None and key.monthly_budget_usd is None:
            return 0.0
        try:
            spent = self._reached().take(key)
        except RateExceeded as error:
            self._back()
            raise Refusal(
                429,
                f"API key {key.id} may make {key.requests_per_minute} requests a minute; come back in "
                f"{error.wait:.1f} s",
                code="rate_limit_exceeded",
                retry_after=int(error.wait) + 1,
            ) from None
        except KeysAway as error:
            self._failed(error)
            return self._spent.get(key.id, key.month_usd)
        except ApiKeyError as error:
            self._failed(error)
            raise _uncertain() from None
        self._back()
        self._spent[key.id] = spent
        return spent

    def _settle(self) -> None:
        """Everything that is owed, into the database. Threads that come meanwhile leave theirs to the next."""
        if self._store is None:
            return
        with self._settling:
            with self._lock:
                owed = dict(self._owed)
            for key_id, usd in owed.items():
                try:
                    spent = self._reached().charge(key_id, usd)
                except ApiKeyError as error:
                    self._failed(error)
                    return
                self._back()
                with self._lock:
                    self._spent[key_id] = spent
                    self._owed[key_id] -= usd
                    if not self._owed[key_id]:
                        del self._owed[key_id]

    def _reached(self) -> KeyStore:
        """The store, unless it was found away a moment ago; then one thread tries, and the others go on without.

        Raises:
            KeysAway: it is not to be tried now.
        """
        assert self._store is not None
        with self._lock:
            if self._away_until is not None:
                moment = time.monotonic()
                if moment < self._away_until:
                    raise KeysAway("the database of API keys was away a moment ago")
                self._away_until = moment + RETRY_SECONDS
        return self._store

    def _failed(self, error: ApiKeyError) -> None:
        if not isinstance(error, KeysAway):
            log.error("%s", error)
            return
        with self._lock:
            first, self._away_until = self._away_until is None, self._away_until or time.monotonic() + RETRY_SECONDS
        if first:
            log.error("%s; API keys that it confirmed lately are let in for %.0f s", error, GRACE_SECONDS)

    def _back(self) -> None:
        with self._lock:
            was, self._away_until = self._away_until is not None, None
        if was:
            log.info("the database of API keys is back")

    def _unauthorised(self, sentence: str, key_id: str | None = None) -> Refusal:
        return self.refuse(401, sentence, code="invalid_api_key", key_id=key_id)


def _uncertain() -> Refusal:
    return unavailable("API keys can't be checked now; come back", code="keys_unavailable")
