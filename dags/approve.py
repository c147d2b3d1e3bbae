"""`<application>.approve`: a release that passed the gate → a person's approval, where asked for → the rollout."""

from datetime import timedelta

from airflow.sdk import DAG, task
from airflow.sdk.exceptions import AirflowSkipException

from millrace.applications import Application, load_applications
from millrace.settings import read_settings
from millrace_airflow import START, Approval, another, asset, stage

RUNBOOK = """
### What it does
Started by a passed evaluation. Where `[promotion] approval_in` of the declaration names this environment, it asks an
operator or admin who didn't build it (*Required Actions*): **Approve** or **Reject**, with a reason. The answer is a
decision in the journal; an approval admits the release to the rollout. Elsewhere the gate's word is enough. While
another release waits, the next run asks about it.

### Healthy
Green, or waiting in *approve* (an alert says so, and reminds). Skipped: nothing waits for an answer.

### When it fails
*approve*: nobody answered in time, or who answered built the release or gave no reason; nothing reaches users. Clear it
to ask again, or `millrace release admit`.
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

        def found() -> dict | None:
            from millrace.rollout.promotion import next_promotion

            return next_promotion(read_settings(), application)

        def waiting() -> dict:
            if (asked := found()) is None:
                raise AirflowSkipException("no release that passed the gate waits for an answer")
            return asked

        def record(asked: dict, said: dict) -> None:
            from millrace.rollout.promotion import record_approval

            record_approval(read_settings(), application, asked["candidate"], said)

        chosen = task(task_id="choose", outlets=[] if asks else [promotions])(waiting)()
        if asks:
            hours = timedelta(hours=policy.timeout_hours)
            # It looks again at what waits: what *choose* returned, an operator may have rewritten.
            approved = Approval(
                task_id="approve",
                ask=lambda context: waiting(),
                record=record,
                response_timeout=hours,
                outlets=[promotions],
            )
            chosen >> approved >> another(application, "evaluations", found)
    return dag


for declared in load_applications(read_settings()):
    globals()[f"{declared.name}_approve"] = approve(declared)
