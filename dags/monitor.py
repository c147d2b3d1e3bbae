"""`<application>.monitor`: metrics of each window → drift → bounds; a breach alerts and starts what the policy asks."""

from datetime import UTC, datetime

from airflow.sdk import DAG, AssetAlias, task
from airflow.timetables.interval import CronDataIntervalTimetable

from millrace.applications import Application, load_applications
from millrace.settings import read_settings
from millrace_airflow import START, asset, failed, interval, known_before, run_name, stage, succeeded

RUNBOOK = """
### What it does
Measures every window (an hour, `[monitor] minutes`) that the run's interval touches, and every one in which something
arrived late, into `gold/metrics_hourly`, per release and index build; compares users' questions and releases' answers
with the week before (`gold/drift_hourly`); holds windows that are over against `[monitor] bounds`. A breach is a row
of `ops/breaches`: it alerts once, and starts `finetune` (retrain), `refresh_embeddings` (reembed) or `rollout`
(rollback) by an asset, if the release still answers users. What a backfill finds in windows older than a day is only
written down. Failures count by users, each by the last exchange, and those that the champion answered for a challenger
against the challenger. *health* alerts of ingestion that missed its last intervals, of runs that failed without a word,
and of a disk that is nearly full; it sends alerts again that reached nobody.

### Healthy
Green for every interval, within seconds, whatever the history; no new breaches. *too few* users is no finding.
### When it alerts
*rollback*: the next tick of `rollout` takes the release back, unless it is frozen. *drift* says that users or answers
differ, not that they are worse: look at ratings. A bound that is always breached is wrong.
### When it fails
Nothing is lost: late windows stay due until the last task is green. Clear it any time; tables come out the same.
### Backfill
`millrace backfill <application>.monitor --from … --to …`, or *Backfill* of Airflow's *Trigger*: measures the windows of
the intervals again, after a backfill of `ingest_feedback`, beside the schedule.
"""


def monitor(application: Application) -> DAG:
    breaches = AssetAlias(f"{application.name}/breaches")
    timetable = CronDataIntervalTimetable(application.schedules.monitor, timezone="UTC")
    with stage(application, "monitor", RUNBOOK, tag="monitoring", schedule=timetable, start_date=START) as dag:

        @task
        def metrics() -> dict:
            from millrace.monitoring.metrics import measure

            return measure(read_settings(), application, *interval(), run=run_name())

        @task
        def drift(measured: dict) -> dict:
            from millrace.monitoring.drift import measure_drift

            return measure_drift(read_settings(), application, measured, run=run_name(), now=datetime.now(UTC))

        @task(outlets=[breaches])
        def bounds(measured: dict, *, outlet_events) -> dict:
            from millrace.monitoring.watch import check

            checked = check(read_settings(), application, measured, run=run_name(), now=datetime.now(UTC))
            for action in checked["actions"]:
                outlet_events[breaches].add(asset(application.name, f"breaches/{action}"), extra=checked)
            return checked

        @task
        def health() -> dict:
            from millrace.monitoring.health import check_health

            now = datetime.now(UTC)
            return check_health(read_settings(), application, succeeded, failed, before=known_before(), now=now)

        measured = metrics()
        drift(measured) >> bounds(measured)
        health()
    return dag


for declared in load_applications(read_settings()):
    globals()[f"{declared.name}_monitor"] = monitor(declared)
