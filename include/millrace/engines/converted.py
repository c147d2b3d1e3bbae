"""A GGUF model in files that are read otherwise: by the engine without rounding, by Hugging Face's libraries fast (the
file itself takes transformers half a minute)."""

from functools import partial
from hashlib import file_digest
from importlib.metadata import version
from pathlib import Path

from millrace.cache import made_once
from millrace.engines.gguf_file import open_gguf, read_weights, rewrite
from millrace.engines.openvino import misread
from millrace.engines.tokenizer import model_tokenizer
from millrace.errors import EngineError

CONVERSION = 1
"""Raise when the same file is converted otherwise: what is in caches is made anew then."""


def exact_file(path: Path, cache: Path) -> Path:
    """The GGUF model at `path` with weights that the engine computes as they are: the file itself, or one with its
    rounded tensors in Q8_0, converted if it isn't in the cache yet.

    Raises:
        EngineError: it isn't a whole GGUF file, or holds what is not a number.
    """
    if not misread(open_gguf(path)):
        return path
    name = f"{path.name.split('.')[0]}.Q8_0.gguf"
    return made_once(cache / "generators" / f"{_key(path)}-exact-{CONVERSION}", partial(_make_exact, path, name)) / name


def hugging_face_folder(path: Path, cache: Path) -> Path:
    """Tokenizer and model (safetensors, the weights as 32-bit floats) of the GGUF file at `path`, converted if they
    aren't in the cache yet. Not in a process that has joined a group of torch's: only its first one may write.

    Raises:
        EngineError: transformers wrote no weights.
    """
    ready = cache / "generators" / f"{_key(path)}-transformers-{version('transformers')}-{CONVERSION}"
    return made_once(ready, partial(_convert, path))


def _key(path: Path) -> str:
    with path.open("rb") as weights:
        return file_digest(weights, "sha256").hexdigest()[:16]


def _make_exact(path: Path, name: str, target: Path) -> None:
    from gguf import GGMLQuantizationType, quantize

    reader, kind = open_gguf(path), GGMLQuantizationType.Q8_0
    kinds = dict.fromkeys(misread(reader), kind)
    rewrite(reader, target / name, kinds=kinds, encode=lambda tensor: quantize(read_weights(tensor), kind))


def _convert(path: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.device("meta"):
        model = type(read)(read.config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    del model.config.quantization_config  # of the file that it was read from
    model.save_pretrained(target)
    model_tokenizer(path).save_pretrained(target)
    if not (target / "model.safetensors").exists():
        raise EngineError(f"transformers wrote no weights of {path}; convert it outside of torch's process groups")
