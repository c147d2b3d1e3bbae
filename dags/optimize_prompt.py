"""`<application>.optimize_prompt`: development questions → a study of prompts → candidate release, if one is better."""

from airflow.sdk import DAG, AssetAlias, Param, task
from airflow.timetables.trigger import CronTriggerTimetable

from millrace.applications import Application, load_applications
from millrace.settings import read_settings
from millrace_airflow import HEAVY, NO_BACKFILL, announce, run_name, stage

RUNBOOK = """
### What it does
An Optuna study around the champion: which template (its own, declared variants, general ones), how many chunks, which
worked examples and which generation config answer development questions best. Trials that are losing are ended early;
tokens are counted against a budget. The best then meets the champion's own prompt on held-out development questions,
once: if the interval of the difference excludes 0, it becomes a candidate release. The gate comes next, by itself.
No evaluation or live question is asked. By hand: trigger with `trials` and `token_budget`; empty is as declared in
`[optimize]`. Every trial is a row of `ops/prompt_trials`, every study a run in MLflow, `<application>/prompts`.

### Healthy
Green once a week. Most weeks nothing is registered: the log of *study* says with an interval that no prompt was
better, or that champion, documents and index build are those of a study that was held already.

### When it fails
*study*: too few development questions, a declared template that can't be used, a budget that doesn't cover the
champion's own prompt, or every trial failed: the message names which, and the first reason. A generator or an MLflow
that doesn't answer: clear the task, it continues behind its last trial. *release*: MLflow doesn't answer; clear it,
nothing is answered again. Safe to clear any time.

### Backfill
Airflow refuses one: a study reads what is there now, whichever week a run is for, and the second would find it held.
Trigger it once.
"""


def optimize_prompt(application: Application) -> DAG:
    releases = AssetAlias(f"{application.name}/releases")
    with stage(
        application,
        "optimize_prompt",
        RUNBOOK,
        tag="releases",
        schedule=CronTriggerTimetable(application.schedules.optimize_prompt, timezone="UTC"),
        **NO_BACKFILL,
        params={
            "trials": Param(
                None, type=["null", "integer"], minimum=1, maximum=500, description="Prompts to try; empty: as declared"
            ),
            "token_budget": Param(
                None, type=["null", "integer"], minimum=1000, description="Tokens to spend; empty: as declared"
            ),
        },
    ) as dag:

        @task(pool=HEAVY, queue=HEAVY)
        def study(*, params: dict) -> dict:
            from millrace.prompts.optimize import optimize_prompt as optimize

            limits = {name: params[name] for name in ("trials", "token_budget")}
            return optimize(read_settings(), application, run=run_name(), **limits)

        @task(outlets=[releases])
        def release(result: dict, *, params: dict, outlet_events) -> dict:
            from millrace.prompts.optimize import release_best

            released = release_best(read_settings(), application, result=result, run=run_name(), form=params)
            announce(outlet_events, application, "releases", released)
            return released

        release(study())
    return dag


for declared in load_applications(read_settings()):
    globals()[f"{declared.name}_optimize_prompt"] = optimize_prompt(declared)
