"""`<application>.refresh_embeddings`: changed chunks → vectors → an index build, published after its canaries."""

from airflow.sdk import DAG, AssetAlias, task
from pendulum import datetime

from millrace.applications import Application, load_applications
from millrace.settings import read_settings
from millrace_airflow import HEAVY, asset, defaults, run_name

RUNBOOK = """
### What it does
Started by the chunks asset. Embeds the chunks that changed since the last run into `silver/embeddings`, makes an
index build of that state (an unchanged state is the same build) and asks it the canary questions. If it finds no less
than the published build, it is published: the gateway uses it from the next request on.

### Healthy
A run for every change of the documents; seconds when little changed. The index asset is updated only when another
build was published.

### When it fails
*embed*, *build*: the message says what is missing; clear the task, nothing is done twice. *publish* with CanaryError:
the new build finds less than the published one, which stays. Look at what changed in the documents and correct the
source; the next run tries again. The way back to the build before: `millrace.retrieval.index.publish` of the
`previous` that `current.json` names.
"""


def refresh_embeddings(application: Application) -> DAG:
    with DAG(
        dag_id=f"{application.name}.refresh_embeddings",
        schedule=[asset(application.name, "silver/chunks")],
        start_date=datetime(2026, 1, 1, tz="UTC"),
        catchup=False,
        max_active_runs=1,
        default_args=defaults(application.owner),
        doc_md=RUNBOOK,
        tags=[application.name, "documents"],
    ) as dag:

        @task(pool=HEAVY)
        def embed() -> dict:
            from millrace.retrieval.embed import refresh_embeddings

            return refresh_embeddings(read_settings(), application, run=run_name())

        @task
        def build() -> dict:
            from millrace.retrieval.index import build_index

            return build_index(read_settings(), application, run=run_name())

        # A refused build is refused again: no retries.
        @task(retries=0, outlets=[AssetAlias(f"{application.name}/index")])
        def publish(built: dict, *, outlet_events) -> dict:
            from millrace.evaluation.canaries import publish_build

            published = publish_build(read_settings(), application, built["build"], run=run_name())
            if published["changed"]:
                outlet_events[AssetAlias(f"{application.name}/index")].add(
                    asset(application.name, "index"), extra=published
                )
            return published

        built = build()
        embed() >> built
        publish(built)
    return dag


for declared in load_applications(read_settings()):
    globals()[f"{declared.name}_refresh_embeddings"] = refresh_embeddings(declared)
