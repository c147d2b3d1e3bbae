"""What was trained, out of the model and into files and back, however ZeRO has shared it out.

Every process calls these functions, since under stage 3 no process holds a weight alone; rank 0 writes. A file that
isn't what was trained is an error here, not a surprise behind the gate.
"""

import contextlib
import shutil
from pathlib import Path
from typing import Any

from millrace.errors import TrainingError


def trained_weights(module: Any, rank: int) -> dict[str, Any]:
    """Name → tensor in the machine's memory, of all that was trained; empty in processes that aren't rank 0.

    Where 16 bits compute, they are the optimizer's, of 32: what a step adds is mostly less than 16 bits can tell.
    """
    import torch
    from deepspeed.utils import safe_get_full_fp32_param

    kept = {}
    for name, weight in module.named_parameters():
        if weight.requires_grad:
            with _whole(weight):
                exact = weight if weight.dtype == torch.float32 else safe_get_full_fp32_param(weight)
                if rank == 0:
                    kept[name] = exact.detach().cpu().clone()
    return kept


def put_back(module: Any, file: Path) -> None:
    """Give the model the weights that `write_weights` wrote to `file`, which every process sees."""
    import torch
    from deepspeed.utils import safe_set_full_fp32_param
    from safetensors.torch import load_file

    saved = load_file(file)
    for name, weight in module.named_parameters():
        if weight.requires_grad:
            with torch.no_grad(), _whole(weight, changed=True):
                weight.copy_(saved[name])
            if weight.dtype != torch.float32:
                safe_set_full_fp32_param(weight, saved[name].to(weight.device))


def write_weights(weights: dict[str, Any], file: Path) -> None:
    """All of them, whole or not at all.

    Raises:
        TrainingError: there is no room for them, or they read back otherwise.
    """
    from safetensors.torch import save_file

    building = file.with_name(f".{file.name}")
    with _explained(file):
        save_file(weights, building)
        require_equal(building, weights)
        building.replace(file)


def save_adapter(module: Any, weights: dict[str, Any], folder: Path) -> None:
    """The adapter as peft saves it, whole or not at all.

    Raises:
        TrainingError: there is no room for it, or it reads back otherwise.
    """
    building = folder.with_name(f".{folder.name}")
    shutil.rmtree(building, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    with _explained(folder):
        module.save_pretrained(building, state_dict=dict(weights), save_embedding_layers=False)
        # peft leaves out the name of the adapter, of which there is one.
        named = {name.replace(".default.", "."): weight for name, weight in weights.items()}
        require_equal(building / "adapter_model.safetensors", named)
        building.rename(folder)


def require_equal(file: Path, weights: dict[str, Any]) -> None:
    """Raises:
    TrainingError: `file` doesn't hold exactly these weights, bit for bit.
    """
    import torch
    from safetensors.torch import load_file

    saved = load_file(file)
    wrong = sorted(saved.keys() ^ weights.keys()) or [
        name for name, weight in weights.items() if not torch.equal(saved[name], weight)
    ]
    if not weights or wrong:
        raise TrainingError(
            f"{file} does not hold what was trained: {wrong[0] if wrong else 'nothing was'} "
            f"({len(wrong)} of {len(weights)} weights); nothing of it is used, use a lower ZeRO stage"
        )


@contextlib.contextmanager
def _explained(target: Path) -> Any:
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"what was trained can't be written to {target}: {error}; free disk space, then run the task again"
        ) from error


def _whole(weight: Any, *, changed: bool = False) -> Any:
    """Where stage 3 shares it out, all of it in every process for a while; `changed`: as rank 0 leaves it."""
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([weight], modifier_rank=0 if changed else None)
