"""From a finished fine-tune to a candidate release, and the release that a fine-tune starts from."""

import json
from pathlib import Path
from typing import Any

from millrace.applications import Application
from millrace.engines.base_model import base_model_path
from millrace.engines.engine import Engine
from millrace.engines.upstream import Adapter, UpstreamEngine, unload_adapter
from millrace.errors import TrainingError
from millrace.lakehouse.costs import attribute_cost
from millrace.lakehouse.lake import Lake
from millrace.releases.declare import declare_release
from millrace.releases.generator import adapter_name, open_engine, served_model, upstream_of
from millrace.releases.manifest import Generator, Manifest, ServedModel, describe_adapter, describe_weights
from millrace.releases.registry import read_split, register_once, release_manifest
from millrace.settings import Settings
from millrace.training.export import verify_answers, write_full, write_merged
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
    """Export a fine-tune and register it: the champion's manifest with the new weights, or, where a server has the
    model (`MILLRACE_UPSTREAM_MODEL`), with the adapter for it.

    Args:
        trained: as `finetune` returns it.

    Returns:
        `version`, `release_id`, `agreement` (of the exported model's answers with the trained one's), `changed`.

    Raises:
        TrainingError: the fine-tune's files are gone, or the export doesn't answer like the trained model.
        EngineError: the server doesn't answer, or can't load the adapter.
        ReleaseError: MLflow doesn't answer.
    """
    folder = Path(trained["folder"])
    if not (folder / "result.json").exists():
        raise TrainingError(f"{folder} holds no finished fine-tune; run the train task again, it reuses what it can")
    generator, files, agreement = _export(settings, application, folder)
    manifest = starting_manifest(settings, application, run=run).changed(generator=generator)
    registered = register_once(
        settings,
        application,
        manifest,
        files,
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


def _export(settings: Settings, application: Application, folder: Path) -> tuple[Generator, Path, float]:
    """The candidate's generator, the folder with its files, and how far its answers agree; asked once."""
    generator, files = (_served if settings.upstream_model else _merged)(settings, application, folder)
    kept = folder / "export.json"
    told = json.loads(kept.read_text()) if kept.exists() else {}
    if told.get("generator") != generator.identity:
        answers = json.loads((folder / "result.json").read_text())["answers"]
        told = {"generator": generator.identity, "agreement": _agreement(settings, generator, files, answers)}
        building = folder / ".export.json"
        building.write_text(json.dumps(told))
        building.replace(kept)
    return generator, files, told["agreement"]


def _merged(settings: Settings, application: Application, folder: Path) -> tuple[Generator, Path]:
    """For this process's engine: the base with the adapter merged in, or with the weights that were all trained."""
    base = base_model_path(application.generator)
    weights = folder / f"{base.name.split('.')[0]}-{folder.name}.gguf"
    if not weights.exists():
        if (folder / "adapter").exists():
            write_merged(base, folder / "adapter", weights)
        else:
            write_full(base, folder / "weights.safetensors", weights)
    return describe_weights(weights), folder


def _served(settings: Settings, application: Application, folder: Path) -> tuple[Generator, Path]:
    """For a server that has the base: the adapter, which it loads while it runs."""
    files = folder / "adapter"
    return served_model(settings).model_copy(update={"adapter": describe_adapter(files)}), files


def _agreement(settings: Settings, generator: Generator, files: Path, answers: list[dict[str, str]]) -> float:
    upstream = upstream_of(settings)
    if isinstance(generator, ServedModel):
        # Under a name of its own: the release has files of its own, and these go with the fine-tune's folder.
        checked = Adapter(f"{adapter_name(generator)}-check", files)
        engine: Engine = UpstreamEngine(
            upstream, generator.name, context_tokens=generator.context_tokens, adapter=checked
        )
    else:
        engine = open_engine(
            generator, files, upstream=upstream, threads=settings.threads, cache_gb=settings.engine_cache_gb
        )
    try:
        return verify_answers(engine, answers)
    finally:
        engine.close()
        if isinstance(generator, ServedModel):
            unload_adapter(upstream, checked.name)
