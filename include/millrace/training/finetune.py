"""The stage between a training set and an adapter: writes the spec, runs the program, shows it in MLflow.

What a fine-tune learns is named by a fingerprint of set, base and configuration; its folder, under
`<home>/training/<environment>/<application>/<fingerprint>`, is what a retry continues and a repeat reuses.
"""

import json
import logging
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from millrace.applications import Application
from millrace.engines.base_model import base_model_path
from millrace.errors import ReleaseError, TrainingError
from millrace.lakehouse.costs import Cost, record_cost
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import GOLD_TRAINING_EXAMPLES
from millrace.releases.manifest import file_sha256
from millrace.settings import Settings
from millrace.training.launch import run_program
from millrace.training.sets import Example, read_training_set
from millrace.training.spec import Spec, fingerprint, told, training_cost_id
from millrace.training.tracking import TrackedRun

log = logging.getLogger("millrace.training")

KEPT = 2
"""Fine-tunes of an application whose files stay on disk."""


def finetune(settings: Settings, application: Application, *, training_set: str, run: str) -> dict[str, Any]:
    """Train a LoRA adapter on `training_set`, go on with a fine-tune that was killed, or find that it was done.

    Returns:
        `training_set`, `fingerprint`, `folder`, `mlflow_run`, `simulated` (examples that no person said), and the
        program's `steps`, `examples`, `left_out` (too long), `held_out_loss`, `base_held_out_loss`,
        `tokens_per_second`, `seconds`; `changed`.

    Raises:
        TrainingError: the set or the configuration is unusable, or the loss is not a number.
        ReleaseError: MLflow doesn't answer.
    """
    lake = Lake.of(settings, application.name)
    examples = read_training_set(lake, training_set)
    base = base_model_path(application.generator)
    base_sha256 = file_sha256(base)
    name = fingerprint(application.training, training_set, base_sha256)
    runs = settings.home / "training" / settings.environment / application.name
    folder = runs / name
    spec = _spec(settings, application, base, folder)
    folder.mkdir(parents=True, exist_ok=True)
    folder.touch()  # in use: among the last to be removed
    _forget(runs, keep=KEPT)
    simulated = sum(example.simulated for example in examples)
    tracked = TrackedRun(
        settings,
        application.name,
        name,
        {"training_set": training_set, "written_by": run, "simulated": str(simulated > 0).lower()},
    )
    changed = not spec.result.exists()
    if changed or not tracked.finished:
        tracked.start(
            application.training.model_dump(exclude={"deepspeed"})
            | {
                "training_set": training_set,
                "training_set_examples": len(examples),
                "training_set_table_version": lake.version(GOLD_TRAINING_EXAMPLES),
                "simulated_examples": simulated,
                "base": base.name,
                "base_sha256": base_sha256,
                "code_version": version("millrace"),
            }
        )
        shown = _train(settings, spec, examples, tracked) if changed else 0
        tracked.steps(_progress(spec.progress)[shown:])
    result = json.loads(spec.result.read_text())
    record_cost(
        lake,
        Cost(
            training_cost_id(name, result["seconds"]),
            "training",
            name,
            seconds=result["seconds"],
            tokens=result["tokens"],
            cost_usd=application.prices.machine("training", result["seconds"]),
        ),
        run=run,
    )
    measured = {
        "held_out_loss": result["held_out_loss"],
        "base_held_out_loss": result["base_held_out_loss"],
        "seconds": result["seconds"],
        "tokens_per_second": result["tokens"] / result["seconds"],
    }
    if changed or not tracked.finished:
        tracked.finish(measured)
    return {
        "training_set": training_set,
        "fingerprint": name,
        "folder": str(folder),
        "mlflow_run": tracked.run_id,
        "simulated": simulated,
        "changed": changed,
        **{key: result[key] for key in ("steps", "examples", "left_out", "held_out")},
        **measured,
    }


def _train(settings: Settings, spec: Spec, examples: list[Example], tracked: TrackedRun) -> int:
    """Run the program; returns how many of its steps MLflow has seen."""
    lines = (json.dumps({"prompt": example.prompt, "answer": example.answer}) for example in examples)
    spec.examples.write_text("".join(f"{line}\n" for line in lines))
    # Steps that an earlier attempt showed and that are not in its checkpoint are shown again when they come again.
    shown = 0

    def watch() -> None:
        nonlocal shown
        fresh = _progress(spec.progress)[shown:]
        if not fresh:
            return
        last = fresh[-1]
        log.info(
            "step %d of %d: loss %.3f, %.0f tokens/s",
            last["step"],
            last["of"],
            last["loss"],
            last["tokens"] / last["seconds"],
        )
        try:
            tracked.steps(fresh)
            shown += len(fresh)
        except ReleaseError as error:
            # Training outlives an MLflow that is away for a while: the steps wait for the next look.
            log.warning("%s", error)

    try:
        run_program(spec, threads=settings.threads, watch=watch)
    except TrainingError as error:
        tracked.fail(str(error))
        raise
    return shown


def _progress(path: Path) -> list[dict[str, Any]]:
    """Complete lines only: the program may be writing one."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _spec(settings: Settings, application: Application, base: Path, folder: Path) -> Spec:
    training = application.training
    try:
        return Spec(
            base=base,
            cache=settings.cache,
            examples=folder / "examples.jsonl",
            folder=folder,
            epochs=training.epochs,
            learning_rate=training.learning_rate,
            lora_rank=training.lora_rank,
            lora_layers=training.lora_layers,
            micro_batch=training.micro_batch,
            gradient_accumulation=training.gradient_accumulation,
            max_tokens=training.max_tokens,
            processes=training.processes,
            seed=training.seed,
            deepspeed=training.deepspeed,
        )
    except ValidationError as error:
        raise TrainingError(
            f"application {application.name!r}: [training] is wrong: {told(error)}; correct the declaration"
        ) from None


def _forget(runs: Path, *, keep: int) -> None:
    """Remove the files of all but the last fine-tunes."""
    folders = sorted((path for path in runs.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for folder in folders[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)
