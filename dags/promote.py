"""`<application>.promote`: a release of the environment before → a person's approval → a candidate here."""

from datetime import timedelta

from airflow.sdk import DAG, AssetAlias, Param, task
from airflow.sdk.exceptions import AirflowSkipException

from millrace.applications import Application, load_applications
from millrace.settings import read_settings
from millrace_airflow import Approval, asset, run_name, stage

RUNBOOK = """
### What it does
By hand, with the `version` that a release has in the environment before (dev → staging → prod). Where `approval_in`
names this environment, a person who didn't build it is asked (*Required Actions*) and gives a reason. *bring* copies
the release with its evidence, or *rebuild* has the stage that made it make another one here, as
`[promotion.<environment>]` says. It is a candidate as any other: the gate is next, then the rollout. More, and how to
take a promotion back: `docs/promotion.md`.

### Healthy
Green, or waiting in *approve* (an alert says so). *rebuild* is skipped where the bytes were copied.

### When it fails
*ask_for*, *bring*: the message says why it can't come in (another commit runs here, another declaration, a server
refuses); put that right, then clear. *approve* timed out, or refuses who answered: clear it. A run of another DAG that
*rebuild* started and that stays queued: that DAG is paused.
"""


def promote(application: Application) -> DAG:
    releases = AssetAlias(f"{application.name}/releases")
    params = {"version": Param(None, type=["null", "string"], description="Of a release in the environment before")}
    # A promotion that waits for an answer holds up no other.
    options = {"schedule": None, "params": params, "max_active_runs": 8}
    with stage(application, "promote", RUNBOOK, tag="releases", **options) as dag:

        def ask(context: dict) -> dict:
            from millrace.environments.promotion import request

            if not context["params"]["version"]:
                raise AirflowSkipException("no version is named")
            return request(read_settings(), application, context["params"]["version"], run_id=context["run_id"])

        def record(asked: dict, said: dict) -> None:
            from millrace.environments.promotion import record_answer

            record_answer(read_settings(), application, asked["promotion"], said)

        @task
        def ask_for(**context) -> dict:
            return ask(context)

        @task(outlets=[releases])
        def bring(asked: dict, *, outlet_events) -> list[dict]:
            from millrace.environments.promotion import bring

            brought = bring(read_settings(), application, asked["promotion"], run=run_name())
            if brought["version"]:  # Also if it was here: a run that was killed may have told nobody.
                outlet_events[releases].add(asset(application.name, "releases"), extra=brought)
            return brought["rebuild"]

        @task
        def rebuild(started: dict, **context) -> None:
            from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator  # slow to import

            TriggerDagRunOperator(task_id="rebuild", skip_when_already_exists=True, **started).execute(context)

        brought = bring(asked := ask_for())
        if read_settings().environment in application.promotion.approval_in:
            hours = timedelta(hours=application.promotion.timeout_hours)
            # It asks of itself, and `bring` wants what was approved: what *ask_for* returned, an operator may rewrite.
            answer = Approval(task_id="approve", ask=ask, record=record, response_timeout=hours)
            asked >> answer >> brought
        rebuild.expand(started=brought)
    return dag


for declared in load_applications(read_settings()):
    globals()[f"{declared.name}_promote"] = promote(declared)
