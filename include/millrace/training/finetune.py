"""The stage between a training set and trained weights: writes the spec, runs the program, shows it in MLflow.

What a fine-tune learns is named by a fingerprint of set, base and configuration; its folder, under
`<home>/training/<environment>/<application>/<fingerprint>`, is what a retry continues and a repeat reuses.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from millrace.applications import Application, Training
from millrace.errors import OutOfMemory, ReleaseError, TrainingError
from millrace.lakehouse.costs import Cost, cost_id, record_cost
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import GOLD_PREFERENCE_EXAMPLES, GOLD_TRAINING_EXAMPLES
from millrace.releases.manifest import file_sha256
from millrace.settings import Settings
from millrace.training.launch import run_program
from millrace.training.preferences import (
    PreferenceExample,
    build_preference_set,
    is_preference_set,
    read_preference_set,
)
from millrace.training.prune import prune
from millrace.training.sets import Example, build_training_set, read_training_set
from millrace.training.spec import PRUNED, Spec, fingerprint, read_spec, told
from millrace.training.starting import required_champion, starting_weights, trained_champion
from millrace.training.tracking import TrackedRun, TrainedOn

log = logging.getLogger("millrace.training")

SAMPLE_SECONDS = 10
"""Between two measurements of the machine."""
PROMPTS = 32
"""Of the set's examples, that say which blocks matter."""
KEPT = 2
"""Fine-tunes of an application whose files stay on disk."""
EMBEDDING = "embedding-"
"""How folders of its embedding model's fine-tunes begin: they lie beside the others and are counted for themselves."""


def build_set(
    settings: Settings,
    application: Application,
    *,
    run: str,
    max_examples: int | None = None,
    method: str | None = None,
    start: str | None = None,
    teacher: str | None = None,
    remove_blocks: int = 0,
) -> dict[str, Any]:
    """The training set of the declared `training.method`, or of `method` instead: see `build_training_set` (sft) and
    `build_preference_set` (dpo).

    Args:
        start: instead of the declared `training.start`.
        teacher: the version of a release whose answers are learnt instead of known ones, or `champion`.
        remove_blocks: as `finetune` is told.

    Returns:
        What they return, and `learns`: what `finetune` is to be given.
    """
    from_champion = (start or application.training.start) == "champion"
    begun = trained_champion(settings, application) if from_champion else None
    if teacher == "champion":
        teacher = required_champion(settings, application)
    if (method or application.training.method) == "dpo":
        if teacher:
            raise TrainingError("a teacher gives answers, and dpo learns preferences; choose sft, or no teacher")
        built = build_preference_set(settings, application, run=run, max_examples=max_examples)
    else:
        # A student, and what pruning broke, have everything to learn.
        since = None if teacher or remove_blocks else begun
        built = build_training_set(
            settings, application, run=run, max_examples=max_examples, start=since, teacher=teacher
        )
    learns = {"training_set": built["training_set"], "start": begun, "teacher": teacher, "remove_blocks": remove_blocks}
    return built | {"learns": learns}


def finetune(
    settings: Settings,
    application: Application,
    *,
    training_set: str,
    run: str,
    start: str | None = None,
    teacher: str | None = None,
    remove_blocks: int = 0,
) -> dict[str, Any]:
    """Train on `training_set`, go on with a fine-tune that was killed, or find that it was done. The set's kind says
    what is learnt: its answers (sft), or to prefer one answer to another (dpo).

    Args:
        start: the release whose weights are trained further; None: the base model.
        teacher: the release whose answers the set has; None: they are known ones.
        remove_blocks: train what is left of the weights without so many of their blocks (`training/prune.py`).

    Returns:
        `training_set`, `start`, `remove_blocks`, `earlier_training_sets` (what the weights had learnt before),
        `teacher`, `fingerprint`, `folder`, `mlflow_run`, `simulated` (examples that no person said), `changed`, and the
        program's `steps`, `examples`, `left_out` (too long), `held_out_loss`, `base_held_out_loss`,
        `tokens_per_second`, `seconds`; for dpo `held_out_accuracy`, with early stopping `best_step`.

    Raises:
        TrainingError: the set or the configuration is unusable, or the loss is not a number.
        ReleaseError: MLflow doesn't answer.
    """
    lake = Lake.of(settings, application.name)
    examples = read_set(lake, training_set)
    table, method = (
        (GOLD_PREFERENCE_EXAMPLES, "dpo") if is_preference_set(training_set) else (GOLD_TRAINING_EXAMPLES, "sft")
    )
    training = application.training.model_copy(update={"method": method})
    if settings.upstream_model and not training.lora_rank:
        raise TrainingError(
            f"application {application.name!r}: training.lora_rank is 0, so all weights are trained, and the server of "
            f"{settings.upstream_model!r} (MILLRACE_UPSTREAM_MODEL) can only be given an adapter; declare a rank"
        )
    if settings.upstream_model and remove_blocks:
        raise TrainingError(
            f"application {application.name!r}: the server of {settings.upstream_model!r} (MILLRACE_UPSTREAM_MODEL) "
            "has the weights, so no block can be removed here"
        )
    begun = starting_weights(settings, application, start)
    start_sha256 = file_sha256(begun.weights)
    name = fingerprint(training, training_set, start_sha256, remove_blocks)
    runs = settings.home / "training" / settings.environment / application.name
    folder = runs / name
    pruned = folder / PRUNED
    spec = _spec(settings, application.name, training, pruned if remove_blocks else begun.weights, folder)
    folder.mkdir(parents=True, exist_ok=True)
    folder.touch()  # in use: among the last to be removed
    _forget(runs, keep=KEPT)
    if remove_blocks and not pruned.exists():
        prompts = [example.prompt for example in examples[:PROMPTS]]
        left_out = prune(begun.weights, pruned, prompts, remove=remove_blocks, cache=settings.cache,
                         max_tokens=training.max_tokens, threads=settings.threads)  # fmt: skip
        log.info("blocks %s of %s were removed", ", ".join(map(str, left_out.removed)), begun.weights.name)
    simulated = sum(example.simulated for example in examples)
    tracked = TrackedRun(
        settings,
        application.name,
        name,
        {
            "training_set": training_set,
            "written_by": run,
            "simulated": str(simulated > 0).lower(),
            "launcher": settings.training_launcher,
        },
    )
    changed = not spec.result.exists()
    if changed or not tracked.finished:
        tracked.start(
            training.model_dump(exclude={"deepspeed", "dpo"})
            | {
                "learning_rate": spec.learning_rate,
                "zero_stage": spec.zero_stage,
                "training_set": training_set,
                "training_set_examples": len(examples),
                "training_set_table_version": lake.version(table),
                "simulated_examples": simulated,
                "base": begun.weights.name,
                "base_sha256": start_sha256,
                "start_release": begun.version,
                "teacher_release": teacher,
                "removed_blocks": remove_blocks,
                "code_version": version("millrace"),
            }
            | ({"beta": spec.beta} if method == "dpo" else {}),
            TrainedOn(table.path, training_set, lake.uri(table), lake.version(table)),
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
        **{key: result[key] for key in ("held_out_accuracy", "best_step", "best_loss") if key in result},
    }
    if changed or not tracked.finished:
        tracked.finish(measured)
    return {
        "training_set": training_set,
        "earlier_training_sets": list(begun.training_sets),
        "start": start,
        "remove_blocks": remove_blocks,
        "teacher": teacher,
        "fingerprint": name,
        "folder": str(folder),
        "mlflow_run": tracked.run_id,
        "simulated": simulated,
        "changed": changed,
        **{key: result[key] for key in ("steps", "examples", "left_out", "held_out")},
        **measured,
    }


def _train(settings: Settings, spec: Spec, examples: Sequence[Example | PreferenceExample], tracked: TrackedRun) -> int:
    """Run the program, in smaller micro-batches where memory is short; returns how many steps MLflow has seen."""
    lines = (json.dumps(example.learnt) for example in examples)
    spec.examples.write_text("".join(f"{line}\n" for line in lines))
    spec = _as_narrow_as_before(spec)
    while True:
        watch = _Watch(spec, tracked)
        try:
            run_program(
                spec,
                threads=settings.threads,
                watch=watch,
                launcher=settings.training_launcher,
                spark=settings.spark_connection,
            )
        except OutOfMemory as error:
            narrowed = spec.narrowed()
            if narrowed is None:
                tracked.fail(str(error))
                raise
            log.warning("%s; trying %d in a micro-batch", error, narrowed.micro_batch)
            spec = narrowed
            # Other micro-batches make other steps: what was kept isn't theirs.
            shutil.rmtree(spec.checkpoints, ignore_errors=True)
            spec.progress.unlink(missing_ok=True)
        except TrainingError as error:
            tracked.fail(str(error))
            raise
        else:
            return watch.shown


class _Watch:
    """Looks at the program's progress while it runs, and shows it in MLflow and the log."""

    def __init__(self, spec: Spec, tracked: TrackedRun) -> None:
        self._progress = spec.progress
        self._tracked = tracked
        self._sampled = -math.inf
        self.shown = 0
        """Steps that MLflow has seen. Those that an earlier attempt showed and that are not in its checkpoint are shown
        again when they come again."""

    def __call__(self) -> None:
        fresh = _progress(self._progress)[self.shown :]
        if fresh:
            last = fresh[-1]
            log.info(
                "step %d of %d: loss %.3f, %.0f tokens/s",
                last["step"],
                last["of"],
                last["loss"],
                last["tokens"] / last["seconds"],
            )
        sample = time.monotonic() - self._sampled >= SAMPLE_SECONDS
        try:
            if fresh:
                self._tracked.steps(fresh)
                self.shown += len(fresh)
            if sample:
                self._sampled = time.monotonic()
                self._tracked.machine(self.shown)
        except ReleaseError as error:
            # Training outlives an MLflow that is away for a while: the steps wait for the next look.
            log.warning("%s", error)


def _as_narrow_as_before(spec: Spec) -> Spec:
    """The spec with the micro-batches that an earlier attempt came down to: its checkpoint is of these."""
    try:
        before = read_spec(spec.folder / "spec.json")
    except TrainingError:
        return spec
    narrowed: Spec | None = spec
    while narrowed and narrowed != before:
        narrowed = narrowed.narrowed()
    return narrowed or spec


def _progress(path: Path) -> list[dict[str, Any]]:
    """Complete lines only: the program may be writing one."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _spec(settings: Settings, application: str, training: Training, base: Path, folder: Path) -> Spec:
    dpo = training.method == "dpo"
    try:
        return Spec(
            base=base,
            cache=settings.cache,
            examples=folder / "examples.jsonl",
            folder=folder,
            epochs=training.epochs,
            method=training.method,
            beta=training.dpo.beta,
            learning_rate=training.dpo.learning_rate if dpo else training.learning_rate,
            lora_rank=training.lora_rank,
            lora_layers=training.lora_layers,
            micro_batch=training.micro_batch,
            gradient_accumulation=training.gradient_accumulation,
            max_tokens=training.max_tokens,
            packing=training.packing,
            evaluate_steps=training.evaluate_steps,
            patience=training.patience,
            processes=training.processes,
            seed=training.seed,
            deepspeed=training.deepspeed,
        )
    except ValidationError as error:
        raise TrainingError(
            f"application {application!r}: [training] is wrong: {told(error)}; correct the declaration"
        ) from None


def _forget(runs: Path, *, keep: int) -> None:
    """Remove the files of all but the last fine-tunes."""
    own = (path for path in runs.iterdir() if path.is_dir() and not path.name.lstrip(".").startswith(EMBEDDING))
    for folder in sorted(own, key=lambda path: path.stat().st_mtime)[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)


def read_set(lake: Lake, set_id: str) -> Sequence[Example | PreferenceExample]:
    """Of either kind. Raises as `read_training_set`."""
    return read_preference_set(lake, set_id) if is_preference_set(set_id) else read_training_set(lake, set_id)


def training_cost_id(fingerprint: str, seconds: float) -> str:
    """The id of what a finished fine-tune cost, in `ops/costs`: trained again, it takes other `seconds`.

    They are of all its steps, also of those that a killed attempt left in a checkpoint.
    """
    return cost_id("training", fingerprint, repr(seconds))
