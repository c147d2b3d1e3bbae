"""`<application>.promote`: a release of the environment before comes in; one that passed the gate may roll out."""

from datetime import timedelta

from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator
from airflow.sdk import DAG, AssetAlias, Param, task
from airflow.sdk.exceptions import AirflowSkipException

from millrace.applications import Application, load_applications
from millrace.settings import read_settings
from millrace_airflow import START, AlertNotifier, asset, run_name, stage

ASKS, TOLD = ("{{ ti.xcom_pull(task_ids='choose')['" + name + "'] }}" for name in ("asks", "told"))
RUNBOOK = """
### What it does
By hand with `version`, of the environment before: *bring* copies it with its evidence, or *rebuild* makes it again here
(`[promotion.<environment>]`); the gate is next. After a passed evaluation: it may roll out. Where `approval_in` says
so, a person who didn't build it is asked first, with a reason (*Required Actions*); see `docs/promotion.md`.
### Healthy
Green, or waiting in *approve* (an alert says so, and reminds). Skipped: nothing waits, or nothing is to be rebuilt.
### When it fails
*approve* timed out, or *record* refuses who answered: clear *approve*. *choose*, *bring*: the message says why it can't
come in (another commit runs here, another declaration, a server refuses); put that right, then clear.
"""


def promote(application: Application) -> DAG:
    asks = read_settings().environment in application.promotion.approval_in
    promotions, alias = asset(application.name, "promotions"), AssetAlias(f"{application.name}/releases")
    params = {"version": Param(None, type=["null", "string"], description="Of the environment before, to bring here")}
    options = {"schedule": [asset(application.name, "evaluations")], "start_date": START, "params": params}
    with stage(application, "promote", RUNBOOK, tag="releases", **options) as dag:

        @task(outlets=[] if asks else [promotions])
        def choose(*, params: dict, run_id: str) -> dict:
            from millrace.environments.promotion import request
            from millrace.rollout.promotion import next_promotion

            if params["version"]:
                return request(read_settings(), application, params["version"], run_id=run_id)
            if waiting := next_promotion(read_settings(), application):
                return waiting
            raise AirflowSkipException("no release that passed the gate waits for an answer")

        @task(outlets=[promotions], retries=0)
        def record(waiting: dict, said: dict) -> None:
            from millrace.environments.promotion import record_answer
            from millrace.rollout.promotion import record_approval

            act = record_answer if "promotion" in waiting else record_approval
            act(read_settings(), application, waiting.get("promotion") or waiting["candidate"], said)

        @task(outlets=[alias])
        def bring(waiting: dict, *, outlet_events) -> list[dict]:
            from millrace.environments.promotion import bring

            if "promotion" not in waiting:
                raise AirflowSkipException("the release is here")
            brought = bring(read_settings(), application, waiting["promotion"], run=run_name())
            if brought["changed"]:
                outlet_events[alias].add(asset(application.name, "releases"), extra=brought)
            return brought["rebuild"]

        brought = bring(chosen := choose())
        if asks:
            hours = timedelta(hours=application.promotion.timeout_hours)
            alert = AlertNotifier(f"{dag.dag_id} waits: {ASKS}", TOLD)
            reason = {"reason": Param("", type="string", description="Why; kept in the journal")}
            asked = {"subject": ASKS, "body": TOLD, "options": ["Approve", "Reject"], "params": reason}
            answer = HITLOperator(task_id="approve", **asked, response_timeout=hours, notifiers=[alert], retries=0)
            chosen >> answer
            record(chosen, answer.output) >> brought
        TriggerDagRunOperator.partial(task_id="rebuild", skip_when_already_exists=True).expand_kwargs(brought)
    return dag


for declared in load_applications(read_settings()):
    globals()[f"{declared.name}_promote"] = promote(declared)
