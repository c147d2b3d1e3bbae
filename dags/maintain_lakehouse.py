"""`<application>.maintain_lakehouse`: tables compacted and vacuumed; files that nothing needs any more removed."""

from airflow.sdk import DAG, task
from airflow.timetables.trigger import CronTriggerTimetable

from millrace.applications import Application, load_applications
from millrace.settings import read_settings
from millrace_airflow import HEAVY, NO_BACKFILL, START, run_name, stage

RUNBOOK = """
### What it does
*tidy*: OPTIMIZE and VACUUM of every table, in prod of the published sample's, too. The past stays readable for the
table's declared retention, and as far back as a reader of its change feed or an index build needs (until Delta's log
forgets, at the first checkpoint after the retention: then the task log says so). *remove*: lineages
of index builds that no release with an alias searches, local copies of other releases that nobody used for a while (the
registry keeps them), event segments whose lines are all in the tables, old task logs, MLflow's traces, and the
registry's files of releases that have answered nobody for half a year (`[retention]` of the declaration). Airflow's own
history is the part *airflow-history*'s, which has the database's address: `MILLRACE_AIRFLOW_HISTORY_DAYS`.
*describe* writes down what this environment is, for `millrace env diff`. *forget*: what a `millrace erase` has left.

### Healthy
Green every night. `kept_hours` in the result of *tidy* far above a table's retention: a reader lags behind; see
`ops/cursors` for which.

### When it fails
*forget*: the message names each user who is not wholly erased yet, and why; the others are.
*tidy*: the message names the table and why; the others were done. *remove*: MLflow or a model server doesn't
answer; the rest was removed. Clear either any time: what is done is not done again. A full disk: free some space
first, a compaction writes before it removes.

### Backfill
Airflow refuses one: every run tidies what is there now, and no day is owed one. Trigger it once.
"""


def maintain_lakehouse(application: Application) -> DAG:
    with stage(
        application,
        "maintain_lakehouse",
        RUNBOOK,
        tag="upkeep",
        schedule=CronTriggerTimetable(application.schedules.maintain_lakehouse, timezone="UTC"),
        start_date=START,
        **NO_BACKFILL,
    ) as dag:

        @task(pool=HEAVY, queue=HEAVY)
        def tidy() -> dict:
            from millrace.upkeep import tidy_tables

            return tidy_tables(read_settings(), application)

        @task
        def remove() -> dict:
            from millrace.upkeep import remove_unused

            return remove_unused(read_settings(), application)

        @task(pool=HEAVY, queue=HEAVY)
        def forget() -> list:
            from millrace.environments.erasure import finish_erasures

            return finish_erasures(read_settings(), application, run=run_name())

        @task
        def describe() -> None:
            from millrace.environments.description import record_description

            record_description(read_settings(), run=run_name())

        tidy()
        remove()
        describe()
        forget()
    return dag


for declared in load_applications(read_settings()):
    globals()[f"{declared.name}_maintain_lakehouse"] = maintain_lakehouse(declared)
