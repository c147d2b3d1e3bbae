"""`<application>.approve`: a release that passed the gate → a person's approval, where asked for → the rollout."""

from datetime import timedelta

from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.sdk import DAG, Param, task
from airflow.sdk.exceptions import AirflowSkipException

from millrace.applications import Application, load_applications
from millrace.settings import read_settings
from millrace_airflow import START, AlertNotifier, approvers, asset, stage

ASKS = "{{ ti.xcom_pull(task_ids='choose')['asks'] }}"
TOLD = "{{ ti.xcom_pull(task_ids='choose')['told'] }}"

RUNBOOK = """
### What it does
Started by a passed evaluation. Where `[promotion] approval_in` of the declaration names this environment, it asks an
operator or admin who didn't build it (*Required Actions*): **Approve** or **Reject**, with a reason. The answer is a
decision in the journal; an approval admits the release to the rollout. Elsewhere the gate's word is enough.

### Healthy
Green, or waiting in *approve* (an alert says so, and reminds). Skipped: nothing waits for an answer.

### When it fails
*approve* timed out: nobody answered, nothing reaches users; clear it to ask again, or `millrace release admit`.
*record*: who answered built the release, or gave no reason; clear *approve* to ask again.
"""


def approve(application: Application) -> DAG:
    policy = application.promotion
    asks = read_settings().environment in policy.approval_in
    promotions = asset(application.name, "promotions")
    with stage(
        application,
        "approve",
        RUNBOOK,
        tag="releases",
        schedule=[asset(application.name, "evaluations")],
        start_date=START,
    ) as dag:

        @task(outlets=[] if asks else [promotions])
        def choose() -> dict:
            from millrace.rollout.promotion import next_promotion

            waiting = next_promotion(read_settings(), application)
            if waiting is None:
                raise AirflowSkipException("no release that passed the gate waits for an answer")
            return waiting

        chosen = choose()
        if asks:
            answer = HITLOperator(
                task_id="approve",
                subject=ASKS,
                body=TOLD,
                options=["Approve", "Reject"],
                assigned_users=approvers(),
                params={"reason": Param("", type="string", description="Why; kept in the journal")},
                response_timeout=timedelta(hours=policy.timeout_hours),
                notifiers=[AlertNotifier(f"{dag.dag_id} waits: {ASKS}", TOLD)],
                retries=0,
            )

            @task(outlets=[promotions], retries=0)
            def record(waiting: dict, said: dict) -> None:
                from millrace.rollout.promotion import record_approval

                record_approval(read_settings(), application, waiting["candidate"], said)

            chosen >> answer
            record(chosen, answer.output)
    return dag


for declared in load_applications(read_settings()):
    globals()[f"{declared.name}_approve"] = approve(declared)
