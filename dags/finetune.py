"""`<application>.finetune`: training set → DeepSpeed fine-tune → candidate release."""

from datetime import timedelta

from airflow.sdk import DAG, AssetAlias, Param, task
from airflow.sdk.exceptions import AirflowSkipException
from airflow.timetables.assets import AssetOrTimeSchedule
from airflow.timetables.trigger import CronTriggerTimetable

from millrace.applications import Application, load_applications
from millrace.settings import read_settings
from millrace_airflow import HEAVY, NO_BACKFILL, announce, asset, run_name, stage

BELATED = timedelta(minutes=10)  # of the very first run; a parse in between would else skip a week
RUNBOOK = """
### What it does
Writes a training set, none of it near an evaluation question: answers (sft: documents', users', a teacher's;
`gold/training_examples`) or preferences (dpo: corrections and ratings, `gold/preference_examples`). Trains the base
model or the champion's weights with DeepSpeed (curves in MLflow, experiment `<application>/finetune`), registers the
result as a candidate release. The gate comes next, by itself. What the form says overrides `[training]`.

### Healthy
Green once a week, and after a breach whose action is retrain. The same set and configuration give the same version.
Skipped: training goes on from the champion, and there is too little that it hasn't learnt.

### When it fails
*build_set*: too few examples (counted: what was left out and why), no index build, or a leak. *train*: the message says
why; logs and the last checkpoint are in `<home>/training`. *release*: the exported file doesn't answer like the trained
model, or MLflow doesn't answer. Clear the task: it goes on from the checkpoint. Safe to clear any time.

### Backfill
Airflow refuses one: a training set is made of what is there now, whichever week a run is for. Trigger it once.
"""


def finetune(application: Application) -> DAG:
    releases = AssetAlias(f"{application.name}/releases")
    # Not a data interval: a weekly one is due the moment it is unpaused, on documents that are not there yet.
    weekly = CronTriggerTimetable(application.schedules.finetune, timezone="UTC", run_immediately=BELATED)
    params = {
        "max_examples": Param(None, type=["null", "integer"], minimum=8, description="Empty: as declared"),
        "method": Param(None, enum=[None, "sft", "dpo"], description="Answers or preferences; empty: as declared"),
        "start": Param(None, enum=[None, "base", "champion"], description="What is trained; empty: as declared"),
        "teacher": Param(None, type=["null", "string"], description="Learn the answers of this version, or `champion`"),
        "remove_blocks": Param(0, type="integer", minimum=0, description="Prune so many blocks before training"),
    }
    due = AssetOrTimeSchedule(timetable=weekly, assets=[asset(application.name, "breaches/retrain")])
    with stage(application, "finetune", RUNBOOK, tag="releases", schedule=due, params=params, **NO_BACKFILL) as dag:

        @task
        def build_set(*, params: dict) -> dict:
            from millrace.training.finetune import build_set

            built = build_set(read_settings(), application, run=run_name(), **params)
            if built["training_set"] is None:
                raise AirflowSkipException(built["why"])
            return built

        @task(pool=HEAVY, queue=HEAVY)
        def train(built: dict) -> dict:
            from millrace.training.finetune import finetune

            return finetune(read_settings(), application, run=run_name(), **built["learns"])

        @task(pool=HEAVY, queue=HEAVY, outlets=[releases])
        def release(trained: dict, *, params: dict, outlet_events) -> dict:
            from millrace.training.candidate import release_candidate

            released = release_candidate(read_settings(), application, trained=trained, run=run_name(), form=params)
            announce(outlet_events, application, "releases", released)
            return released

        release(train(build_set()))
    return dag


for declared in load_applications(read_settings()):
    globals()[f"{declared.name}_finetune"] = finetune(declared)
