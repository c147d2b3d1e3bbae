"""The one place that sends alerts: always the log, and every address in `MILLRACE_ALERT_URLS` (apprise: chat, mail,
webhooks). What is said again is counted instead of sent, in `ops/alerts` of the application `_platform`.

It does not know what is worth an alert. Sending never raises: an alert must not hide what it is about.
"""

import logging
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import apprise
import pyarrow as pa
import pyarrow.compute as pc

from millrace.errors import MillraceError, SettingsError
from millrace.lakehouse.content import content_hash
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_ALERTS, PLATFORM
from millrace.secret_sources import SecretVariable
from millrace.settings import Settings

log = logging.getLogger("millrace.alerts")

SENT_AGAIN = timedelta(days=1)


@dataclass(frozen=True)
class Alert:
    """What happened, where, and where the runbook is. Alerts with the same title tell of the same trouble."""

    title: str
    what: str
    source: str
    runbook: str


@dataclass(frozen=True)
class Trouble:
    """What is known of a title: since when, how often it was said, and when that last reached somebody."""

    since: datetime
    last_at: datetime
    count: int
    sent_at: datetime | None


def send(alert: Alert, settings: Settings, *, now: datetime | None = None) -> bool:
    """Log `alert` and send it to every address, unless its title was sent less than `alert_repeat_hours` ago.

    Returns:
        Whether it was sent: False if it was said before, no address is set, or none took it.
    """
    now = now or datetime.now(UTC)
    log.error("ALERT %s: %s (%s; runbook %s)", alert.title, alert.what, alert.source, alert.runbook)
    repeat = timedelta(hours=settings.alert_repeat_hours)
    trouble = following(_known(settings, alert.title), now, repeat)
    due = trouble.sent_at is None or now - trouble.sent_at >= repeat
    sent = due and _deliver(alert, trouble, settings)
    if sent:
        trouble = Trouble(trouble.since, trouble.last_at, trouble.count, now)
    _remember(settings, alert, trouble)
    return sent


def send_again(settings: Settings, *, now: datetime) -> int:
    """Send what no address took when it was last said, in the time of `SENT_AGAIN`. At least once: of two applications
    whose monitors look at the same moment both may send.

    Returns:
        How many alerts were sent.
    """
    try:
        lake, since = Lake.of(settings, PLATFORM), now - SENT_AGAIN
        rows = lake.read(OPS_ALERTS, where=pc.field("sent_at").is_null() & (pc.field("last_at") >= since)).to_pylist()
    except MillraceError as error:
        log.error("which alerts reached nobody is not known: %s", error)
        return 0
    sent = 0
    for row in rows:
        alert = Alert(row["title"], row["what"], row["source"], row["runbook"])
        trouble = Trouble(row["since"], row["last_at"], row["count"], sent_at=now)
        if _deliver(alert, trouble, settings):
            _remember(settings, alert, trouble)
            sent += 1
    return sent


def said_since(settings: Settings, dag: str, since: datetime) -> bool:
    """Whether an alert came from a run of `dag` since then."""
    try:
        rows = Lake.of(settings, PLATFORM).read(OPS_ALERTS, ["source"], where=pc.field("last_at") >= since)
    except MillraceError as error:
        log.error("whether %s said that it failed is not known: %s", dag, error)
        return False
    return any(source.startswith(f"{dag}/") for source in rows["source"].to_pylist())


def following(known: Trouble | None, now: datetime, repeat: timedelta) -> Trouble:
    """The trouble once it is said again at `now`: the same one, or a new one if it was silent for `repeat`."""
    if known is None or now - known.last_at >= repeat:
        return Trouble(since=now, last_at=now, count=1, sent_at=None)
    return Trouble(known.since, max(now, known.last_at), known.count + 1, known.sent_at)


def told(alert: Alert, trouble: Trouble) -> str:
    """The body of the message."""
    since = f"since {trouble.since:%Y-%m-%d %H:%M} UTC"
    often = f", {trouble.count} times" if trouble.count > 1 else ""
    return f"{alert.what}\n\n{since}{often}\n{alert.source}\nRunbook: {alert.runbook}"


def check_addresses(settings: Settings) -> None:
    """Raises:
    SettingsError: an address is of no kind that apprise knows. It would be dropped silently.
    """
    if isinstance(settings.alert_urls, SecretVariable):
        return  # Airflow tells it to tasks only
    for number, url in enumerate(_addresses(settings), 1):
        if apprise.Apprise.instantiate(url) is None:
            scheme = url.partition(":")[0]
            raise SettingsError(
                f"address {number} of MILLRACE_ALERT_URLS ({scheme}:…) is of no kind that apprise knows; "
                "see https://github.com/caronc/apprise/wiki"
            )


def _deliver(alert: Alert, trouble: Trouble, settings: Settings) -> bool:
    """Whether at least one address took it."""
    taken = 0
    try:
        addresses = _addresses(settings)
    except MillraceError as error:
        log.error("nobody is sent the alert %r: %s", alert.title, error)
        return False
    for number, url in enumerate(addresses, 1):
        if _taken(url, alert, trouble):
            taken += 1
            continue
        # The address itself may hold a token.
        log.error(
            "address %d of MILLRACE_ALERT_URLS (%s:…) did not take the alert %r: check the address; if no other took "
            "it, `monitor` sends it again",
            number,
            url.partition(":")[0],
            alert.title,
        )
    return taken > 0


def _taken(url: str, alert: Alert, trouble: Trouble) -> bool:
    try:
        address = apprise.Apprise.instantiate(url)
        return bool(address and address.notify(body=told(alert, trouble), title=alert.title, notify_type="failure"))
    except Exception as error:  # of whatever service this is
        log.error("apprise fails with %s", type(error).__name__)  # what it says may hold the address
        return False


def _addresses(settings: Settings) -> list[str]:
    return settings.alert_urls.get_secret_value().split()


def _known(settings: Settings, title: str) -> Trouble | None:
    try:
        rows = Lake.of(settings, PLATFORM).read(OPS_ALERTS, where=pc.field("title") == title).to_pylist()
    except MillraceError as error:
        log.error("whether this was said before is not known: %s", error)
        return None
    names = ("since", "last_at", "count", "sent_at")
    return Trouble(**{name: rows[0][name] for name in names}) if rows else None


def _remember(settings: Settings, alert: Alert, trouble: Trouble) -> None:
    row = {
        "title": alert.title,
        "content_hash": content_hash(trouble.last_at.isoformat(), str(trouble.count), str(trouble.sent_at)),
        "what": alert.what,
        "source": alert.source,
        "runbook": alert.runbook,
        "since": trouble.since,
        "last_at": trouble.last_at,
        "count": trouble.count,
        "sent_at": trouble.sent_at,
    }
    rows = pa.Table.from_pylist([row], schema=OPS_ALERTS.rows_schema)
    try:
        Lake.of(settings, PLATFORM).merge(OPS_ALERTS, rows, run=alert.source)
    except MillraceError as error:
        log.error("the alert could not be written down, so it may be sent again: %s", error)
