"""A GGUF model as Hugging Face's libraries read it fast: to read the file itself takes transformers half a minute."""

from functools import partial
from hashlib import file_digest
from importlib.metadata import version
from pathlib import Path

from millrace.cache import made_once
from millrace.engines.tokenizer import model_tokenizer
from millrace.errors import EngineError

CONVERSION = 1
"""Raise when the same file is converted otherwise: what is in caches is made anew then."""


def hugging_face_folder(path: Path, cache: Path) -> Path:
    """Tokenizer and model (safetensors, the weights as 32-bit floats) of the GGUF file at `path`, converted if they
    aren't in the cache yet. Not in a process that has joined a group of torch's: only its first one may write.

    Raises:
        EngineError: transformers wrote no weights.
    """
    with path.open("rb") as weights:
        key = file_digest(weights, "sha256").hexdigest()[:16]
    ready = cache / "generators" / f"{key}-transformers-{version('transformers')}-{CONVERSION}"
    return made_once(ready, partial(_convert, path))


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
