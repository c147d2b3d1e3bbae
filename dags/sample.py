"""`<application>.sample`: the sample that prod published → staging's tables. In staging only."""

from airflow.sdk import DAG, AssetAlias, task
from airflow.timetables.trigger import CronTriggerTimetable

from millrace.applications import Application, load_applications
from millrace.settings import read_settings
from millrace_airflow import NO_BACKFILL, START, announce, run_name, stage

RUNBOOK = """
### What it does
Brings what prod's `<application>.publish_sample` published: the evaluation sets, documents and their chunks, exchanges
and feedback. Staging's credential reads nothing else of prod. What went from there goes here, too; what staging's own
gateway brought stays. From there on staging runs what prod runs.

### Healthy
Green every night, within minutes; a run that finds the sample as it was reads its evaluation sets only.

### When it fails
A table isn't published, or staging's credential can't read it: the message names it, and staging's tables stay as they
were; run `<application>.publish_sample` in prod, then clear the task. *chunk*: the Spark Connect server doesn't answer;
`millrace status`, then clear the task. Safe to clear any time.

### Backfill
Airflow refuses one: every run takes what prod has now, whichever day it is for. Trigger it once.
"""


def sample(application: Application) -> DAG:
    with stage(
        application,
        "sample",
        RUNBOOK,
        tag="documents",
        schedule=CronTriggerTimetable(application.schedules.sample, timezone="UTC"),
        start_date=START,
        **NO_BACKFILL,
    ) as dag:

        @task
        def evaluation_sets() -> dict:
            from millrace.environments.sample_copy import copy_evaluation_sets

            return copy_evaluation_sets(read_settings(), application, run=run_name())

        @task
        def documents() -> dict:
            from millrace.environments.sample_copy import copy_documents

            return copy_documents(read_settings(), application, run=run_name())

        @task(outlets=[AssetAlias(f"{application.name}/silver/chunks")])
        def chunk(*, outlet_events) -> None:
            from millrace.retrieval.chunk import refresh_chunks

            written = refresh_chunks(read_settings(), application, run=run_name())
            announce(outlet_events, application, "silver/chunks", written)

        @task(outlets=[AssetAlias(f"{application.name}/silver/feedback")])
        def exchanges(*, outlet_events) -> dict:
            from millrace.environments.sample_copy import copy_exchanges

            brought = copy_exchanges(read_settings(), application, run=run_name())
            announce(outlet_events, application, "silver/feedback", brought)
            return brought

        evaluation_sets() >> documents() >> chunk()
        exchanges()
    return dag


if read_settings().environment == "staging":
    for declared in load_applications(read_settings()):
        globals()[f"{declared.name}_sample"] = sample(declared)
