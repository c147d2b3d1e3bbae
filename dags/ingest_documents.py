"""`<application>.ingest_documents`: sources → bronze → silver documents → chunks."""

from airflow.sdk import DAG, AssetAlias, task
from airflow.timetables.interval import CronDataIntervalTimetable

from millrace.applications import Application, load_applications
from millrace.settings import read_settings
from millrace_airflow import START, asset, run_name, stage

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
A source says what is there now, so a backfill of any day reads today's documents: one run is as good.
"""


def ingest_documents(application: Application) -> DAG:
    with stage(
        application,
        "ingest_documents",
        RUNBOOK,
        tag="documents",
        schedule=CronDataIntervalTimetable(application.schedules.ingest_documents, timezone="UTC"),
        start_date=START,
    ) as dag:

        @task
        def land() -> dict:
            from millrace.sources.ingest import land_documents

            return land_documents(read_settings(), application, run=run_name())

        @task
        def refine() -> dict:
            from millrace.sources.ingest import refine_documents

            return refine_documents(read_settings(), application, run=run_name())

        @task(outlets=[AssetAlias(f"{application.name}/silver/chunks")])
        def chunk(*, outlet_events) -> dict:
            from millrace.retrieval.chunk import refresh_chunks

            written = refresh_chunks(read_settings(), application, run=run_name())
            if written["changed"]:
                outlet_events[AssetAlias(f"{application.name}/silver/chunks")].add(
                    asset(application.name, "silver/chunks"), extra=written
                )
            return written

        land() >> refine() >> chunk()
    return dag


for declared in load_applications(read_settings()):
    globals()[f"{declared.name}_ingest_documents"] = ingest_documents(declared)
