"""Register a release with a Hugging Face directory. Where the folder isn't there yet, it is made from the base model
that a package carries, since not every machine may download one."""

import argparse
from pathlib import Path

from millrace.applications import load_application
from millrace.engines.base_model import base_model_path
from millrace.engines.tokenizer import model_tokenizer
from millrace.releases.declare import add_model
from millrace.settings import read_settings


def save_base_model(package: str, folder: Path) -> None:
    """The weights of a package's GGUF file as `save_pretrained` writes them: safetensors and a tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    base = base_model_path(package)
    loaded = AutoModelForCausalLM.from_pretrained(base.parent, gguf_file=base.name, dtype=torch.float32)
    plain = type(loaded)(loaded.config)
    plain.load_state_dict(loaded.state_dict())
    del plain.config.quantization_config  # of the file that it was read from
    plain.save_pretrained(folder)
    model_tokenizer(base).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--application", default="qa")
    given = parser.parse_args()
    settings = read_settings()
    application = load_application(settings, given.application)
    if not given.folder.exists():
        save_base_model(application.generator, given.folder)
    print(add_model(settings, application, given.folder, name=None, run="examples/hugging_face.py"))


if __name__ == "__main__":
    main()
