"""`<application>.refresh_embeddings`: changed chunks → vectors → an index build, published after its canaries."""

from airflow.sdk import DAG, AssetAlias, Param, task

from millrace.applications import Application, load_applications
from millrace.settings import read_settings
from millrace_airflow import HEAVY, START, announce, asset, run_name, stage

RUNBOOK = """
### What it does
Started by the chunks. Embeds the chunks that changed since the last run into `silver/embeddings`, makes an
index build of that state (an unchanged state is the same build) and asks it the canary questions. If it finds at most
`canary_margin` less than the published build (a first one: half of all), it is published: the gateway uses it from the
next request on. All that for every lineage that a release searches which users meet or may meet soon: with an embedding
model that was fine-tuned there are two.
A breach whose action is reembed starts it too (by hand: `distrust`). The same text has the same vector, so instead of
embedding it again nothing is trusted: all chunks are compared with all vectors, and a sample, embedded anew, must be
what was kept. What the documents don't hold, only documents bring, or a new embedding model: a candidate release.

### Healthy
A run for every change of the documents; seconds when little changed. The index asset is updated only when another
build was published.

### When it fails
*embed*, *build*: the message says what is missing; clear the task, nothing is done twice. *publish* with CanaryError:
the new build finds less than the published one, which stays. Look at what changed in the documents and correct the
source; the next run tries again. The way back: `millrace index back -a <app>` (`millrace index list` shows both; of a
fine-tuned model's lineage with `--lineage`); the next run publishes again what the documents give, so correct them
first. A Qdrant server (`MILLRACE_QDRANT_URL`) that goes away: nothing of the build counts, the next try completes it.
After switching to or from one: trigger one run. Without MLflow nobody knows what is searched: tried again.
"""


def refresh_embeddings(application: Application) -> DAG:
    with stage(
        application,
        "refresh_embeddings",
        RUNBOOK,
        tag="documents",
        schedule=(asset(application.name, "silver/chunks") | asset(application.name, "breaches/reembed")),
        start_date=START,
        params={"distrust": Param(False, type="boolean", description="Compare all that was embedded with the chunks")},
    ) as dag:

        @task(pool=HEAVY, queue=HEAVY)
        def embed(*, params: dict, triggering_asset_events) -> list[dict]:
            from millrace.releases.lineages import embed_changes

            breached = triggering_asset_events.get(asset(application.name, "breaches/reembed"))
            distrust = bool(breached or params["distrust"])
            return embed_changes(read_settings(), application, run=run_name(), distrust=distrust)

        @task
        def build(embedded: list[dict]) -> list[dict]:
            from millrace.releases.lineages import build_indexes

            return build_indexes(read_settings(), application, embedded, run=run_name())

        # A refused build is refused again: no retries.
        @task(retries=0, outlets=[AssetAlias(f"{application.name}/index")])
        def publish(built: list[dict], *, outlet_events) -> list[dict]:
            from millrace.evaluation.canaries import publish_builds

            published = publish_builds(read_settings(), application, built, run=run_name())
            for one in published:
                announce(outlet_events, application, "index", one)
            return published

        publish(build(embed()))
    return dag


for declared in load_applications(read_settings()):
    globals()[f"{declared.name}_refresh_embeddings"] = refresh_embeddings(declared)
