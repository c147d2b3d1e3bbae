"""`millrace run`: the stack, the story on it, the report, and then it keeps serving. Knows no stage and no page."""

import getpass
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import httpx
from pydantic import SecretStr
from rich.console import Console

from millrace.airflow_api import Airflow
from millrace.applications import load_application
from millrace.demo.memory import MemoryPeak
from millrace.demo.progress import Progress
from millrace.demo.report import build_report, write_report
from millrace.demo.story import STAGES, Story
from millrace.errors import MillraceError
from millrace.serving.key_store import KeyStore
from millrace.settings import Settings
from millrace.sources.event_log import now


@dataclass(frozen=True)
class Told:
    """How a story ended. `failure` is None if every stage did its work."""

    headline: str
    page: str
    failure: str | None


def tell_story(settings: Settings, application_name: str, airflow: Airflow, console: Console) -> Told:
    """One turn of the loop on a running stack, and its report, which is written whatever happened.

    Raises:
        MillraceError: the application isn't declared, or the report can't be written.
    """
    application = load_application(settings, application_name)
    failure = None
    with (
        MemoryPeak() as memory,
        Progress(STAGES, console) as progress,
        _keyed(settings, application_name) as keyed,
    ):
        story = Story(keyed, application, airflow, progress)
        try:
            story.tell()
        except (MillraceError, httpx.HTTPError) as error:
            failure = str(error)
    report = build_report(settings, application, progress.stages, story.started, memory_peak_bytes=memory.bytes or None)
    _, page = write_report(settings, report)
    return Told(report.headline, str(page), failure)


@contextmanager
def _keyed(settings: Settings, application: str) -> Iterator[Settings]:
    """`settings` with an API key for the simulated users, where the gateway requires one and they name none. It ends
    with the block."""
    if not settings.keys_required or settings.api_key.get_secret_value():
        yield settings
        return
    store, actor = KeyStore(settings), getpass.getuser()
    key, written = store.create(
        "simulated users",
        owner="millrace run",
        scopes=("ask", "feedback"),
        applications=(application,),
        requests_per_minute=None,
        monthly_budget_usd=None,
        expires_at=now() + timedelta(days=1),
        actor=actor,
    )
    try:
        yield settings.model_copy(update={"api_key": SecretStr(written)})
    finally:
        store.revoke(key.id, actor=actor, reason="the run is over")
        store.close()
