"""`millrace backfill`: past intervals of a stage, run now. What a run of the past does, its DAG's runbook says."""

from datetime import UTC, datetime
from typing import Annotated

import typer

from millrace.cli.terminal import console, one_sentence
from millrace.settings import read_settings
from millrace.stack import airflow_of


def backfill_command(
    dag: Annotated[str, typer.Argument(help="<application>.<stage>, like qa.ingest_feedback.")],
    start: Annotated[datetime, typer.Option("--from", help="Where the first interval begins, UTC.")],
    end: Annotated[datetime, typer.Option("--to", help="Where the last interval begins at the latest, UTC.")],
    missing: Annotated[bool, typer.Option("--missing", help="Not the intervals that have a run already.")] = False,
    at_once: Annotated[int, typer.Option(min=1, help="Runs beside one another, whatever the DAG's own limit.")] = 2,
) -> None:
    """Run every interval of a stage between two moments, also those that have a run; Airflow goes on by itself."""
    with one_sentence():
        settings = read_settings()
        with airflow_of(settings) as airflow:
            reprocess = "none" if missing else "completed"
            made = airflow.backfill(dag, *map(_utc, (start, end)), reprocess=reprocess, at_once=at_once)
    console.print(f"backfill {made} of {dag} has begun: {settings.airflow_url}/dags/{dag}/backfills", soft_wrap=True)


def _utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=moment.tzinfo or UTC)
