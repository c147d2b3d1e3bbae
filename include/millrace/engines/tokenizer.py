"""The tokenizer of a GGUF model as transformers objects, for training: the same tokens that the engine computes.

transformers' conversion from GGUF forgets that SmolLM2 splits numbers into digits, so that texts with numbers would
be trained on tokens that the engine never sees; it is put back here (a test compares both).
"""

from pathlib import Path
from typing import Any


def model_tokenizer(path: Path) -> Any:
    """A `transformers` fast tokenizer for the GGUF file at `path`."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer
