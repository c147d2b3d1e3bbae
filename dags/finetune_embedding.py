"""`<application>.finetune_embedding`: questions and their chunks → embedding model, index beside → candidate."""

from airflow.sdk import DAG, AssetAlias, Param, task
from airflow.sdk.exceptions import AirflowSkipException

from millrace.applications import Application, load_applications
from millrace.settings import read_settings
from millrace_airflow import HEAVY, announce, run_name, stage

RUNBOOK = """
### What it does
Fine-tunes the embedding model, contrastively: questions with the chunks that answer them (documents' own questions,
cited chunks of answers that were rated well, chunks that hold users' corrections) against the chunks that are found in
their place. If it finds more held-out questions than the champion's, all chunks are embedded with it beside the index
in use, the canaries are asked, and the champion with that model becomes a candidate: the gate and the rollout come
next. From then on both indexes are kept up to date; the one that nobody searches any more goes with upkeep.

### Healthy
Green. *publish* and *release* skipped: the model finds no more than the champion's, the log has the numbers.

### When it fails
*tune*: too few questions, or the loss is not a number: the message says which; a killed run begins again and leaves
nothing half-written. *publish* with CanaryError: the model finds too little of what documents ask; nothing is released.
Safe to clear any time: what is done is found, not done twice.
"""


def finetune_embedding(application: Application) -> DAG:
    releases = AssetAlias(f"{application.name}/releases")
    with stage(
        application,
        "finetune_embedding",
        RUNBOOK,
        tag="releases",
        schedule=None,
        params={
            "max_examples": Param(None, type=["null", "integer"], minimum=10, description="Pairs; empty: as declared"),
            "epochs": Param(None, type=["null", "integer"], minimum=1, description="At most; empty: as declared"),
        },
    ) as dag:

        @task(pool=HEAVY, queue=HEAVY)
        def tune(*, params: dict) -> dict:
            from millrace.training.embedding import tune_embedding

            return tune_embedding(
                read_settings(),
                application,
                run=run_name(),
                max_examples=params["max_examples"],
                epochs=params["epochs"],
            )

        @task(retries=0)  # A refused build is refused again.
        def publish(tuned: dict) -> dict:
            from millrace.evaluation.canaries import publish_tuned

            if not tuned["better"]:
                raise AirflowSkipException(tuned["why"])
            return publish_tuned(read_settings(), application, tuned, run=run_name())

        @task(outlets=[releases])
        def release(tuned: dict, *, params: dict, outlet_events) -> dict:
            from millrace.training.embedding import release_embedding

            made = release_embedding(read_settings(), application, tuned=tuned, run=run_name(), form=params)
            announce(outlet_events, application, "releases", made)
            return made

        tuned = tune()
        publish(tuned) >> release(tuned)
    return dag


for declared in load_applications(read_settings()):
    globals()[f"{declared.name}_finetune_embedding"] = finetune_embedding(declared)
