"""What of a Hugging Face directory is the model: weights as safetensors, configuration, tokenizer, licence.

Looks at names and configuration, loads nothing. What could run code when it is read is refused: pickled weights, and
models that bring classes of their own.
"""

import json
from pathlib import Path
from typing import Any

from millrace.errors import EngineError

CONFIG = "config.json"
_NEEDED = (CONFIG, "tokenizer.json")
_ALSO = (
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json",
    "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.txt",
)  # fmt: skip
"""Taken along where they are there: what else a tokenizer and a model read, and what must go with the weights."""
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")


def model_files(folder: Path) -> list[Path]:
    """The files of the model in `folder`, by name; others (optimizer states, other formats, code) are no part of it.

    Raises:
        EngineError: it isn't such a directory, lacks a file, holds weights only in another format, asks for code of
            its own, or holds an adapter, which would not be used.
    """
    if not folder.is_dir():
        raise EngineError(f"{folder} is not a folder; name one as `model.save_pretrained` writes it")
    if (folder / _ADAPTER).exists():
        raise EngineError(
            f"{folder} holds a LoRA adapter ({_ADAPTER}), which would not be used: merge it into its base "
            "(peft's merge_and_unload) and save the whole model"
        )
    for name in _NEEDED:
        if not (folder / name).is_file():
            raise EngineError(f"{folder} has no {name}; save model and tokenizer there with `save_pretrained`")
    for name in (CONFIG, "tokenizer_config.json"):
        if (folder / name).is_file() and "auto_map" in read_json(folder / name):
            raise EngineError(
                f"{folder} asks for code of its own ({name} has an auto_map), and no release runs code that it "
                "brings; choose a model that transformers knows by itself"
            )
    weights = _weights(folder)
    also = [name for name in (*_NEEDED, *_ALSO) if (folder / name).is_file()]
    files = [folder / name for name in sorted({*also, *weights})]
    for file in files:
        if not file.is_file() or not file.stat().st_size:
            raise EngineError(f"{file} is missing or empty; copy the model again")
    return files


def read_json(file: Path) -> dict[str, Any]:
    """
    Raises:
        EngineError: it isn't a JSON object.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"{file} can't be read: {error}; copy the model again") from None
    if not isinstance(found, dict):
        raise EngineError(f"{file} holds no JSON object; copy the model again")
    return found


def _weights(folder: Path) -> set[str]:
    if (folder / _INDEX).is_file():
        shards = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise EngineError(f"{folder / _INDEX} names no weights; copy the model again")
        names = {str(name) for name in shards.values()}
        strange = sorted(name for name in names if Path(name).name != name or not name.endswith(".safetensors"))
        if strange:
            raise EngineError(f"{folder / _INDEX} names {strange[0]!r}, which is no .safetensors file beside it")
        return {_INDEX, *names}
    if (folder / _WHOLE).is_file():
        return {_WHOLE}
    pickled = [file for file in folder.iterdir() if file.suffix in _PICKLED]
    if pickled:
        largest = max(pickled, key=lambda file: file.stat().st_size)
        raise EngineError(
            f"{folder} holds its weights as {largest.name}, a format that may run code when it is read: save them as "
            "safetensors (`model.save_pretrained`)"
        )
    raise EngineError(f"{folder} has no {_WHOLE}; save the model there with `save_pretrained`")
