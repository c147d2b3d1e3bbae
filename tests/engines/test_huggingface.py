"""Which files of a Hugging Face directory are the model; none of these tests loads one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from millrace.engines.huggingface import model_files
from millrace.errors import EngineError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Names and configuration of a model, and what a trainer leaves beside it."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "optimizer.pt", "training_args.bin"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "model.safetensors").write_text("tensors")
    (tmp_path / "modeling_own.py").write_text("raise SystemExit")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    return tmp_path


def shards(folder: Path, *names: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(enumerate(names))}))


def test_weights_configuration_tokenizer_and_licence_are_the_model_and_nothing_else_is(folder: Path) -> None:
    assert [file.name for file in model_files(folder)] == [
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    shards(folder, "a.safetensors", "b.safetensors", "a.safetensors")
    for name in ("a", "b"):
        (folder / f"{name}.safetensors").write_text("tensors")
    names = {file.name for file in model_files(folder)}
    assert {"model.safetensors.index.json", "a.safetensors", "b.safetensors"} < names


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
         r"as pytorch_model\.bin, a format that may run code when it is read: save them as safetensors"),
        (lambda f: [(f / name).unlink() for name in ("model.safetensors", "training_args.bin", "optimizer.pt")],
         r"has no model\.safetensors"),
        (lambda f: (f / "model.safetensors").write_text(""), "is missing or empty"),
        (lambda f: (f / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_own.Own"}}'),
         r"asks for code of its own \(config\.json has an auto_map\), and no release runs code"),
        (lambda f: (f / "tokenizer_config.json").write_text('{"auto_map": {}}'), "asks for code of its own"),
        (lambda f: (f / "config.json").write_text("{"), "can't be read"),
        (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
        (lambda f: (f / "tokenizer.json").unlink(), r"has no tokenizer\.json"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), r"holds a LoRA adapter .*which would not be used"),
        (lambda f: shards(f, "a.safetensors"), r"a\.safetensors is missing or empty"),
        (lambda f: shards(f, "../a.safetensors"), r"names '\.\./a\.safetensors', which is no \.safetensors file"),
        (lambda f: shards(f, "a.bin"), r"names 'a\.bin'"),
        (lambda f: shards(f), "names no weights"),
    ],
)  # fmt: skip
def test_what_is_no_whole_and_safe_model_is_refused_in_one_sentence(
    folder: Path, spoil: Callable[[Path], object], said: str
) -> None:
    spoil(folder)
    with pytest.raises(EngineError, match=said) as refused:
        model_files(folder)
    assert "\n" not in str(refused.value)


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(EngineError, match="is not a folder"):
        model_files(folder / "config.json")
