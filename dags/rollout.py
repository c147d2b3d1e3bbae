"""`<application>.rollout`: journal and evidence → at most one decision → the split that the gateway follows."""

from airflow.sdk import DAG, AssetAlias, get_current_context, task
from airflow.timetables.assets import AssetOrTimeSchedule
from airflow.timetables.trigger import CronTriggerTimetable

from millrace.applications import Application, load_applications
from millrace.settings import read_settings
from millrace_airflow import NO_BACKFILL, START, asset, run_name, stage

RUNBOOK = """
### What it does
One tick of the controller: starts the candidate that has waited longest, compares challenger and champion by users'
first exposures, and advances, holds, promotes or rolls back, one decision a tick, each a row of `ops/decisions`
with its evidence. Runs every few minutes, and as soon as feedback, a verdict of the gate or a breach arrives.

### Healthy
Green; `millrace status` shows champion, challenger and the last decision. A rollout that holds for days is healthy
while labels are late: the reason of its last `hold` says what is still open. Only users' *first* exposures count, so
where everybody has been met already nothing more can be learnt: skip or roll back by hand.

### When it alerts
*rolled back*: the challenger was worse; the reason names what, by how much, on how many users. It does not start
again unless a person admits it. Decided by `monitor`: the release breached a bound whose action is rollback; without
a challenger the champion before is back.
*frozen*, users are not assigned as declared: exchanges of one arm get lost on the way; look at the gateway's log.
*frozen*, who rates differs between the arms: the reason gives bounds; nothing else can be known from ratings.
*frozen*, moved by hand: somebody changed the tag or the alias `champion`; nothing was undone.
After a freeze: `millrace rollout resume`, `skip` or `back`, with a reason.

### When it fails
The registry or the lake does not answer. Clear the task any time: what was decided stands in the journal, and the
next tick publishes it.

### Backfill
Airflow refuses one: a tick decides on what is known now, and what was decided is never decided again. Trigger it once;
the journal, `ops/decisions`, has the past.
"""


def rollout(application: Application) -> DAG:
    registered = AssetAlias(f"{application.name}/releases")
    with stage(
        application,
        "rollout",
        RUNBOOK,
        tag="rollout",
        schedule=AssetOrTimeSchedule(
            timetable=CronTriggerTimetable(application.schedules.rollout, timezone="UTC"),
            assets=(
                asset(application.name, "silver/feedback")
                | asset(application.name, "promotions")
                | asset(application.name, "breaches/rollback")
            ),
        ),
        start_date=START,
        **NO_BACKFILL,
    ) as dag:

        @task(outlets=[registered])
        def tick(*, outlet_events) -> dict:
            from millrace.rollout import controller

            decided = controller.tick(read_settings(), application, run=run_name())
            # Who waited has to be evaluated against the new champion. A try that died told nobody.
            if decided["decision"] == "promote" or get_current_context()["ti"].try_number > 1:
                outlet_events[registered].add(asset(application.name, "releases"))
            return decided

        tick()
    return dag


for declared in load_applications(read_settings()):
    globals()[f"{declared.name}_rollout"] = rollout(declared)
