"""`<application>.evaluate_candidate`: a new release against the champion, before any user meets it."""

from airflow.sdk import DAG, AssetAlias, Param, task
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from millrace.applications import Application, load_applications
from millrace.settings import read_settings
from millrace_airflow import HEAVY, START, AlertNotifier, another, asset, run_name, stage

RUNBOOK = """
### What it does
Freezes the questions that the documents give, lets champion and candidate answer them side by side, and decides by
paired bootstrap on quality, retrieval, general knowledge (of other weights), latency and cost (`[gate]` of the
declaration). Everything is in `ops/evaluations` and in MLflow, `<application>/evaluations`. Who passes may roll out.
By hand: trigger with `candidate` = a release version; empty takes the newest that was not evaluated yet. While another
one waits, the next run begins by itself, also after a promotion; after `millrace rollout skip` or `back`, trigger it.

### Healthy
Green, or red at *gate* alone: a refusal is the gate at work, and nothing of it reached users. Skipped: nobody waits.

### When it fails
*gate*: the candidate was refused; the alert names criterion, numbers and examples. Don't clear it: build a better one.
*evaluate*: the documents give no question (`qa.ingest_documents`, `[questions]`), a release can't be loaded or MLflow
doesn't answer; `millrace status`, then clear: a finished evaluation is not done again. Latency is measured beside
whatever else runs, for both releases alike.
"""


def evaluate_candidate(application: Application) -> DAG:
    settings, passed = read_settings(), AssetAlias(f"{application.name}/evaluations")
    with stage(
        application,
        "evaluate_candidate",
        RUNBOOK,
        tag="releases",
        schedule=[asset(application.name, "releases")],
        start_date=START,
        params={"candidate": Param(None, type=["null", "string"], description="Release version; empty: the newest")},
    ) as dag:

        def waiting() -> str | None:
            from millrace.evaluation.gate import waiting_candidate

            return waiting_candidate(settings, application)

        @task
        def choose(*, params: dict) -> str:  # of its own: a later try of *evaluate* must not take the next one
            if (chosen := params["candidate"] or waiting()) is None:
                raise AirflowSkipException("no version after the champion waits for an evaluation")
            return chosen

        @task(pool=HEAVY, queue=HEAVY)
        def evaluate(candidate: str) -> dict:
            from millrace.evaluation.gate import evaluate_candidate as evaluate

            return evaluate(settings, application, run=run_name(), candidate=candidate)

        refused = "{{ dag.dag_id }}: the gate refused version {{ ti.xcom_pull(task_ids='evaluate')['candidate'] }}"

        @task(outlets=[passed], retries=0, on_failure_callback=[AlertNotifier(refused)])
        def gate(result: dict, *, outlet_events) -> None:
            from millrace.errors import GateRefusal
            from millrace.evaluation.gate import require_passed

            try:
                require_passed(result)
            except GateRefusal as refusal:
                raise AirflowFailException(str(refusal)) from None
            if result["verdict"] == "passed":
                outlet_events[passed].add(asset(application.name, "evaluations"))

        result = evaluate(choose())
        gate(result)
        result >> another(application, "releases", waiting)
    return dag


for declared in load_applications(read_settings()):
    globals()[f"{declared.name}_evaluate_candidate"] = evaluate_candidate(declared)
