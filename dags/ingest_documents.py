"""`<application>.ingest_documents`: sources → bronze → silver documents → chunks."""

from airflow.sdk import DAG, AssetAlias, task
from airflow.timetables.interval import CronDataIntervalTimetable

from millrace.applications import Application, load_applications
from millrace.settings import read_settings
from millrace_airflow import START, announce, run_name, stage

RUNBOOK = """
### What it does
Reads every declared source, keeps what arrived in `bronze/documents`, brings `silver/documents` to the
sources' current state and cuts it into `silver/chunks`. Content decides: a run that finds nothing new writes nothing.

### Healthy
Green every night; the chunks asset is updated only when a document changed.

### When it fails
*land*: a source can't be read, or is empty; the message names it. Nothing was removed: deletions are applied only
after a complete read. *refine*: documents that aren't text are left out, not fatal: the log names them, the result
counts them. *chunk*: the Spark Connect server doesn't answer; `millrace status`, then clear the task.
Safe to clear any time.

### Backfill
`millrace backfill <application>.ingest_documents --from … --to …`, or *Backfill* of Airflow's *Trigger*.
A source says what is there now, not what was there then: whichever day a run is for, it brings the tables to the
sources' state of the moment it runs in. So one run is as good, and each further one finds nothing new and writes
nothing. What documents were stands in `bronze/documents` (`observed_at`), as far back as runs looked. Its runs take
turns at each task, those of the schedule too.
"""


def ingest_documents(application: Application) -> DAG:
    # A backfill passes over max_active_runs, and two that land at once would both keep what is new.
    turns = {"max_active_tis_per_dag": 1}
    with stage(
        application,
        "ingest_documents",
        RUNBOOK,
        tag="documents",
        schedule=CronDataIntervalTimetable(application.schedules.ingest_documents, timezone="UTC"),
        start_date=START,
    ) as dag:

        @task(**turns)
        def land() -> dict:
            from millrace.sources.ingest import land_documents

            return land_documents(read_settings(), application, run=run_name())

        @task(**turns)
        def refine() -> dict:
            from millrace.sources.ingest import refine_documents

            return refine_documents(read_settings(), application, run=run_name())

        @task(outlets=[AssetAlias(f"{application.name}/silver/chunks")], **turns)
        def chunk(*, outlet_events) -> dict:
            from millrace.retrieval.chunk import refresh_chunks

            written = refresh_chunks(read_settings(), application, run=run_name())
            announce(outlet_events, application, "silver/chunks", written)
            return written

        land() >> refine() >> chunk()
    return dag


for declared in load_applications(read_settings()):
    globals()[f"{declared.name}_ingest_documents"] = ingest_documents(declared)
