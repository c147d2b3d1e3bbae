"""The one place that sends alerts: always the log, and a webhook where one is set."""

import json
import logging
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass

from millrace.settings import Settings

log = logging.getLogger("millrace.alerts")


@dataclass(frozen=True)
class Alert:
    """What happened, where, and where the runbook is."""

    title: str
    what: str
    source: str
    runbook: str


def send(alert: Alert, settings: Settings) -> None:
    """Log `alert` and POST it as JSON to the webhook. A webhook that doesn't answer is logged, never raised:
    the alert must not hide what it is about."""
    log.error("ALERT %s: %s (%s; runbook %s)", alert.title, alert.what, alert.source, alert.runbook)
    if not settings.alert_webhook:
        return
    request = urllib.request.Request(
        settings.alert_webhook, json.dumps(asdict(alert)).encode(), {"Content-Type": "application/json"}
    )
    try:
        urllib.request.urlopen(request, timeout=10).close()
    except (urllib.error.URLError, ValueError, TimeoutError) as error:
        log.error(
            "the alert webhook %s did not take it: %s; check MILLRACE_ALERT_WEBHOOK", settings.alert_webhook, error
        )
