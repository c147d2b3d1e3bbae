"""`millrace run`: the stack, the story on it, the report, and then it keeps serving. Knows no stage and no page."""

from dataclasses import dataclass

import httpx
from rich.console import Console

from millrace.airflow_api import Airflow
from millrace.applications import load_application
from millrace.demo.memory import MemoryPeak
from millrace.demo.progress import Progress
from millrace.demo.report import build_report, write_report
from millrace.demo.story import STAGES, Story
from millrace.errors import MillraceError
from millrace.settings import Settings


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
    with MemoryPeak() as memory, Progress(STAGES, console) as progress:
        story = Story(settings, application, airflow, progress)
        try:
            story.tell()
        except (MillraceError, httpx.HTTPError) as error:
            failure = str(error)
    report = build_report(settings, application, progress.stages, story.started, memory_peak_bytes=memory.bytes or None)
    _, page = write_report(settings, report)
    return Told(report.headline, str(page), failure)
