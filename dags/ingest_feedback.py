"""`<application>.ingest_feedback`: the gateway's event log → bronze events → silver exchanges and feedback."""

from airflow.sdk import DAG, AssetAlias, task
from airflow.timetables.interval import CronDataIntervalTimetable

from millrace.applications import Application, load_applications
from millrace.settings import read_settings
from millrace_airflow import START, announce, interval, run_name, stage

RUNBOOK = """
### What it does
Lands the gateway's events of the run's data interval in `bronze/events`, then brings `silver/exchanges` and
`silver/feedback` up to date for every completion that the interval touched. Great Expectations keeps what is out of
range, forged or unreadable in `quarantine/feedback`, with the reason. Only a change updates the feedback asset.

### Healthy
Green for every interval, within seconds; `quarantined` in the tasks' results is 0.

### When it fails
*land*: a segment of the event log can't be read; the message names it. *refine*: other runs kept committing first;
clear the task. Both are safe to clear, retry and run in any order: the tables come out the same.

### Backfill
`millrace backfill <application>.ingest_feedback --from … --to … --at-once 3`, or *Backfill* of Airflow's *Trigger*;
with `--missing` intervals that have a run are skipped. It may run beside the schedule. A run reads the event log of its
own interval and `bronze/events`; `maintain_lakehouse` removes an old segment only once all its lines are in the tables,
so any interval can be made again.
"""


def ingest_feedback(application: Application) -> DAG:
    with stage(
        application,
        "ingest_feedback",
        RUNBOOK,
        tag="feedback",
        schedule=CronDataIntervalTimetable(application.schedules.ingest_feedback, timezone="UTC"),
        start_date=START,
        max_active_runs=4,
    ) as dag:

        @task
        def land() -> dict:
            from millrace.sources.feedback import land_events

            return land_events(read_settings(), application, *interval(), run=run_name())

        @task(outlets=[AssetAlias(f"{application.name}/silver/feedback")])
        def refine(*, outlet_events) -> dict:
            from millrace.sources.feedback import refine_feedback

            written = refine_feedback(read_settings(), application, *interval(), run=run_name())
            announce(outlet_events, application, "silver/feedback", written)
            return written

        land() >> refine()
    return dag


for declared in load_applications(read_settings()):
    globals()[f"{declared.name}_ingest_feedback"] = ingest_feedback(declared)
