"""Where a fine-tune goes on after it was killed: the last checkpoint, and the best weights so far.

A pointer (`last.json`) is replaced when every process has written its part; what neither it nor the run names any
more is removed, so the disk holds two checkpoints at most, and two files of best weights.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from millrace.errors import TrainingError
from millrace.training.files import replace_text
from millrace.training.spec import Spec
from millrace.training.stopping import Measured, best_of
from millrace.training.weights import trained_weights, write_weights


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    seconds: float = 0.0
    development: list[Measured] = field(default_factory=list)
    """What was measured on the development split, the first first."""


def keep(spec: Spec, engine: Any, progress: Progress, rank: int) -> None:
    """Make `progress` what the run is resumed from.

    Raises:
        TrainingError: there is no room for it.
    """
    import torch

    tag = f"step-{progress.step}"
    try:
        engine.save_checkpoint(
            str(spec.checkpoints),
            tag=tag,
            save_latest=False,
            exclude_frozen_parameters=True,
            client_state={"step": progress.step},
        )
    except (OSError, RuntimeError) as error:  # torch's writer says RuntimeError when a disk is full
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"step {progress.step} can't be kept in {spec.checkpoints}: {reason}; "
            "free disk space, then run the task again"
        ) from error
    torch.distributed.barrier()
    if rank == 0:
        told = {"tag": tag, "step": progress.step, "seconds": progress.seconds, "development": progress.development}
        replace_text(_pointer(spec), json.dumps(told))
        for other in spec.checkpoints.glob("step-*"):
            if other.name != tag:
                shutil.rmtree(other, ignore_errors=True)
        _forget_best(spec, progress.development)


def resume(spec: Spec, engine: Any, rank: int) -> Progress:
    """Put the engine where the last checkpoint left it; without one it stays as it is. Lines of the progress file
    beyond the checkpoint are forgotten: they come again.

    Raises:
        TrainingError: the checkpoint can't be read.
    """
    progress = Progress()
    if _pointer(spec).exists():
        try:
            last = json.loads(_pointer(spec).read_text())
            path, _ = engine.load_checkpoint(str(spec.checkpoints), tag=last["tag"], load_module_strict=False)
            if path is None:
                raise ValueError(f"{last['tag']} is not there")
            development = [Measured(*one) for one in last.get("development", ())]
            if development and not (best := best_file(spec, best_of(development).step)).exists():
                raise ValueError(f"{best.name} is not there")
            progress = Progress(last["step"], last["seconds"], development)
        except Exception as error:  # whatever torch's, pickle's and DeepSpeed's readers make of damaged bytes
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise TrainingError(
                f"the checkpoint in {spec.checkpoints} is not whole ({reason}); remove that folder and run the task "
                "again: it starts from the beginning"
            ) from error
    if rank == 0:
        lines = spec.progress.read_text().splitlines() if spec.progress.exists() else []
        replace_text(spec.progress, "".join(f"{line}\n" for line in lines[: progress.step]))
    return progress


def keep_best(spec: Spec, engine: Any, progress: Progress, rank: int) -> None:
    """Write the weights that the last measurement found to be the best. The checkpoint's own best stays beside
    them: a run that is killed now goes on from there."""
    weights = trained_weights(engine.module, rank)
    if rank == 0:
        spec.checkpoints.mkdir(exist_ok=True)
        write_weights(weights, best_file(spec, progress.step))
        kept = json.loads(_pointer(spec).read_text()).get("development", ()) if _pointer(spec).exists() else ()
        _forget_best(spec, progress.development, [Measured(*one) for one in kept])


def best_file(spec: Spec, step: int) -> Path:
    return spec.checkpoints / f"best-{step}.safetensors"


def _forget_best(spec: Spec, *histories: list[Measured]) -> None:
    needed = {best_file(spec, best_of(history).step) for history in histories if history}
    for other in spec.checkpoints.glob("best-*.safetensors"):
        if other not in needed:
            other.unlink()


def _pointer(spec: Spec) -> Path:
    return spec.checkpoints / "last.json"
