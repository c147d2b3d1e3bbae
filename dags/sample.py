"""`<application>.sample`: prod's tables → a part of them, with nobody's name in it, as staging's. In staging only."""

from airflow.sdk import DAG, AssetAlias, task
from airflow.timetables.trigger import CronTriggerTimetable

from millrace.applications import Application, load_applications
from millrace.settings import read_settings
from millrace_airflow import NO_BACKFILL, START, asset, run_name, stage

RUNBOOK = """
### What it does
Brings prod's evaluation sets, then the sample of its documents (`[sample]` of the declaration) and their chunks, and
the sample of its exchanges and feedback: users hashed again, free text scrubbed. Which rows are in is a hash's word,
the same for every run. What was deleted in prod goes here, too. From there on staging runs what prod runs.

### Healthy
Green every night, within minutes; a run that finds prod's tables as they were reads its evaluation sets only. `strata`
in the result of *exchanges* says how many were taken of how many.

### When it fails
*documents*: prod has none, or staging's credential can't read them; the message names the table. Staging's tables stay
as they were. *chunk*: the Spark Connect server doesn't answer; `millrace status`, then clear the task.
Safe to clear any time.

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
            from millrace.environments.sample import sample_evaluation_sets

            return sample_evaluation_sets(read_settings(), application, run=run_name())

        @task
        def documents() -> dict:
            from millrace.environments.sample import sample_documents

            return sample_documents(read_settings(), application, run=run_name())

        @task(outlets=[AssetAlias(f"{application.name}/silver/chunks")])
        def chunk(*, outlet_events) -> None:
            from millrace.retrieval.chunk import refresh_chunks

            if (written := refresh_chunks(read_settings(), application, run=run_name()))["changed"]:
                chunks = asset(application.name, "silver/chunks")
                outlet_events[AssetAlias(f"{application.name}/silver/chunks")].add(chunks, extra=written)

        @task(outlets=[AssetAlias(f"{application.name}/silver/feedback")])
        def exchanges(*, outlet_events) -> dict:
            from millrace.environments.sample import sample_exchanges

            if (taken := sample_exchanges(read_settings(), application, run=run_name()))["changed"]:
                feedback = asset(application.name, "silver/feedback")
                outlet_events[AssetAlias(f"{application.name}/silver/feedback")].add(feedback, extra=taken)
            return taken

        evaluation_sets() >> documents() >> chunk()
        exchanges()
    return dag


if read_settings().environment == "staging":
    for declared in load_applications(read_settings()):
        globals()[f"{declared.name}_sample"] = sample(declared)
