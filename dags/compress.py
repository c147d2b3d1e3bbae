"""`<application>.compress`: a release's weights in fewer bits → candidate release."""

from airflow.sdk import DAG, AssetAlias, Param, task

from millrace.applications import Application, load_applications
from millrace.settings import read_settings
from millrace_airflow import HEAVY, announce, run_name, stage

RUNBOOK = """
### What it does
Writes a release's weights in another format (8 or 4 bits a weight), loads what came out beside what was there, each in
a process of its own, asks both the same, and registers the result as a candidate release: the same prompt and
retrieval, smaller weights. The version's tags hold size, memory and tokens/s before and after; quality is the gate's to
compare, which comes next, by itself. By hand: trigger with `format`, and `release` for another than the champion.

### Healthy
Green. A release that is in that format already, or would not get smaller, stays as it is: the log says so, nothing is
registered.

### When it fails
*compress*: a server computes the release, the engine can't load the result, gains no memory by it, or it answers
unlike the model that it was made from; the message says which. Nothing half-written is left. Safe to clear any time.
"""


def compress(application: Application) -> DAG:
    releases = AssetAlias(f"{application.name}/releases")
    with stage(
        application,
        "compress",
        RUNBOOK,
        tag="releases",
        schedule=None,
        params={
            "format": Param(
                "q8_0",
                enum=["q8_0", "q4_1", "q4_0"],
                description="Bits a weight: q8_0 loses next to nothing, q4_1 is half as large, q4_0 a little smaller",
            ),
            "release": Param(None, type=["null", "string"], description="Release version; empty: the champion"),
        },
    ) as dag:

        @task(pool=HEAVY, queue=HEAVY, outlets=[releases])
        def compress(*, params: dict, outlet_events) -> dict:
            from millrace.training.compress import compress_release

            made = compress_release(
                read_settings(),
                application,
                format_name=params["format"],
                version=params["release"],
                run=run_name(),
            )
            announce(outlet_events, application, "releases", made)
            return made

        compress()
    return dag


for declared in load_applications(read_settings()):
    globals()[f"{declared.name}_compress"] = compress(declared)
