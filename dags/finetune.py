"""`<application>.finetune`: training set → DeepSpeed fine-tune → candidate release."""

from datetime import timedelta

from airflow.sdk import DAG, AssetAlias, Param, task
from airflow.timetables.assets import AssetOrTimeSchedule
from airflow.timetables.trigger import CronTriggerTimetable

from millrace.applications import Application, load_applications
from millrace.settings import read_settings
from millrace_airflow import HEAVY, asset, run_name, stage

BELATED = timedelta(minutes=10)
"""How long after its time the very first run may still start; a parse in between would else skip a week."""
RUNBOOK = """
### What it does
Writes a training set, none of it near an evaluation question: answers (sft: documents' questions and users'
corrections, `gold/training_examples`) or preferences (dpo: corrections and ratings, `gold/preference_examples`). Trains
with DeepSpeed (curves in MLflow, experiment `<application>/finetune`), writes the result in the base model's format,
registers it as a candidate release. The gate comes next, by itself. What the form says overrides `[training]`.

### Healthy
Green once a week, and after a breach whose action is retrain. The same set and configuration give the same version.

### When it fails
*build_set*: too few examples (counted: what was left out and why), no index build, or a leak. *train*: the message says
why; logs and the last checkpoint are in `<home>/training`. *release*: the exported file doesn't answer like the trained
model, or MLflow doesn't answer. Clear the task: it goes on from the checkpoint. Safe to clear any time.

### Backfill
There is none: a training set is made of what is there now. Trigger it once.
"""


def finetune(application: Application) -> DAG:
    releases = AssetAlias(f"{application.name}/releases")
    with stage(
        application,
        "finetune",
        RUNBOOK,
        tag="releases",
        # Not a data interval: a weekly one is due the moment it is unpaused, on documents that are not there yet.
        schedule=AssetOrTimeSchedule(
            timetable=CronTriggerTimetable(application.schedules.finetune, timezone="UTC", run_immediately=BELATED),
            assets=[asset(application.name, "breaches/retrain")],
        ),
        params={
            "max_examples": Param(None, type=["null", "integer"], minimum=8, description="Empty: as declared"),
            "method": Param(None, enum=[None, "sft", "dpo"], description="Answers or preferences; empty: as declared"),
        },
    ) as dag:

        @task
        def build_set(*, params: dict) -> dict:
            from millrace.training import finetune

            return finetune.build_set(read_settings(), application, run=run_name(), **params)

        @task(pool=HEAVY)
        def train(built: dict) -> dict:
            from millrace.training import finetune

            return finetune.finetune(read_settings(), application, training_set=built["training_set"], run=run_name())

        @task(pool=HEAVY, outlets=[releases])
        def release(trained: dict, *, outlet_events) -> dict:
            from millrace.training.candidate import release_candidate

            released = release_candidate(read_settings(), application, trained=trained, run=run_name())
            if released["changed"]:
                outlet_events[releases].add(asset(application.name, "releases"), extra=released)
            return released

        release(train(build_set()))
    return dag


for declared in load_applications(read_settings()):
    globals()[f"{declared.name}_finetune"] = finetune(declared)
