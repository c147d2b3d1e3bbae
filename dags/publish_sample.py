"""`<application>.publish_sample`: prod's tables → a part with nobody's name in it, for staging. In prod only."""

from airflow.sdk import DAG, task
from airflow.timetables.trigger import CronTriggerTimetable

from millrace.applications import Application, load_applications
from millrace.settings import read_settings
from millrace_airflow import NO_BACKFILL, START, run_name, stage

RUNBOOK = """
### What it does
Publishes the evaluation sets, the sample of the documents (`[sample]` of the declaration), and the sample of exchanges
and feedback: users hashed again, free text scrubbed. It goes to `sample/` in the lake, beside the environments, which
is all that staging's credential reads of prod. Which rows are in is a hash's word, the same for every run. What was
deleted in prod goes from there, too. Staging's `<application>.sample` brings it over.

### Healthy
Green every night, within minutes; a run that finds the tables as they were reads the evaluation sets only. `strata` in
the result of *exchanges* says how many were taken of how many.

### When it fails
*documents*: prod has none; run `<application>.ingest_documents`. *exchanges*: the message names the setting or the
table. What was published before stays, and staging goes on with that. Safe to clear any time.

### Backfill
Airflow refuses one: every run publishes what prod has now, whichever day it is for. Trigger it once.
"""


def publish_sample(application: Application) -> DAG:
    with stage(
        application,
        "publish_sample",
        RUNBOOK,
        tag="documents",
        schedule=CronTriggerTimetable(application.schedules.publish_sample, timezone="UTC"),
        start_date=START,
        **NO_BACKFILL,
    ) as dag:

        @task
        def evaluation_sets() -> dict:
            from millrace.environments.sample import publish_evaluation_sets

            return publish_evaluation_sets(read_settings(), application, run=run_name())

        @task
        def documents() -> dict:
            from millrace.environments.sample import publish_documents

            return publish_documents(read_settings(), application, run=run_name())

        @task
        def exchanges() -> dict:
            from millrace.environments.sample import publish_exchanges

            return publish_exchanges(read_settings(), application, run=run_name())

        evaluation_sets()
        documents()
        exchanges()
    return dag


if read_settings().environment == "prod":
    for declared in load_applications(read_settings()):
        globals()[f"{declared.name}_publish_sample"] = publish_sample(declared)
