"""From a finished fine-tune to a candidate release."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from millrace.applications import Application
from millrace.engines.base_model import base_model_path
from millrace.engines.engine import Engine
from millrace.engines.upstream import Adapter, UpstreamEngine, unload_adapter
from millrace.errors import TrainingError
from millrace.lakehouse.costs import attribute_cost
from millrace.lakehouse.lake import Lake
from millrace.releases.generator import adapter_name, open_engine, served_model, upstream_of
from millrace.releases.manifest import Generator, ServedModel, describe_adapter, describe_weights
from millrace.releases.recipe import Recipe
from millrace.releases.registry import register_once
from millrace.settings import Settings
from millrace.training.export import verify_answers, write_full, write_merged
from millrace.training.finetune import read_set, training_cost_id
from millrace.training.measure import PROBE_TOKENS, PROBES, as_tags, measure, side_by_side
from millrace.training.spec import PRUNED
from millrace.training.starting import starting_manifest, starting_weights


def release_candidate(
    settings: Settings,
    application: Application,
    *,
    trained: dict[str, Any],
    run: str,
    form: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Export a fine-tune and register it: the champion's manifest with the new weights, or, where a server has the
    model (`MILLRACE_UPSTREAM_MODEL`), with the adapter for it.

    Args:
        trained: as `finetune` returns it.
        form: what `build_set` was given beside the declaration; None: nothing.

    Returns:
        `version`, `release_id`, `agreement` (of the exported model's answers with the trained one's), `changed`.

    Raises:
        TrainingError: the fine-tune's files are gone, its set was changed since, or the export doesn't answer like the
            trained model.
        EngineError: the server doesn't answer, or can't load the adapter.
        ReleaseError: MLflow doesn't answer.
    """
    folder = Path(trained["folder"])
    lineage = {
        "earlier_training_sets": " ".join(trained["earlier_training_sets"]),
        "teacher": f"release {trained['teacher']}" if trained["teacher"] else "",
    }
    if not (folder / "result.json").exists():
        raise TrainingError(f"{folder} holds no finished fine-tune; run the train task again, it reuses what it can")
    # Hours after the set was read: who was erased meanwhile is in the weights, and no longer in the set.
    read_set(Lake.of(settings, application.name), trained["training_set"])
    generator, files, agreement = _export(settings, application, trained, folder)
    manifest = starting_manifest(settings, application, run=run).changed(generator=generator)
    registered = register_once(
        settings,
        application,
        manifest,
        files,
        run=run,
        tags={
            "millrace.origin": "finetune",
            **Recipe.of(application, "finetune", form or {}).tags,
            "training_set": trained["training_set"],
            "fingerprint": trained["fingerprint"],
            "mlflow_run": trained["mlflow_run"],
            "simulated": str(trained["simulated"] > 0).lower(),
            **_smaller(settings, application, trained, files / generator.name),
        }
        | {name: said for name, said in lineage.items() if said},
    )
    attribute_cost(
        Lake.of(settings, application.name),
        training_cost_id(trained["fingerprint"], trained["seconds"]),
        manifest.release_id,
        run=run,
    )
    return registered | {"agreement": agreement}


def _smaller(settings: Settings, application: Application, trained: dict[str, Any], weights: Path) -> dict[str, str]:
    """What a pruned model saves, side by side with what it was made of."""
    if not trained["remove_blocks"]:
        return {}
    before = starting_weights(settings, application, trained["start"]).weights
    measured = (
        measure(path, PROBES, max_new_tokens=PROBE_TOKENS, alone=len(PROBES), threads=settings.threads)
        for path in (before, weights)
    )
    told = side_by_side(*zip((before, weights), measured, strict=True))
    return {"removed_blocks": str(trained["remove_blocks"])} | as_tags(told)


def _export(
    settings: Settings, application: Application, trained: dict[str, Any], folder: Path
) -> tuple[Generator, Path, float]:
    """The candidate's generator, the folder with its files, and how far its answers agree; asked once."""
    if settings.upstream_model:
        generator, files = _served(settings, folder)
    else:
        generator, files = _merged(settings, application, trained, folder)
    kept = folder / "export.json"
    told = json.loads(kept.read_text()) if kept.exists() else {}
    if told.get("generator") != generator.identity:
        answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        told = {"generator": generator.identity, "agreement": _agreement(settings, generator, files, answers)}
        building = folder / ".export.json"
        building.write_text(json.dumps(told))
        building.replace(kept)
    return generator, files, told["agreement"]


def _merged(
    settings: Settings, application: Application, trained: dict[str, Any], folder: Path
) -> tuple[Generator, Path]:
    """For this process's engine: what it started from with the adapter merged in, or with all weights replaced."""
    begun = starting_weights(settings, application, trained["start"]).weights
    base = folder / PRUNED if trained["remove_blocks"] else begun
    weights = folder / f"{base_model_path(application.generator).name.split('.')[0]}-{folder.name}.gguf"
    if not weights.exists():
        if (folder / "adapter").exists():
            write_merged(base, folder / "adapter", weights)
        else:
            write_full(base, folder / "weights.safetensors", weights)
    return describe_weights(weights), folder


def _served(settings: Settings, folder: Path) -> tuple[Generator, Path]:
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
