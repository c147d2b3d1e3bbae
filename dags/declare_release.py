"""`<application>.declare_release`: the base model with a declared prompt → a registered release."""

from airflow.sdk import DAG, AssetAlias, Param, task

from millrace.applications import Application, load_applications
from millrace.settings import read_settings
from millrace_airflow import announce, run_name, stage

RUNBOOK = """
### What it does
Registers what the declaration describes as a release: the base model, the declared prompt, the current retrieval
lineage; or, where a variant was chosen, the champion with that prompt. It becomes a candidate: the gate and the rollout
come next, as for any other. By hand, after a change of the declaration.

### Healthy
Green. A release that is registered already gives its version again, and no asset is updated.

### When it fails
*declare*: MLflow doesn't answer (`millrace status`), a template can't be used, or the base model's package is missing;
the message says which. Nothing half-registered counts. Safe to clear any time.
"""


def declare_release(application: Application) -> DAG:
    releases = AssetAlias(f"{application.name}/releases")
    with stage(
        application,
        "declare_release",
        RUNBOOK,
        tag="releases",
        schedule=None,
        params={
            "variant": Param(
                "declared", enum=["declared", *application.prompt.variants], description="Which declared prompt"
            )
        },
    ) as dag:

        @task(outlets=[releases])
        def declare(*, params: dict, outlet_events) -> dict:
            from millrace.releases.declare import declare_release as declare

            declared = declare(read_settings(), application, variant=params["variant"], run=run_name())
            announce(outlet_events, application, "releases", declared)
            return declared

        declare()
    return dag


for declared in load_applications(read_settings()):
    globals()[f"{declared.name}_declare_release"] = declare_release(declared)
