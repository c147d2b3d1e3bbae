"""From a finished fine-tune to a candidate release, and the release that a fine-tune starts from."""

import json
from importlib.metadata import version as code_version
from pathlib import Path
from typing import Any

from millrace.applications import Application
from millrace.engines.base_model import base_model_path
from millrace.errors import TrainingError
from millrace.lakehouse.costs import attribute_cost
from millrace.lakehouse.lake import Lake
from millrace.releases.declare import declare_release
from millrace.releases.manifest import Manifest, describe_weights
from millrace.releases.registry import read_split, register_once, release_manifest
from millrace.settings import Settings
from millrace.training.export import verify_answers, write_merged
from millrace.training.spec import training_cost_id


def starting_manifest(settings: Settings, application: Application, *, run: str) -> Manifest:
    """Of the champion, else of the release that the declaration describes (registered if it isn't yet).

    Raises:
        ReleaseError: MLflow doesn't answer.
    """
    split = read_split(settings, application.name)
    champion = split.champion if split else None
    version = champion or declare_release(settings, application, variant=None, run=run)["version"]
    return release_manifest(settings, application, version)


def release_candidate(
    settings: Settings, application: Application, *, trained: dict[str, Any], run: str
) -> dict[str, Any]:
    """Export a fine-tune and register it: the champion's manifest with the new weights.

    Args:
        trained: as `finetune` returns it.

    Returns:
        `version`, `release_id`, `agreement` (of the exported model's answers with the trained one's), `changed`.

    Raises:
        TrainingError: the fine-tune's files are gone, or the export doesn't answer like the trained model.
        ReleaseError: MLflow doesn't answer.
    """
    folder = Path(trained["folder"])
    if not (folder / "result.json").exists():
        raise TrainingError(f"{folder} holds no finished fine-tune; run the train task again, it reuses what it can")
    weights, agreement = _export(settings, application, folder)
    manifest = starting_manifest(settings, application, run=run).model_copy(
        update={"generator": describe_weights(weights), "code_version": code_version("millrace")}
    )
    registered = register_once(
        settings,
        application,
        manifest,
        weights,
        run=run,
        tags={
            "millrace.origin": "finetune",
            "training_set": trained["training_set"],
            "fingerprint": trained["fingerprint"],
            "mlflow_run": trained["mlflow_run"],
            "simulated": str(trained["simulated"] > 0).lower(),
        },
    )
    attribute_cost(
        Lake.of(settings, application.name),
        training_cost_id(trained["fingerprint"], trained["seconds"]),
        manifest.release_id,
        run=run,
    )
    return registered | {"agreement": agreement}


def _export(settings: Settings, application: Application, folder: Path) -> tuple[Path, float]:
    """The merged weights, made and verified unless an earlier attempt did."""
    from millrace.engines.openvino import OpenVinoEngine

    base = base_model_path(application.generator)
    weights = folder / f"{base.name.split('.')[0]}-{folder.name}.gguf"
    verified = folder / "export.json"
    if not verified.exists():
        write_merged(base, folder / "adapter", weights)
        answers = json.loads((folder / "result.json").read_text())["answers"]
        engine = OpenVinoEngine(weights, cache_gb=settings.engine_cache_gb, threads=settings.threads)
        try:
            agreement = verify_answers(engine, answers)
        finally:
            engine.close()
        building = folder / ".export.json"
        building.write_text(json.dumps({"agreement": agreement}))
        building.replace(verified)
    return weights, json.loads(verified.read_text())["agreement"]
