"""`<application>.batch_inference`: the champion over the table of questions, on Spark."""

from airflow.sdk import DAG, AssetAlias, Param, task

from millrace.applications import Application, load_applications
from millrace.settings import read_settings
from millrace_airflow import HEAVY, START, announce, asset, run_name, stage

RUNBOOK = """
### What it does
Asks the champion every question of `bronze/questions` that it has not answered yet, and writes `gold/answers`: one row
per question and release, with citations, index build, tokens, cost, and an error where there is no answer. It works on
Spark in slices of `MILLRACE_BATCH_SLICE` questions, each committed with its cost (`ops/costs`). Questions come by
`millrace batch submit FILE.jsonl|.csv -a <app>`, or from a DAG that writes the table and updates its asset.

### By hand
*mode*: batch is the table as it is; stream is what came since the last stream of this release (Structured Streaming,
checkpoint in `<home>/streams`). Between them a question is answered once. With mode batch: *limit*, *batch* (the name
it was submitted under) and *retry_errors*, which asks again where the release has only an error. *release*: a version
other than the champion. A new champion answers all questions anew.

### Healthy
Green; `millrace batch status -a <app>` shows nothing waiting. A few errors are questions (too long), not faults.

### When it fails
Clear the task: finished slices are not asked again, and a stream that outlived its task is ended and replaced. *ids
that stand for several questions*: nothing was asked; correct the table. *answers nothing*: the release or its engine is
broken; ask another *release*. *can't be reached*: Spark or MLflow; `millrace status`. A checkpoint that is of no use:
remove the folder that the message names.
"""


def batch_inference(application: Application) -> DAG:
    answers = AssetAlias(f"{application.name}/gold/answers")
    with stage(
        application,
        "batch_inference",
        RUNBOOK,
        tag="batch",
        schedule=[asset(application.name, "bronze/questions")],
        start_date=START,
        params={
            "mode": Param("batch", enum=["batch", "stream"], description="The table as it is, or what is new"),
            "release": Param(None, type=["null", "string"], description="Release version; empty: the champion"),
            "limit": Param(None, type=["null", "integer"], minimum=1, description="Questions at most; empty: all"),
            "batch": Param(None, type=["null", "string"], description="Submitted under this name; empty: all"),
            "retry_errors": Param(False, type="boolean", description="Ask again what was answered by an error"),
        },
    ) as dag:

        @task(pool=HEAVY, queue=HEAVY, outlets=[answers])
        def infer(*, params: dict, outlet_events) -> dict:
            from millrace.batch.inference import infer as answer

            names = ("mode", "release", "limit", "batch", "retry_errors")
            chosen = {name: params[name] for name in names}
            done = answer(read_settings(), application, run=run_name(), **chosen)
            announce(outlet_events, application, "gold/answers", done)
            return done

        infer()
    return dag


for declared in load_applications(read_settings()):
    globals()[f"{declared.name}_batch_inference"] = batch_inference(declared)
